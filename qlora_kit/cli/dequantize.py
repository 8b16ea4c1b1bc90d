"""`qlora-kit dequantize MODEL`: a 4- or 8-bit checkpoint as plain 16- or 32-bit weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_kit.cli.arguments import AllowPickle, AsJson, TrustRemoteCode

NAME = "dequantize"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A bitsandbytes checkpoint: folder or hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="What weights are rounded to, once; auto: as the rest is stored."),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Turn any bitsandbytes 4- or 8-bit checkpoint into plain safetensors, and compare the two."""
    from dataclasses import asdict

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.environment import probe_hardware
    from qlora_kit.export.certify import public_name
    from qlora_kit.export.dequantize import dequantize_checkpoint
    from qlora_kit.export.merge import require_absent
    from qlora_kit.model.source import resolve_source

    require_absent(out)
    reporter = console_reporter(to_stderr=as_json)
    source = resolve_source(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    result = dequantize_checkpoint(
        source.folder,
        out,
        probe_hardware(),
        dtype=dtype,
        public_name=public_name(source),
        hub_id=source.hub_id,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        reporter=reporter,
    )
    if as_json:
        values = {**asdict(result), "passed": result.passed}
        print(json.dumps(values, indent=2, default=str))
    else:
        reporter.say(
            f"{result.num_modules} modules of {result.num_bits} bits are now {result.dtype} "
            f"in {out} ({result.num_bytes / 1e6:,.0f} MB)."
        )
        if result.divergence is not None:
            reporter.say(
                f"On random tokens, KL {result.divergence.kl_mean:.2g} nats/token from the "
                f"quantized model (budget {result.max_kl:g}), same top token "
                f"{result.divergence.top1_agreement:.2%}."
            )
        for fault in result.faults:
            reporter.warn(f"the folder does not come back as it was: {fault}")
    raise typer.Exit(0 if result.passed else 1)
