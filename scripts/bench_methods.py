"""Every way of quantizing on one model, through the command line, as a table for the docs.

python scripts/bench_methods.py --out bench
python scripts/bench_methods.py runs/NAME/merged-original --methods nf4 gguf:Q4_K_M --out bench

Each method makes a folder in OUT (kept, so that a second call only measures), then `compare` opens
all of them, each alone in a process, and measures them against the model that they were made from:
on the held-out rows of the recipe, with speed by repetition. A method that fails is told with its
message, and the table is made of the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, plainly

METHODS = {
    "nf4": [],
    "fp4": [],
    "llm-int8": [],
    "int8": [],
    "gptq": ["--calibration", "RECIPE", "--calibration-tokens", "4096"],
    "awq": ["--calibration", "RECIPE", "--calibration-tokens", "4096", "grid=5"],
    "gguf:Q8_0": [],
    "gguf:Q4_K_M": [],
    "onnx": [],
    "onnx:int8-dynamic": [],
    "onnx:int8-static": ["--calibration", "RECIPE"],
}
"""Every method with what its command needs beside model and folder: on a CPU, little text."""

COLUMNS = (
    "method",
    "on disk",
    "in memory",
    "tokens",
    "perplexity",
    "KL",
    "same top token",
    "load",
    "reading",
    "writing",
)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo/smollm2-135m-instruct")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml", help="whose rows are used")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--repetitions", type=at_least(1), default=3)
    arguments = parser.parse_args()
    made = []
    for method in arguments.methods:
        folder = arguments.out / method.replace(":", "-")
        if folder.exists() or make(arguments.model, method, arguments.recipe, folder):
            made.append((method, folder))
    found = compare(arguments.model, [folder for _, folder in made], arguments)
    names = {str(folder): method for method, folder in made}
    for failure in found["failures"]:
        print(f"{failure['name']}: {failure['reason']}", file=sys.stderr)
    print(table(found["models"], names))
    return 1 if found["failures"] or len(made) < len(arguments.methods) else 0


def make(model: str, method: str, recipe: str, folder: Path) -> bool:
    options = [recipe if one == "RECIPE" else one for one in METHODS[method]]
    command = ["quantize", model, "--method", method, "--out", str(folder), "--data", recipe]
    ended = kit([*command, *options])
    if ended.returncode not in (0, 1) or not folder.exists():
        print(f"{method}: {ended.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return False
    return True


def compare(model: str, folders: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--recipe", arguments.recipe, "--repetitions", str(arguments.repetitions), "--json"]
    # Answers are written once more by evaluate; here only their speed counts.
    options += ["--set", "evaluate.generate=null"]
    ended = kit(["compare", model, *map(str, folders), *options])
    if not ended.stdout.strip():
        sys.exit(ended.stderr)
    values: dict[str, Any] = json.loads(ended.stdout)
    return values


def kit(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    print(f"qlora-kit {' '.join(arguments)}", file=sys.stderr)
    command = [sys.executable, "-m", "qlora_kit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def table(models: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Markdown; the first row is the model that all were made from."""
    compared = next((one["divergence"] for one in models if one["divergence"]), None)
    rows = []
    for model in models:
        divergence = model["divergence"]
        if divergence is None:
            perplexity = "–" if compared is None else f"{compared['reference_perplexity']:.4g}"
            quality = [perplexity, "0", "100 %"]
        else:
            quality = [
                f"{divergence['candidate_perplexity']:.4g}",
                f"{divergence['kl_mean']:.2g}",
                f"{divergence['top1_agreement']:.1%}",
            ]
        rows.append(
            [
                names.get(model["name"], "as it is"),
                megabytes(model["footprint"]["disk_bytes"]),
                megabytes(model["footprint"]["memory_bytes"]),
                f"{compared['num_tokens']:,}" if compared else "–",
                *quality,
                f"{model['load_seconds']:.1f} s",
                rate(model["speed"], "prefill"),
                rate(model["speed"], "decode"),
            ]
        )
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def rate(speed: dict[str, Any] | None, part: str) -> str:
    if speed is None or speed[part] is None:
        return "–"
    return f"{speed[part]['median']:,.0f} tokens/s"


if __name__ == "__main__":
    sys.exit(plainly(main))
