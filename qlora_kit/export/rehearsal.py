"""Whether an export can be made, found out before anything is merged.

A method looks at a model's configuration, tokenizer and shapes. The merge's are known before it
is there, so they are laid out without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.export.jobs import Job
from qlora_kit.export.makers import Ingredients, calibration_of
from qlora_kit.export.surroundings import save_config, save_generation_config, save_tokenizer
from qlora_kit.model.base import num_embeddings
from qlora_kit.quantize.method import Source
from qlora_kit.quantize.quantize import try_beforehand

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.export.trained import TrainedAdapter


def rehearse(jobs: Sequence[Job], given: Ingredients, folder: Path) -> int:
    """Run every method's checks, and return the bytes that all of them need.

    Raises:
        QloraKitError: a method, or the library that it calls, cannot take this model, or
            calibration text is missing or too short; says why.
    """
    methods = [job for job in jobs if job.method is not None]
    if not methods:
        return 0
    source = expected_source(given.trained, folder, given.hardware)
    needed = 0
    for job in methods:
        assert job.method is not None
        assert job.options is not None
        job.method.check(source, job.options)
        needed += job.method.predict_bytes(source, job.options)
        if job.is_calibration_needed:
            calibration_of(job, source, given)
        try_beforehand(job.method, source, job.options, given.reporter)
    return needed


def expected_source(trained: TrainedAdapter, folder: Path, hardware: Hardware) -> Source:
    """The merged model, without its weights."""
    folder.mkdir(parents=True)
    model = trained.skeleton.model
    dtype = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else torch.float32
    num_rows = max(num_embeddings(model), len(trained.tokenizer))
    save_config(model.config, folder, dtype=dtype, num_rows=num_rows)
    end = trained.tokenizer.eos_token_id
    save_generation_config(trained.source.folder, model.config, end, folder)
    save_tokenizer(trained.tokenizer, folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Source(
        name=trained.source.name,
        folder=folder,
        skeleton=trained.skeleton,
        tokenizer=trained.tokenizer,
        dtype=dtype,
        fingerprint="",
        stored_bytes=num_parameters * dtype.itemsize,
        hardware=hardware,
        allow_pickle=trained.allow_pickle,
        trust_remote_code=trained.trust_remote_code,
    )
