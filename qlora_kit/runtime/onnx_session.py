"""A graph that ONNX Runtime runs, step by step: token ids in, logits and the cache out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_kit.environment import available_cpus
from qlora_kit.errors import ModelError
from qlora_kit.extras import require_extra
from qlora_kit.model.reason import reason_of

_PAST = "past_key_values."
_PRESENT = "present."
_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class Past:
    """What the graph remembers of a batch: for each of its inputs a tensor of ONNX Runtime's, and
    which of the tokens so far are padding, (rows, tokens)."""

    cache: dict[str, Any]
    mask: np.ndarray


@dataclass(frozen=True)
class Step:
    """float32 logits of shape (rows, new tokens, vocabulary); `past` for the step after."""

    logits: np.ndarray
    past: Past


def _load_errors() -> tuple[type[BaseException], ...]:
    """onnxruntime's own classes have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    return (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.InvalidProtobuf,
        states.NoSuchFile,
        states.NotImplemented,
        states.RuntimeException,
        RuntimeError,
    )


class OnnxSession:
    """One loaded graph. Its names are those of `quantize/onnx/graph.py`, and of Optimum.

    Raises:
        ModelError: the file cannot be loaded, or is no such graph.
    """

    def __init__(self, path: Path):
        require_extra("onnx", f"{path.name}")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(torch.get_num_threads(), available_cpus())
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait for the next product without sleeping take a core from others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDER])
        except _load_errors() as error:
            raise ModelError(f"{path} cannot be loaded: {reason_of(error)}") from error
        self._tensor = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = {one.name: one.shape for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._caches = [name for name in self._inputs if name.startswith(_PAST)]
        shapes = {one.name: one.shape for one in self._session.get_outputs()}
        if "input_ids" not in self._inputs or "logits" not in shapes:
            raise ModelError(
                f"{path} is no causal language model: it takes {', '.join(self._inputs)} and gives "
                f"{', '.join(shapes)}."
            )
        self.vocab_size = int(shapes["logits"][-1])

    @property
    def has_cache(self) -> bool:
        return bool(self._caches)

    def run(
        self, ids: np.ndarray, past: Past | None = None, mask: np.ndarray | None = None
    ) -> Step:
        """One step over new tokens `ids`, (rows, tokens). `mask` is 0 where they are padding."""
        mask = np.ones_like(ids) if mask is None else mask
        past = self._nothing(len(ids)) if past is None else past
        whole = np.concatenate([past.mask, mask], axis=1)
        places = np.maximum(whole.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": whole, "position_ids": places}
        feeds = {
            name: self._tensor(np.ascontiguousarray(array, dtype=np.int64))
            for name, array in given.items()
            if name in self._inputs
        }
        found = self._session.run_with_ort_values(self._outputs, {**feeds, **past.cache})
        named = dict(zip(self._outputs, found, strict=True))
        cache = {name: named[name.replace(_PAST, _PRESENT, 1)] for name in self._caches}
        return Step(named["logits"].numpy(), Past(cache, whole))

    def _nothing(self, rows: int) -> Past:
        """A past of no tokens."""
        cache = {
            name: self._tensor(np.zeros((rows, shape[1], 0, shape[3]), dtype=np.float32))
            for name, shape in ((name, self._inputs[name]) for name in self._caches)
        }
        return Past(cache, np.zeros((rows, 0), dtype=np.int64))
