"""llmcompressor's AWQ where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


class _UnpinnedCache(IntermediatesCache):  # type: ignore[misc]
    """Inputs that stay where they are."""

    def pin_memory(self, batch_index: int, input_names: list[str] | None = None) -> None:
        """Nothing: only a GPU's driver can pin memory."""


class CpuAwqModifier(AWQModifier):  # type: ignore[misc]
    """llmcompressor 0.14 pins what its search reads again and again in memory, for the sake of a
    GPU, and fails where there is none.
    """

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
        super().on_calibration_start(state, event, **kwargs)
        for module, cache in tuple(self._parent_args_cache.items()):
            self._parent_args_cache[module] = _UnpinnedCache(None, cache.offload_device)


def awq_modifier(**options: Any) -> AWQModifier:
    """The one that this machine can run."""
    kind = AWQModifier if torch.cuda.is_available() else CpuAwqModifier
    return kind(**options)
