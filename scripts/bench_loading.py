"""Memory and time of loading a base: quantized by the kit, from its cache, and by transformers.

python scripts/bench_loading.py
python scripts/bench_loading.py --hidden 2048 --layers 16 --shards 5 --rounds 3

Each side loads the same model (a random Llama in bfloat16 of the given shape, in several files, or
`--model FOLDER`) to NF4 with double quantization, in a process of its own, in turns. The peak is
what the process holds above what it held when it had loaded a small model: resident memory, in
which pages of mapped files count, and of it the part that is no file's (anonymous); the one by the
kernel's high-water mark, the other sampled every 5 ms. One tensor's quantization takes up to 14
bytes per weight for a moment.

The machine's other work changes seconds; CPU seconds hardly.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, existing_folder, output_file, plainly

SIDES = ("kit", "cache", "transformers")
_MIB = 2**20
# What bitsandbytes holds per weight of the tensor that it quantizes on a CPU.
_TRANSIENT_BYTES = 14


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=existing_folder, help="folder of a model; unset: a random Llama"
    )
    parser.add_argument("--hidden", type=at_least(1), default=1024)
    parser.add_argument("--layers", type=at_least(1), default=16)
    parser.add_argument("--vocabulary", type=at_least(1), default=32768)
    parser.add_argument("--shards", type=at_least(1), default=4)
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return run_side(arguments.side, arguments.folder, arguments.small)
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as scratch:
        folder = arguments.model or random_llama(Path(scratch) / "model", arguments)
        small = argparse.Namespace(hidden=256, layers=1, vocabulary=256, shards=1)
        random_llama(Path(scratch) / "small", small)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(arguments.threads),
            "QLORA_KIT_CACHE": str(Path(scratch) / "cache"),
        }
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
        if "cache" in arguments.sides:
            run("cache", folder, environment)  # which fills it
        for number in range(arguments.rounds):
            for side in arguments.sides[:: 1 if number % 2 == 0 else -1]:
                runs[side].append(run(side, folder, environment))
        told(runs, folder, arguments.json)
    return 0


def random_llama(folder: Path, arguments: argparse.Namespace) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(arguments.hidden // 256, 1),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    num_bytes = 2 * sum(one.numel() for one in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-num_bytes // arguments.shards))
    return folder


def run(side: str, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """One side, once, in a process of its own."""
    small = str(Path(environment["QLORA_KIT_CACHE"]).with_name("small"))
    script = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--small", small]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_side(side: str, folder: Path, small: Path) -> int:
    """In the child: figures as one line of JSON."""
    load = {"kit": by_kit, "cache": from_cache, "transformers": by_transformers}[side]
    load(small)()  # what libraries import and make ready at their first use
    prepared = load(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    resident, anonymous = memory("VmRSS"), memory("RssAnon")
    most = [anonymous]
    ended = threading.Event()
    watch = threading.Thread(target=sample, args=(most, ended))
    watch.start()
    started, cpu = time.perf_counter(), time.process_time()
    model = prepared()
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": memory("VmHWM") - resident,
    }
    ended.set()
    watch.join()
    figures["peak_anonymous_bytes"] = max(most) - anonymous
    from qlora_kit.model.quantized import count_quantized

    figures["model_bytes"] = count_quantized(model).weight_bytes
    print(json.dumps(figures))
    return 0


def memory(key: str) -> int:
    """Of this process, in bytes, as /proc says."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def sample(most: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.005):
        most.append(memory("RssAnon"))


def by_kit(folder: Path) -> Any:
    """Quantized anew, and written nowhere."""
    return kit(folder, keeps=False)


def from_cache(folder: Path) -> Any:
    """From the cache, which the first call fills."""
    return kit(folder, keeps=True)


def kit(folder: Path, keeps: bool) -> Any:
    import bitsandbytes  # noqa: F401 - imported before the clock starts
    import torch
    import transformers  # noqa: F401

    from qlora_kit.environment import probe_hardware
    from qlora_kit.model.base import bitsandbytes_config
    from qlora_kit.model.load import load_model
    from qlora_kit.model.quantized_cache import entry_folder, load_for_all
    from qlora_kit.model.skeleton import build_skeleton, load_config
    from qlora_kit.model.source import ModelSource
    from qlora_kit.recipe import ModelSpec, QuantizationSpec

    source = ModelSource(str(folder), folder, "folder")
    skeleton = build_skeleton(load_config(folder))
    config = bitsandbytes_config(QuantizationSpec(), skeleton, torch.float32)
    assert config is not None
    hardware = probe_hardware()
    spec = ModelSpec(name_or_path=str(folder))

    def load(quantized: Path | None = None) -> Any:
        return load_model(source, spec, config, skeleton, torch.float32, hardware, quantized)

    facts = (config.to_dict(), torch.float32, "cpu", skeleton.model.config.to_dict())
    entry = entry_folder(str(folder), *facts)
    return (lambda: load_for_all(entry, load, print)[0]) if keeps else load


def by_transformers(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


def told(runs: dict[str, list[dict[str, float]]], folder: Path, json_path: Path | None) -> None:
    from qlora_kit.model.weights import inspect_weights

    weights = inspect_weights(folder)
    largest = max(one.num_elements for one in weights.tensors.values())
    some = next(iter(runs.values()))[0]
    print(
        f"{len(weights.files)} files of {weights.total_bytes / _MIB:,.0f} MiB, "
        f"{some['model_bytes'] / _MIB:,.0f} MiB when quantized (embeddings in float32), the "
        f"largest tensor of {largest / 1e6:,.1f} M weights "
        f"({_TRANSIENT_BYTES * largest / _MIB:,.0f} MiB while it is quantized)"
    )
    print("side          seconds  CPU seconds  peak MiB  of it anonymous  peak : quantized model")
    for side, found in runs.items():
        now = {key: statistics.median(one[key] for one in found) for key in found[0]}
        print(
            f"{side:12} {now['seconds']:8.1f} {now['cpu_seconds']:12.1f} "
            f"{now['peak_bytes'] / _MIB:9,.0f} {now['peak_anonymous_bytes'] / _MIB:16,.0f} "
            f"{now['peak_bytes'] / now['model_bytes']:23.2f}"
        )
    if json_path is not None:
        values = {
            "file_bytes": weights.total_bytes,
            "largest_tensor_bytes": _TRANSIENT_BYTES * largest,
            "runs": runs,
        }
        json_path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(plainly(main))
