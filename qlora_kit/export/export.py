"""The straight line of `qlora-kit export`: from a trained adapter to measured, recorded folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qlora_kit
from qlora_kit.artifact.record import read_record, write_record
from qlora_kit.atomic import draft_beside, flush_folder, require_disk
from qlora_kit.export.certify import CERTIFICATE_FILE, origin_of, trained_on
from qlora_kit.export.chain import SIXTEEN_BIT, base_name, begin_ledger, free_memory
from qlora_kit.export.export_card import write_export_card
from qlora_kit.export.jobs import ExportRequest, Job, placed, sound_jobs
from qlora_kit.export.ledger import TRAINED, Ledger, Row, as_json, show
from qlora_kit.export.makers import MAKERS, Content, Ingredients, needs_dequantized
from qlora_kit.export.merge import predict_bytes
from qlora_kit.export.merge_run import merge_and_certify
from qlora_kit.export.rehearsal import rehearse
from qlora_kit.quantize.gguf.parity import Parity, require_parity
from qlora_kit.quantize.methods import tools_of
from qlora_kit.records import file_sha256
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.open import open_runtime
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.export.places import Places
    from qlora_kit.export.reopen import Reopened
    from qlora_kit.export.trained import TrainedAdapter

_FORMAT = 1
_LOGITS_BYTES = 4 * 4096


@dataclass
class _Session:
    """One call: what is exported, where to, and what has been measured so far."""

    trained: TrainedAdapter
    request: ExportRequest
    places: Places
    given: Ingredients
    ledger: Ledger
    recipe_sha256: str | None
    reporter: Reporter


def export_reopened(
    reopened: Reopened,
    request: ExportRequest,
    places: Places,
    hardware: Hardware,
    reporter: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """Export an adapter to every target of the request; returns their certificates.

    The `passed` of each says whether its budget was met; the folder is there either way.

    Raises:
        QloraKitError: what is at fault, before the work where it can be known then. Of targets
            that were finished before, the folders stay; the one at fault leaves nothing.
    """
    trained = reopened.trained
    jobs = [placed(job, trained, reporter) for job in sound_jobs(request, places)]
    adapter_sha256 = file_sha256(trained.folder / "adapter_model.safetensors")
    for job in jobs:
        for base in job.merge_bases:
            places.require_room_for_merge(base, adapter_sha256)
    rows = reopened.held_out[: request.merge.max_rows]
    places.clear_leftovers()
    with draft_beside(places.exports) as scratch:
        given = Ingredients(
            trained=trained,
            origin=origin_of(trained, reopened.recipe_sha256),
            held_out=frozenset(row.input_ids for row in rows),
            calibration_spec=request.calibration_spec,
            hardware=hardware,
            scratch=scratch,
            reporter=reporter,
        )
        needed = rehearse(jobs, given, scratch / "rehearsal")
        needed += _merge_bytes(jobs, trained, places, adapter_sha256)
        needed += _LOGITS_BYTES * trained.skeleton.model.config.get_text_config().vocab_size
        require_disk(places.exports, needed, "these exports", "remove what is not needed")
        ledger = begin_ledger(reopened, request.merge.max_rows, scratch, places.ledger, reporter)
        free_memory(hardware.device)
        session = _Session(
            trained, request, places, given, ledger, reopened.recipe_sha256, reporter
        )
        made = [(job.target.name, *_export(job, session)) for job in jobs]
    show(ledger.rows, ledger.recorded.num_tokens, reporter)
    for name, folder, certificate in made:
        _tell_where(name, folder, certificate, reporter)
    return [certificate for _, _, certificate in made]


def _tell_where(
    name: str, folder: Path, certificate: Mapping[str, Any], reporter: Reporter
) -> None:
    """The last that is said of an export: where it is, and whether it is as near as was asked."""
    if certificate["passed"]:
        reporter.say(f"exported  {name}: {folder}")
    else:
        reporter.warn(f"{name} is further from the trained model than asked; it is in {folder}.")


def _merge_bytes(
    jobs: Sequence[Job], trained: TrainedAdapter, places: Places, adapter_sha256: str
) -> int:
    """Of the merges that have to be made; where the base is chosen, both are there for a while.
    Of a base that an adapter is to stand beside, as training saw it.
    """
    beside = sum(predict_bytes(trained, "dequantized") for job in jobs if needs_dequantized(job))
    wanted = {base for job in jobs for base in job.merge_bases}
    missing = [base for base in wanted if places.fitting_merge(base, adapter_sha256) is None]
    kinds = [kind for base in missing for kind in (trained.bases if base == "auto" else (base,))]
    return beside + sum(predict_bytes(trained, kind) for kind in kinds)


def _export(job: Job, session: _Session) -> tuple[Path, dict[str, Any]]:
    """Its folder, and the certificate in it."""
    if job.target.maker == "merged":
        folder = _merge(job, session)
        return folder, _certificate_of(folder)
    reporter, ledger = session.reporter, session.ledger
    reporter.say(f"export    {job.target.name} → {job.out}")
    with draft_beside(job.out) as scratch:
        made = _made(job, session, scratch / "export")
        if job.or_else is not None:
            other = _made(replace(job, base=job.or_else), session, scratch / "other")
            made = _better(made, other, reporter)
        job, draft, content, row = made.job, made.draft, made.content, made.row
        if content.finish is not None:
            content.finish(draft)
        names = [SIXTEEN_BIT, base_name(session.trained), TRAINED]
        names += [] if made.merged is None else [_merge_name(made.merged)]
        chain = [*ledger.chain(*names), row]
        certificate = _certificate(job, content, made.parity, chain, session)
        certificate["not_kept"] = None if made.instead_of is None else asdict(made.instead_of)
        write_export_card(certificate, job.options, draft)
        text = json.dumps(certificate, indent=2, ensure_ascii=False)
        (draft / CERTIFICATE_FILE).write_text(text + "\n", encoding="utf-8")
        record = write_record(
            draft,
            kind=job.target.name,
            made_from=content.origin,
            settings=content.settings,
            calibration=content.calibration,
            tools=_tools(job),
            home=job.out,
        )
        flush_folder(draft)
        draft.rename(job.out)
    ledger.add(replace(row, artifact=record.sha256))
    ledger.keep(session.places.ledger)
    for note in content.notes:
        reporter.say(f"          {note}")
    return job.out, certificate


@dataclass(frozen=True)
class _Made:
    """One export in its draft, measured."""

    job: Job
    merged: Path | None
    draft: Path
    content: Content
    parity: Parity
    row: Row
    instead_of: Row | None = None
    """The one that was made of another merge, and not kept."""


def _made(job: Job, session: _Session, draft: Path) -> _Made:
    merged = _merge(job, session) if job.target.is_of_merge else None
    draft.mkdir()
    content = MAKERS[job.target.maker](job, session.given, merged, draft)
    parity = require_parity(
        session.trained.tokenizer,
        draft,
        None if content.gguf_file is None else draft / content.gguf_file,
    )
    return _Made(job, merged, draft, content, parity, _measured(job, content, session))


def _better(one: _Made, other: _Made, reporter: Reporter) -> _Made:
    """The one with the lower loss on the held-out rows."""
    kept, lost = sorted((one, other), key=lambda made: _loss(made.row))
    figures = [
        f"perplexity {made.row.perplexity:.4g}, KL {made.row.kl_mean:.2g} from the merge into the "
        f"{made.job.base} base"
        for made in (kept, lost)
    ]
    reporter.say(f"          {figures[0]}: kept ({figures[1]})")
    if kept.job.base == "dequantized":
        reporter.warn(
            f"{kept.job.target.name} is made from the dequantized merge, whose weights were "
            "rounded to 4 bits once: on the held-out rows that is the better one for this adapter. "
            "--base original makes it from the original weights."
        )
    return replace(kept, instead_of=lost.row)


def _loss(row: Row) -> float:
    return math.inf if row.perplexity is None else row.perplexity


def _measured(job: Job, content: Content, session: _Session) -> Row:
    """Loaded as its user will, and compared with what the trained model said."""
    own = session.places.exports / job.target.folder_name
    name = job.target.name if job.out == own else f"{job.target.name} ({job.out.name})"
    runtime = content.open()
    try:
        row = session.ledger.measure(name, runtime, reporter=session.reporter)
    finally:
        runtime.close()
    return replace(row, note=content.measured_as)


def _merge(job: Job, session: _Session) -> Path:
    """The merge that a job is made from: one that is there, or a new one that stays."""
    assert job.base is not None
    places, reporter, ledger = session.places, session.reporter, session.ledger
    is_target = job.target.maker == "merged"
    own = job.out if is_target and job.out != places.merged else None
    folder = None if own else places.fitting_merge(job.base, ledger.adapter_sha256)
    if folder is None:
        folder = own or places.merge(job.base)
        options = session.request.merge.model_copy(update={"base": job.base})
        merge_and_certify(
            session.trained,
            ledger.recorded,
            folder,
            options,
            session.given.hardware,
            recipe_sha256=session.recipe_sha256,
            chain=as_json(ledger.chain(SIXTEEN_BIT, base_name(session.trained), TRAINED)),
            reporter=reporter,
        )
    else:
        reporter.say(f"merge     {folder} is there, and is of this adapter")
    name, sha256 = _merge_name(folder), read_record(folder).sha256
    if ledger.find(name, sha256) is None:
        runtime = open_runtime(str(folder))
        try:
            ledger.add(ledger.measure(name, runtime, sha256, reporter))
        finally:
            runtime.close()
        ledger.keep(places.ledger)
    return folder


def _merge_name(folder: Path) -> str:
    settings = read_record(folder).settings
    return f"merged, {settings['base']} base in {settings['dtype']}"


def _certificate_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / CERTIFICATE_FILE).read_text(encoding="utf-8"))
    return values


def _tools(job: Job) -> dict[str, str | None]:
    return {} if job.target.method is None else tools_of(job.target.method)


def _certificate(
    job: Job, content: Content, parity: Parity, chain: Sequence[Row], session: _Session
) -> dict[str, Any]:
    trained, row, max_kl = session.trained, chain[-1], session.request.max_kl
    kl = row.kl_mean
    assert kl is not None
    return {
        "format": _FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "qlora_kit_version": qlora_kit.__version__,
        "versions": {**package_versions(), **_tools(job)},
        "target": job.target.name,
        "base": read_record(Path(content.origin.parent.path)).settings["base"]
        if content.origin.parent
        else job.base,
        "settings": dict(content.settings),
        "calibration": content.calibration and asdict(content.calibration),
        "trained_on": trained_on(trained),
        "max_kl": max_kl,
        "passed": math.isfinite(kl) if max_kl is None else kl <= max_kl,
        "num_tokens": session.ledger.recorded.num_tokens,
        "ledger": as_json(chain),
        "parity": {**asdict(parity), "refused": list(parity.refused)},
        "findings": dict(content.findings),
        "notes": list(content.notes),
    }
