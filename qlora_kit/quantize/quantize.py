"""The straight line of `qlora-kit quantize`: from a 16-bit model to a quantized, measured one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.artifact.record import (
    BaseRef,
    CalibrationRecord,
    MadeFrom,
    made_from,
    write_record,
)
from qlora_kit.atomic import draft_beside, flush_folder, require_disk
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import DataError, RunError
from qlora_kit.evaluate.divergence import (
    DEFAULT_MAX_TOKENS,
    Recorded,
    compare_to_recorded,
    record_logprobs,
)
from qlora_kit.quantize.calibration import CalibrationSpec, draw_calibration, require_wanted
from qlora_kit.quantize.certificate import Compared, write_certificate
from qlora_kit.quantize.held_out import NOTHING_NAMED, HeldOut, Named, texts_for
from qlora_kit.quantize.method import Calibration, Made, Method, MethodOptions, Source
from qlora_kit.quantize.methods import resolve_method, tools_of
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.source import open_source
from qlora_kit.quantize.texts import require_rows
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import context_tokens
from qlora_kit.runtime.open import open_runtime

if TYPE_CHECKING:
    from qlora_kit.runtime.protocol import Footprint

BATCH_SIZE = 64
MAX_WINDOW = 1024
"""Tokens read at once where a held-out text is longer; every token counts once."""
_OTHER_FILES_BYTES = 32 * 1024**2


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    model: ModelSpec
    method: str
    out: Path
    options: tuple[str, ...] = ()
    """`key=value`, of the method's own."""
    texts: Named = NOTHING_NAMED
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    max_tokens: int = DEFAULT_MAX_TOKENS
    """Supervised tokens that the two models are compared on, at most."""
    max_kl: float | None = None
    """Budget: mean KL in nats per token from the source."""
    note: str = ""
    """What the model is, where the user named something that it was made from."""
    keeps_source: bool = True
    """Whether the model's folder stays, so that the record may point to it."""


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked before the work begins."""

    source: Source
    method: Method
    options: MethodOptions
    calibration: Calibration | None
    held_out: HeldOut


def quantize(request: Request, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Check, calibrate, quantize, reload, compare, certify, publish. Returns the certificate.

    Its `passed` says whether `max_kl` was met; the folder is there either way.

    Raises:
        QloraKitError: whatever is at fault, before the work; `out` is then not there.
    """
    ready = prepare(request, reporter)
    with draft_beside(request.out) as scratch:
        draft = scratch / "quantized"
        draft.mkdir()
        recorded, footprint = record_source(ready, request.max_tokens, scratch, reporter)
        made = ready.method.make(ready.source, ready.options, ready.calibration, draft, reporter)
        compared = compare(ready, made, draft, recorded, footprint, reporter)
        if made.finish is not None:
            made.finish(draft)
        certificate = write_certificate(
            draft,
            method=ready.method.name,
            options=ready.options,
            source=ready.source,
            public_name=_public_name(ready.source),
            note=request.note,
            calibration=ready.calibration,
            held_out=ready.held_out,
            made=made,
            compared=compared,
            max_kl=request.max_kl,
        )
        record(request, ready, draft)
        flush_folder(draft)
        draft.rename(request.out)
    return certificate


def require_sound(request: Request) -> tuple[Method, MethodOptions]:
    """The method and its options, once all is right that can be told without the model."""
    if request.out.exists():
        raise RunError(f"{request.out} exists already; remove it, or name another folder.")
    method = resolve_method(request.method)
    options = parse_options(method, request.options)
    need = method.calibration(options)
    require_wanted(need, method.name, request.texts.calibration is not None)
    if request.texts.calibration is not None:
        require_rows(request.texts.calibration, "train")
    if request.texts.data is not None:
        require_rows(request.texts.data, "eval")
    return method, options


def prepare(request: Request, reporter: Reporter = SILENT) -> Prepared:
    """Find and check all that was named."""
    require_sound(request)
    ready = examine(request, open_source(request.model, probe_hardware()), reporter)
    _tell(reporter, request, ready)
    return ready


def examine(request: Request, source: Source, reporter: Reporter = SILENT) -> Prepared:
    """Check what can be told without a source's weights: shapes, texts, room on the disk, and
    whether the method's library can follow the architecture.

    Raises:
        QloraKitError: the method cannot take it, there is too little text or room.
    """
    method, options = require_sound(request)
    method.check(source, options)
    texts, rows, held_out = texts_for(request.texts, source.tokenizer, request.calibration.seed)
    calibration = None
    if texts is not None:
        context = context_tokens(source.skeleton.model)
        calibration = draw_calibration(texts, rows, request.calibration, context)
    _require_supervised(held_out)
    needed = _bytes_to_write(request, source, method, options)
    require_disk(request.out, needed, "this model", "name another folder with --out")
    try_beforehand(method, source, options, reporter)
    return Prepared(source, method, options, calibration, held_out)


def try_beforehand(
    method: Method, source: Source, options: MethodOptions, reporter: Reporter
) -> None:
    """On a small model of the same architecture; says where that is not possible.

    Raises:
        ModelError: what the method calls cannot follow this architecture.
    """
    reason = method.try_small(source, options)
    if reason:
        reporter.warn(f"{method.name}: {reason}.")


def record_source(
    ready: Prepared, max_tokens: int, folder: Path, reporter: Reporter
) -> tuple[Recorded, Footprint]:
    """What the source says on the held-out text, and what it takes; it is not kept in memory."""
    source = ready.source
    spec = ModelSpec(
        name_or_path=str(source.folder),
        allow_pickle=source.allow_pickle,
        trust_remote_code=source.trust_remote_code,
    )
    runtime = open_runtime(str(source.folder), spec)
    num_tokens = min(max_tokens, sum(row.num_supervised for row in ready.held_out.sequences))
    with reporter.progress("measuring the source", num_tokens) as progress:
        recorded = record_logprobs(
            runtime,
            ready.held_out.sequences,
            folder,
            batch_size=BATCH_SIZE,
            window_tokens=min(MAX_WINDOW, runtime.context_tokens or MAX_WINDOW),
            max_tokens=max_tokens,
            progress=progress,
        )
    footprint = runtime.footprint()
    runtime.close()
    return recorded, footprint


def compare(
    ready: Prepared,
    made: Made,
    draft: Path,
    recorded: Recorded,
    footprint: Footprint,
    reporter: Reporter,
) -> Compared:
    """Load the draft as its user will, and measure it against the record of its source."""
    path = draft / made.open
    spec = ModelSpec(name_or_path=str(path), trust_remote_code=ready.source.trust_remote_code)
    runtime = open_runtime(str(path), spec)
    stored = runtime.footprint()  # some libraries unpack weights when they are first used
    with reporter.progress("measuring the result", recorded.num_tokens) as progress:
        divergence = compare_to_recorded(
            runtime,
            recorded,
            batch_size=BATCH_SIZE,
            num_entries=min(recorded.vocab_size, runtime.vocab_size),
            progress=progress,
        )
    in_use = replace(stored, memory_bytes=runtime.footprint().memory_bytes)
    compared = Compared(divergence, footprint, in_use)
    runtime.close()
    return compared


def record(request: Request, ready: Prepared, draft: Path) -> None:
    """Write artifact.json, the last file of all."""
    source, drawn = ready.source, ready.calibration
    base = BaseRef(
        name=str(source.folder) if _is_local(source) else source.name,
        fingerprint=source.fingerprint,
        revision=request.model.revision,
        gguf_file=request.model.gguf_file,
    )
    origin: MadeFrom = made_from(source.folder, base)
    if not request.keeps_source:
        origin = replace(origin, parent=None)
    write_record(
        draft,
        kind=ready.method.name,
        made_from=origin,
        settings=ready.options.model_dump(mode="json"),
        calibration=None
        if drawn is None
        else CalibrationRecord(drawn.description, drawn.num_tokens, request.calibration.seed),
        tools=tools_of(ready.method.name),
        home=request.out,
    )


def _require_supervised(held_out: HeldOut) -> None:
    if not any(row.num_supervised for row in held_out.sequences):
        raise DataError(
            f"{held_out.description} has no token to compare two models on (nothing is "
            "supervised); name other text with --data."
        )


def _bytes_to_write(
    request: Request, source: Source, method: Method, options: MethodOptions
) -> int:
    """The draft, and beside it what the source says on the held-out text."""
    vocabulary = source.skeleton.model.config.get_text_config().vocab_size
    logits = 4 * int(vocabulary) * request.max_tokens
    return method.predict_bytes(source, options) + logits + _OTHER_FILES_BYTES


def _tell(reporter: Reporter, request: Request, ready: Prepared) -> None:
    source, calibration = ready.source, ready.calibration
    dtype = str(source.dtype).removeprefix("torch.")
    reporter.say(
        f"source    {request.note or source.name}: {source.num_parameters:,} parameters in {dtype}"
    )
    if calibration is not None:
        reporter.say(f"calibrate {calibration.description}")
    reporter.say(f"compare   on {ready.held_out.description}")
    if request.texts == NOTHING_NAMED:
        reporter.say("          (named none; --data RECIPE or FILE compares on text of your own)")


def _is_local(source: Source) -> bool:
    return Path(source.name).expanduser().exists()


def _public_name(source: Source) -> str:
    """No path of this machine is published."""
    return Path(source.name).name if _is_local(source) else source.name
