"""Merge an adapter into its base, measure the result, certify it. Exit code 1 above the budget.

python scripts/merge_adapter.py --adapter runs/quickstart --out merged
python scripts/merge_adapter.py --adapter path/to/adapter --out merged --data eval.jsonl
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from qlora_kit.environment import probe_hardware, settle_upstream
from qlora_kit.errors import QloraKitError
from qlora_kit.recipe import MergeSpec, ModelSpec


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be greater than 0 and finite, got {text}")
    return value


def parse_arguments() -> argparse.Namespace:
    defaults = MergeSpec()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True, help="a run's or adapter's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    bases, dtypes = ("auto", "dequantized", "original"), ("auto", "float32", "float16", "bfloat16")
    parser.add_argument("--base", choices=bases, default=defaults.base)
    parser.add_argument("--dtype", choices=dtypes, default=defaults.dtype)
    parser.add_argument("--max-kl", type=positive, default=defaults.max_kl, help="nats per token")
    parser.add_argument("--data", type=Path, help="held-out rows, instead of the run's own")
    parser.add_argument("--requantize", choices=("nf4", "fp4"), help="quantize the sum again")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that ships with the base"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin/.pt weights")
    parser.add_argument("--force", action="store_true", help="merge into another base all the same")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    settle_upstream()

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.export.merge import require_absent
    from qlora_kit.export.merge_run import merge_reopened
    from qlora_kit.export.reopen import reopen_adapter

    reporter = console_reporter()
    hardware = probe_hardware()
    read_as = ModelSpec(
        name_or_path=str(arguments.adapter),
        trust_remote_code=arguments.trust_remote_code,
        allow_pickle=arguments.allow_pickle,
    )
    options = MergeSpec(base=arguments.base, dtype=arguments.dtype, max_kl=arguments.max_kl)
    try:
        require_absent(arguments.out)
        reopened = reopen_adapter(
            arguments.adapter,
            hardware,
            data=arguments.data,
            force=arguments.force,
            read_as=read_as,
            reporter=reporter,
        )
        again = arguments.requantize
        certificate = merge_reopened(
            reopened, arguments.out, options, hardware, requantize_to=again, reporter=reporter
        )
    except QloraKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    verdict = "within" if certificate["passed"] else "not within"
    reporter.say(f"{arguments.out} is {verdict} the budget of KL {options.max_kl:g}.")
    return 0 if certificate["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
