"""Processes of a launch that hold different bases are told."""

from __future__ import annotations

import pytest

from qlora_kit.errors import ModelError
from qlora_kit.model.shared import require_same_base


def test_other_weights_on_another_process_are_refused() -> None:
    require_same_base(["a", "a"])
    with pytest.raises(ModelError, match="processes 1, 2 hold other base weights"):
        require_same_base(["a", "b", "b"])
