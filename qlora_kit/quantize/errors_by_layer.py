"""How far each layer's weights are from what they were, found out while they are quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qlora_kit.report.reporter import Progress

OnLayer = Callable[[str, "torch.Tensor", "torch.Tensor"], None]
"""(name of the parameter, weight as it was, weight as it is now), called after each layer; both of
shape (out, in), the second in float32."""


@dataclass
class Layers:
    """Relative errors ‖W - Ŵ‖ / ‖W‖ by the layer's full name."""

    errors: dict[str, float] = field(default_factory=dict)

    def watch(self, progress: Progress) -> OnLayer:
        """A plain function: transformers copies a configuration deeply, and what it holds."""

        def on_layer(name: str, was: torch.Tensor, now: torch.Tensor) -> None:
            self.errors[name.removesuffix(".weight")] = relative_error(was, now)
            progress.update()

        return on_layer

    def findings(self) -> dict[str, Any]:
        """For the certificate."""
        mean = sum(self.errors.values()) / len(self.errors)
        return {
            "num_layers": len(self.errors),
            "weight_error": {"mean": mean, "layers": dict(self.errors)},
        }

    def notes(self) -> tuple[str, ...]:
        worst = max(self.errors, key=lambda name: self.errors[name])
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"{len(self.errors)} layers; relative error of their weights {mean:.4f} on average, "
            f"{self.errors[worst]:.4f} in {worst}",
        )


def relative_error(was: torch.Tensor, now: torch.Tensor) -> float:
    """‖W - Ŵ‖ / ‖W‖ in float32; 0 where W is 0."""
    norm = float(was.float().norm())
    return float((was.float() - now).norm()) / norm if norm else 0.0
