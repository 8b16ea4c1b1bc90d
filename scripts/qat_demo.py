"""What quantization-aware training buys on the demo task, beside a plain QLoRA run.

    qlora-kit train recipes/quickstart.yaml          # plain: trained in NF4, quantized again after
    qlora-kit train recipes/quickstart-qat.yaml      # aware: trained on the weights to be shipped
    python scripts/qat_demo.py runs/quickstart runs/quickstart-qat

Prints, as a table, exact match on the test split and KL to the graph that was trained for: both
trained graphs; the plain run's merge quantized to NF4 again, from its dequantized and from its
16-bit base; the aware run's quantized model, as plain transformers loads it. The merges that are
missing are made beside the plain run, in the folder `--scratch`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path)
    parser.add_argument("aware", type=Path)
    parser.add_argument("--scratch", type=Path, default=Path("runs/qat-demo"))
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    recipe = asked.plain / "recipe.yaml"

    rows = [("trained graph, plain (NF4 base + adapter)", trained(asked.plain), 0.0)]
    for base in ("dequantized", "original"):
        folder = asked.scratch / f"requantized-{base}"
        if not folder.exists():
            kit("merge", asked.plain, "--requantize", "nf4", "--base", base, "--out", folder)
        certificate = json.loads((folder / "certificate.json").read_text())
        name = f"plain, merged into the {base} base, NF4 again"
        rows.append((name, evaluated(folder, recipe), certificate["divergence"]["kl_mean"]))
    rows.append(("trained graph, aware (merged weights in NF4)", trained(asked.aware), 0.0))
    quantized = asked.aware / "quantized"
    certificate = json.loads((quantized / "certificate.json").read_text())
    measured = evaluated(quantized, recipe)
    rows.append(("aware, the quantized model", measured, certificate["divergence"]["kl_mean"]))

    print("\n| model | exact match | of 96 | perplexity | KL to its trained graph |")
    print("|---|---|---|---|---|")
    for name, values, kl in rows:
        print(
            f"| {name} | {values['exact_match']:.1%} | {values['num_exact']} | "
            f"{values['perplexity']['perplexity']:.3f} | {kl:.2g} |"
        )


def trained(run: Path) -> dict[str, Any]:
    """What the run has measured of itself."""
    values: dict[str, Any] = json.loads((run / "evaluation.json").read_text())["tuned"]
    return values


def evaluated(folder: Path, recipe: Path) -> dict[str, Any]:
    """A model on the disk, on the rows of the recipe."""
    output = kit("evaluate", folder, "--recipe", recipe, "--json")
    values: dict[str, Any] = json.loads(output)["model"]
    return values


def kit(*arguments: object) -> str:
    command = [sys.executable, "-m", "qlora_kit", *map(str, arguments)]
    print("$ qlora-kit", *arguments, file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode > 1:  # 1 is a budget that was missed, which is what is shown here
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
