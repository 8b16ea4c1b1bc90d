"""YAML as recipes use it: `2e-4` is a number, a duplicate key is a fault, dates stay text.

Anchors, aliases and merge keys (`<<`) work; `on`, `off`, `yes` and `no` are booleans, as YAML 1.1
and PyYAML have it. A file is looked at as nodes before any value is made of it, so that neither a
bomb of aliases nor a tag can do harm, and every duplicate key is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from qlora_kit.errors import Fault, RecipeError

MAX_DEPTH = 20
MAX_VALUES = 20_000
_MAX_INTEGER_DIGITS = 18

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_SCALAR_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
_COLLECTION_TAGS = {_TAG + "map", _TAG + "seq"}

# What a user can do about PyYAML's commonest complaints, by a piece of its text.
_SYNTAX_HINTS = {
    r"'\t'": "indent with spaces, not tabs",
    "cannot start any token": "put the value in quotes",
    "mapping values are not allowed here": "put text that holds ': ' in quotes, or mind the indent",
    "could not find expected ':'": "a key is followed by a colon and a space",
    "another document": "a recipe is one document; remove what follows the ---",
    "<stream end>": "close the bracket",
    "end of stream": "close the quote",
    "<block end>": "indent the keys of one section alike, by spaces",
    "undefined alias": "put text that starts with * in quotes",
    "special characters are not allowed": "remove the control character",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less YAML 1.1's surprises, and with a limit on its depth."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "is nested too deeply", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# Resolvers are tried by first character. Sexagesimal integers (1:30), dates and a lone `=` are
# text here; a float needs no dot.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix(_TAG) not in ("timestamp", "float", "int", "value")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))  # decimal, even with a 0 first


_Loader.add_constructor(_TAG + "int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes what either PyYAML or this module would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document into plain values that share nothing; an empty one is None.

    Raises:
        RecipeError: it does not parse, a key stands twice, or it is no plain data; each fault
            with its line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        faults = list(_Inspection(loader).faults(node))
        if faults:
            raise RecipeError(source, faults)
        return _unshared(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        raise RecipeError(source, [_syntax_fault(error)]) from None
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise RecipeError(source, [Fault("", problem, _syntax_hint(str(error)))]) from None


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Inspection:
    """A walk over the nodes of a document, every alias followed."""

    def __init__(self, loader: _Loader):
        self._loader = loader
        self._num_values = 0
        self._seen: set[int] = set()
        self._above: list[int] = []

    def faults(self, node: yaml.Node, path: str = "") -> Iterator[Fault]:
        """Faults of a node and all below it; one that an alias repeats is reported once."""
        self._num_values += 1
        line = f"line {node.start_mark.line + 1}: "
        if id(node) in self._above:
            yield Fault(path, f"{line}an alias (*) leads back into itself", "remove it")
            return
        if len(self._above) == MAX_DEPTH:
            yield Fault("", f"{line}is nested too deeply", "write the aliases (*) out")
            return
        if self._num_values == MAX_VALUES:
            message = f"aliases (*) blow this up to more than {MAX_VALUES:,} values"
            yield Fault("", message, "write the recipe out")
        if self._num_values >= MAX_VALUES:
            return
        is_new = id(node) not in self._seen
        self._seen.add(id(node))
        self._above.append(id(node))
        if isinstance(node, yaml.MappingNode):
            if is_new:
                yield from _key_faults(node, path)
            for key_node, value_node in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                yield from self.faults(value_node, _join(path, key))
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                yield from self.faults(item, _join(path, str(number)))
        elif is_new:
            message = self._scalar_problem(node)
            if message:
                yield Fault(path, line + message)
        self._above.pop()
        if is_new and node.tag not in _SCALAR_TAGS | _COLLECTION_TAGS:
            tag = node.tag.replace(_TAG, "!!")
            yield Fault(path, f"{line}the tag {tag} means nothing here", "write a plain value")

    def _scalar_problem(self, node: yaml.Node) -> str:
        value = str(node.value)
        if any("\ud800" <= character <= "\udfff" for character in value):
            return "holds half of a surrogate pair, which is not a character"
        if "\0" in value:
            return "holds a NUL character"
        plain_tag = self._loader.resolve(  # type: ignore[no-untyped-call]
            yaml.ScalarNode, value, (True, False)
        )
        is_tagged_float = node.tag == _TAG + "float" and plain_tag == _TAG + "int"
        if node.tag in _SCALAR_TAGS - {_TAG + "str", plain_tag} and not is_tagged_float:
            return f"{value!r} is tagged as {node.tag.removeprefix(_TAG)}, which it is not"
        num_digits = sum(character.isdigit() for character in value)
        if node.tag == _TAG + "int" and num_digits > _MAX_INTEGER_DIGITS:
            return f"a whole number of {num_digits} digits is out of range"
        return ""


def _key_faults(node: yaml.MappingNode, path: str) -> Iterator[Fault]:
    first_lines: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            yield Fault(path, f"line {line}: a key must be text, got a list or mapping")
            continue
        key = key_node.value
        if key_node.tag not in (_TAG + "str", _TAG + "merge"):
            yield Fault(_join(path, key), f"line {line}: the key {key} is not text", "quote it")
        elif key in first_lines:
            message = f"line {line}: already set on line {first_lines[key]}"
            yield Fault(_join(path, key), message, "remove one of them")
        first_lines.setdefault(key, line)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unshared(value: Any) -> Any:
    """A copy in which aliases are separate values, so that changing one changes no other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = error.problem or error.context or "does not parse"
    return Fault("", where + problem.removeprefix("but "), _syntax_hint(problem))


def _syntax_hint(problem: str) -> str:
    return next((hint for piece, hint in _SYNTAX_HINTS.items() if piece in problem), "")
