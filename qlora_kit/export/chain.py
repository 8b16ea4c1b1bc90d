"""The first members of a chain: the base in 16 bits, as it was quantized, and with the adapter."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model_state_dict

from qlora_kit.evaluate.divergence import Recorded, record_logprobs
from qlora_kit.export.delta import WEIGHTS_FILE
from qlora_kit.export.ledger import BATCH_SIZE, TRAINED, Ledger, Row, kept_rows
from qlora_kit.recipe import ModelSpec
from qlora_kit.records import file_sha256
from qlora_kit.runtime.open import open_runtime
from qlora_kit.runtime.transformers import TransformersRuntime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.export.reopen import Reopened
    from qlora_kit.export.trained import TrainedAdapter
    from qlora_kit.report.reporter import Reporter

SIXTEEN_BIT = "16-bit base"


def base_name(trained: TrainedAdapter) -> str:
    """What the frozen base is called in the table."""
    settings = trained.quantization
    if trained.aware is not None:
        return f"{trained.aware.spec.method} base"
    if len(settings.all_bits) > 1:
        return "mixed base"
    if settings.num_bits == 16:
        return SIXTEEN_BIT
    return f"{settings.quant_type if settings.num_bits == 4 else 'int8'} base"


def begin_ledger(
    reopened: Reopened, max_rows: int, scratch: Path, kept: Path, reporter: Reporter
) -> Ledger:
    """Record what the trained model says, and measure what it came from, or take from `kept` what
    an earlier export has measured on the same tokens. The model is freed.
    """
    trained, rows = reopened.trained, reopened.held_out[:max_rows]
    runtime = _runtime(reopened.take_model(), trained)
    ledger = Ledger(
        _record(runtime, rows, scratch, reporter), file_sha256(trained.folder / WEIGHTS_FILE), []
    )
    ledger.rows = kept_rows(kept, ledger.measured_on)
    if ledger.find(TRAINED) is None:
        ledger.rows = _base_and_trained(runtime, trained, ledger, reporter)
    runtime.close()
    del runtime
    gc.collect()
    if base_name(trained) != SIXTEEN_BIT and ledger.find(SIXTEEN_BIT) is None:
        ledger.rows.insert(0, _sixteen_bit(trained, ledger, reporter))
    return ledger


def _runtime(model: PeftModel, trained: TrainedAdapter) -> TransformersRuntime:
    return TransformersRuntime(
        name=TRAINED,
        model=model,
        tokenizer=trained.tokenizer,
        stop_ids=frozenset(),
        compute_dtype=trained.compute_dtype,
        folders=(trained.source.folder, trained.folder),
    )


def _record(
    runtime: TransformersRuntime,
    rows: Sequence[TokenSequence],
    scratch: Path,
    reporter: Reporter,
) -> Recorded:
    num_tokens = sum(row.num_supervised for row in rows)
    with reporter.progress("measuring (trained)", num_tokens) as progress:
        return record_logprobs(runtime, rows, scratch, batch_size=BATCH_SIZE, progress=progress)


def _base_and_trained(
    runtime: TransformersRuntime, trained: TrainedAdapter, ledger: Ledger, reporter: Reporter
) -> list[Row]:
    """One comparison tells the perplexity of both."""
    name = base_name(trained)
    with runtime.without_adapter(name) as alone:
        divergence = ledger.compare(name, alone, reporter)
    both = runtime.footprint()
    adapter = get_peft_model_state_dict(runtime.model, save_embedding_layers=False).values()
    adapter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in adapter)
    alone_on_disk = replace(runtime, folders=(trained.source.folder,)).footprint().disk_bytes
    is_stored_so = name == SIXTEEN_BIT or "original" not in trained.bases
    return [
        Row(
            name,
            divergence.candidate_perplexity,
            divergence.kl_mean,
            divergence.top1_agreement,
            alone_on_disk if is_stored_so else None,
            both.memory_bytes - adapter_bytes,
        ),
        Row(
            TRAINED,
            divergence.reference_perplexity,
            0.0,
            1.0,
            both.disk_bytes,
            both.memory_bytes,
        ),
    ]


def _sixteen_bit(trained: TrainedAdapter, ledger: Ledger, reporter: Reporter) -> Row:
    if "original" not in trained.bases:
        return Row(SIXTEEN_BIT, note="the base is stored quantized")
    runtime = open_runtime(
        str(trained.source.folder),
        ModelSpec(
            name_or_path=str(trained.source.folder),
            allow_pickle=trained.allow_pickle,
            trust_remote_code=trained.trust_remote_code,
        ),
    )
    try:
        largest = max(max(window.input_ids) for window in ledger.recorded.windows)
        if largest >= runtime.vocab_size:
            return Row(SIXTEEN_BIT, note="has no rows for the tokens that training added")
        return ledger.measure(SIXTEEN_BIT, runtime, reporter=reporter)
    finally:
        runtime.close()


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
