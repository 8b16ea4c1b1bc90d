"""What every section of a recipe has in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel, ConfigDict

from qlora_kit.errors import Fault


class Spec(BaseModel):
    """A frozen section: unknown keys are refused, the docstring under a field describes it.

    Those docstrings become the JSON schema that editors complete from (`schema.py`), so one
    text serves the code, the docs and the editor.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,  # so that a default of 32 for a float is 32.0, as when written out
        protected_namespaces=(),
    )

    def contradictions(self) -> Iterator[Fault]:
        """Faults between fields of this section; paths are relative to it."""
        return iter(())


def without_effect(spec: Spec, names: Iterable[str], why: str, hint: str) -> Iterator[Fault]:
    """A fault for each of these options that was given a value other than its default."""
    for name in names:
        if getattr(spec, name) != type(spec).model_fields[name].get_default():
            yield Fault(name, f"has no effect {why}", hint)


def all_contradictions(spec: Spec, path: str = "") -> Iterator[Fault]:
    """Contradictions of a section and of the sections in it; `path` leads to `spec`."""
    prefix = f"{path}." if path else ""
    for fault in spec.contradictions():
        yield Fault(prefix + fault.path, fault.message, fault.hint)
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from all_contradictions(value, prefix + name)
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if isinstance(item, Spec):
                    yield from all_contradictions(item, f"{prefix}{name}.{number}")
