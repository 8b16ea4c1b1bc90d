"""What every section of a recipe has in common."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from qlora_kit.errors import Fault


class Spec(BaseModel):
    """A frozen section: unknown keys are refused, the docstring under a field describes it.

    Those docstrings become the JSON schema that editors complete from, so one text serves
    the code, the docs and the editor.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def contradictions(self) -> Iterator[Fault]:
        """Faults between fields of this section; paths are relative to it."""
        return iter(())
