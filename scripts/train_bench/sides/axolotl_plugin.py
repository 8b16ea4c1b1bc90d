"""The plugin by which Axolotl lets its training be watched. Imported by Axolotl, by its name."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from train_bench.told import Told, trainer_clock

TOLD = Told()


class Watching(BasePlugin):
    """Adds the clock to the trainer."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The clock, which fills in `TOLD`."""
        return [trainer_clock(TOLD)]
