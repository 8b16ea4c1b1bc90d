"""What was asked for, checked as far as it can be before a model is loaded or a file written."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import AdapterError, DataError, ModelError, RunError
from qlora_kit.export.targets import ADAPTER_FOR_VLLM, MergeBase, Target, require_installed
from qlora_kit.quantize.calibration import CalibrationSpec
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.recipe import MergeSpec
from qlora_kit.recipe.vllm import faults_of_config

if TYPE_CHECKING:
    from qlora_kit.export.places import Places
    from qlora_kit.export.trained import BaseKind, TrainedAdapter
    from qlora_kit.quantize.method import CalibrationNeed, Method, MethodOptions
    from qlora_kit.report.reporter import Reporter


@dataclass(frozen=True)
class ExportRequest:
    """What the user asks for."""

    targets: tuple[Target, ...]
    out: Path | None = None
    """The folder of a single target; unset: `exports/TARGET` in the run's folder."""
    options: tuple[str, ...] = ()
    """`key=value` for the method of a single target."""
    base: MergeBase | None = None
    """What is merged into for these targets; unset: what `merge` says, and `auto` where few bits
    are left, as the merge that a run keeps is chosen for other ends."""
    merge: MergeSpec = field(default_factory=MergeSpec)
    max_kl: float | None = None
    """Budget of each export: mean KL in nats per token from the trained model."""
    calibration: str | None = None
    """Text for what is calibrated; unset: the run's training rows."""
    calibration_spec: CalibrationSpec = field(default_factory=CalibrationSpec)


@dataclass(frozen=True)
class Job:
    """One target, with everything about how it is made."""

    target: Target
    out: Path
    base: MergeBase | None
    """Of the merge that it is made from, or that an adapter stands beside: `auto`, `original` or
    `dequantized`; None where it has none."""
    method: Method | None = None
    options: MethodOptions | None = None
    calibration: str | None = None
    or_else: BaseKind | None = None
    """Of another merge that it may turn out better from; what is measured decides."""
    is_calibration_needed: bool = False
    """False where the run's own rows were taken because they happen to be there."""

    @property
    def merge_bases(self) -> tuple[MergeBase, ...]:
        """Of every merge that it needs."""
        if self.base is None or not self.target.is_of_merge:
            return ()
        return (self.base,) if self.or_else is None else (self.base, self.or_else)

    @property
    def calibration_need(self) -> CalibrationNeed:
        return "none" if self.method is None else self.method.calibration(self.options)


def sound_jobs(request: ExportRequest, places: Places) -> list[Job]:
    """The jobs, once all is right that can be told from names alone.

    Raises:
        QloraKitError: a folder is taken, an option or calibration text is missing or of no use, an
            extra is not installed.
    """
    several = len(request.targets) > 1
    if several and (request.out is not None or request.options):
        raise ModelError(
            "--out and KEY=VALUE options belong to one target; export to one at a time."
        )
    jobs = [_job(target, request, places) for target in request.targets]
    outs = [job.out for job in jobs]
    twice = next((out for out in outs if outs.count(out) > 1), None)
    if twice is not None:
        raise RunError(f"two targets would go to {twice}; name each target once.")
    if request.calibration is not None and all(job.calibration_need == "none" for job in jobs):
        raise DataError("none of these targets looks at text, so --calibration has no effect.")
    return jobs


def _job(target: Target, request: ExportRequest, places: Places) -> Job:
    require_installed(target)
    is_merge = target.maker == "merged"
    out = request.out or (places.merged if is_merge else places.exports / target.folder_name)
    if out.exists() and not (is_merge and request.out is None):
        raise RunError(f"{out} exists already; remove it, or name another folder with --out.")
    if target.method is None:
        if request.options:
            raise ModelError(f"{target.name} has no options, got {' '.join(request.options)}.")
        return Job(target, out, _base(target, request))
    method = resolve_method(target.method)
    options = parse_options(method, request.options)
    need = method.calibration(options)
    own = str(places.recipe) if places.recipe else None
    calibration = None
    if need == "required":
        calibration = request.calibration or own
        if calibration is None:
            raise DataError(
                f"{target.name} is calibrated on text, and this adapter belongs to no run whose "
                "training rows could be taken; name some with --calibration."
            )
    elif need == "optional":
        calibration = request.calibration or (own if target.wants_original else None)
    is_needed = need == "required" or request.calibration is not None
    return Job(
        target,
        out,
        _base(target, request),
        method,
        options,
        calibration,
        is_calibration_needed=is_needed,
    )


def _base(target: Target, request: ExportRequest) -> MergeBase | None:
    if not target.takes_base:
        return None
    is_chosen_anew = target.wants_original or not target.is_of_merge
    return request.base or ("auto" if is_chosen_anew else request.merge.base)


def make_way(request: ExportRequest, places: Places) -> None:
    """Remove what an attempt that did not end has left where these exports go.

    First out of sight, so that half an export never stands under its name.
    """
    taken = [places.exports / target.folder_name for target in request.targets]
    taken += [places.merge(base) for base in ("dequantized", "original")]
    for folder in taken:
        if folder.exists():
            aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.draft")
            folder.rename(aside)
            shutil.rmtree(aside)


def placed(job: Job, trained: TrainedAdapter, reporter: Reporter) -> Job:
    """The job with the base that its merge has to have; says so where that is a poor one.

    Raises:
        AdapterError, ModelError: the adapter is none that can be made so.
    """
    if job.target.name == ADAPTER_FOR_VLLM:
        require_vllm(trained.folder)
    if job.target.maker == "lora-gguf":
        from qlora_kit.quantize.gguf.lora import require_expressible

        require_expressible(trained.folder)
    if job.base is None:
        return job
    base = job.target.base_of(trained.bases, job.base)
    has_choice = len(trained.bases) > 1 and trained.aware is None
    if job.base == "auto" and job.target.is_made_of_both and has_choice:
        return replace(job, base=base, or_else="dequantized")
    if base != "auto":
        trained.require_base(base)
    if job.target.wants_original and base != "original":
        why = "was asked for" if base == job.base == "dequantized" else "is all that is there"
        reporter.warn(
            f"{job.target.name} is made from the dequantized merge, which {why}: weights that were "
            "rounded to 4 bits once are rounded again on another grid, and much of the adapter is "
            "lost."
        )
    return replace(job, base=base)


def require_vllm(adapter: Path) -> None:
    """
    Raises:
        AdapterError: vLLM would refuse it, or compute something else; says why.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    faults = list(faults_of_config(config))
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise AdapterError(
            f"vLLM cannot serve the adapter {adapter}:\n{listed}\n"
            "Export the merged model instead (--to merged)."
        )
