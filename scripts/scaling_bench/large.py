"""What the fits say of models that nobody measured, and `plan` of GPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plan_bench.cases import Case, configuration_of

from scaling_bench.fits import fitted
from scaling_bench.shapes import DEMO, LARGE
from scaling_bench.terms import Holds, Terms

_MIB = 2**20
# Peaks of dense products in bfloat16, 10¹² operations a second, as their makers say.
GPUS = (("RTX 4090", 165.2), ("A100", 312.0), ("H100", 989.4))
PRODUCT_SHARE = 0.5
FITTING = (("RTX 4090", 24), ("A100", 40), ("A100 80GB, H100", 80))
"""With their memory in GiB."""


def extrapolated(shapes: Sequence[dict[str, Any]]) -> str:
    """What the fit says of models that were not measured. Of a GPU it knows the share of the time
    that products have here, and assumes that products reach `PRODUCT_SHARE` of its peak and that
    everything else is as much faster as they are; small models leave a GPU idle, and are left out.
    """
    terms = np.array([Terms.of(Case(**one["case"])).as_row() for one in shapes])
    rates = fitted(terms, np.array([min(one["cpu_seconds"]) for one in shapes]))
    columns = [
        "10⁹/token",
        "products",
        "here",
        *(f"{n} {name}" for n in (1, 8) for name, _ in GPUS),
    ]
    lines = [
        "",
        "EXTRAPOLATED, tokens per second",
        " " * 26 + "".join(f"{one:>12}" for one in columns),
    ]
    for name, one in LARGE.items():
        row = np.array(Terms.of(one).as_row())
        seconds = float(row @ rates)
        share = float(row[0] * rates[0]) / seconds
        tokens, operations = one.tokens * one.batch, float(sum(row[:3]))
        on_gpus = [
            count * tokens * 1e3 * peak * PRODUCT_SHARE * share / operations
            for count in (1, 8)
            for _, peak in GPUS
        ]
        values = [f"{operations / tokens:.1f}", f"{share:.0%}", f"{tokens / seconds:.2f}"]
        values += [f"{speed:,.0f}" for speed in on_gpus] if one is not DEMO else []
        lines.append(f"{name:26}" + "".join(f"{value:>12}" for value in values))
    return "\n".join(lines)


def memory_extrapolated(shapes: Sequence[dict[str, Any]]) -> str:
    """Of this CPU by the fit, in float32; of GPUs by `plan`, in bfloat16 with the same optimizer.
    Of eight GPUs each holds all of it.
    """
    holds = np.array([Holds.of(Case(**one["case"])).as_row() for one in shapes])
    shares = fitted(holds, np.array([max(one["process"]) / _MIB for one in shapes]))
    lines = [
        "",
        "EXTRAPOLATED, GiB: of this CPU by the fit, by plan of each of one or eight GPUs",
        " " * 26 + "".join(f"{one:>14}" for one in ("here", "a GPU", "fits")),
    ]
    for name, one in LARGE.items():
        here = float(np.array(Holds.of(one).as_row()) @ shares) / 1024
        needed = planned_bytes(one) / 2**30
        fits = [gpu for gpu, memory_gib in FITTING if needed <= memory_gib]
        told = f"{here:14.1f}{needed:14.1f}"
        lines.append(f"{name:26}{told}  {', '.join(fits) or 'none of them'}")
    return "\n".join(lines)


def planned_bytes(one: Case) -> int:
    """What `plan` says of an H100's memory, from a configuration and a tokenizer alone."""
    from transformers import AutoConfig

    from qlora_kit.model.vocabulary import load_vocabulary
    from qlora_kit.plan.gpus import known_gpu
    from qlora_kit.plan.plan import Planner
    from qlora_kit.plan.small_run import save_byte_tokenizer
    from qlora_kit.recipe import Recipe

    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
        save_byte_tokenizer(Path(scratch))
        values = configuration_of(one)
        config = AutoConfig.for_model(one.family, **values, max_position_embeddings=one.tokens)
        config.save_pretrained(scratch)
        recipe = Recipe.model_validate(
            {
                "model": {"name_or_path": scratch},
                "lora": {"r": one.rank},
                "data": {"train": [{"path": "rows.jsonl"}], "max_length": one.tokens},
                "train": {**one.train, "per_device_train_batch_size": one.batch},
                "evaluate": {"perplexity": False},
                "run_dir": f"{scratch}/run",
            }
        )
        hardware = known_gpu("H100")
        assert hardware.device_memory_bytes is not None
        planner = Planner(load_vocabulary(recipe.model), hardware, hardware.device_memory_bytes)
        return planner.plan(recipe).peak.num_bytes
