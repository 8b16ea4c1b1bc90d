"""YAML as recipes use it: `2e-4` is a number, a duplicate key is a fault, dates stay text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import Fault, RecipeError

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less YAML 1.1's surprises."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str):
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: key {key!r} is not text; quote it", None
                )
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"line {line}: key '{key}' is already set on line {seen[key]}",
                    None,
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


# Resolvers are tried by first character. Sexagesimal integers (1:30) and dates are text here;
# a float needs no dot.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag
        not in (
            "tag:yaml.org,2002:timestamp",
            "tag:yaml.org,2002:float",
            "tag:yaml.org,2002:int",
        )
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(
        str(loader.construct_scalar(node)).replace("_", "")
    )  # decimal, even with a 0 first


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        RecipeError: it does not parse, or a key stands twice; with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(source, [Fault("", f"{where}{error.problem}")]) from error
    except yaml.YAMLError as error:
        raise RecipeError(source, [Fault("", f"not YAML: {error}")]) from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(
            source, [Fault("", f"not readable as YAML: {error}")]
        ) from error


def read_text(path: Path) -> str:
    """The file as text.

    Raises:
        RecipeError: it is missing, unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(path.parent.glob("*.yaml"))[:5] if path.parent.is_dir() else []
        hint = "there is " + ", ".join(str(other) for other in near) if near else ""
        hint = hint or "`qlora-kit recipes` lists the recipes that come with the kit"
        raise RecipeError(str(path), [Fault("", "no such file", hint)]) from None
    except IsADirectoryError:
        raise RecipeError(
            str(path), [Fault("", "is a folder, not a recipe file")]
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            str(path), [Fault("", f"is not UTF-8 text: {error.reason}")]
        ) from None
    except OSError as error:
        raise RecipeError(
            str(path), [Fault("", f"cannot be read: {error.strerror}")]
        ) from None


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back as the same values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
