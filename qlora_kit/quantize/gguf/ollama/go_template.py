"""As much of Go's text/template as a chat template in a Modelfile needs.

A Modelfile's template is written here and has to say what the trained Jinja template says, so it
is rendered here as well. https://pkg.go.dev/text/template
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\d+|:=|[=(),]|[$.]?[\w.$]+|\.')
_SPACE = " \t\r\n"


class GoTemplateError(ValueError):
    """Not in the part of the language that is known here."""


@dataclass(frozen=True)
class _Node:
    """A text, an action, or a block with branches: (condition, body) pairs, an empty condition
    being `else`. For a range, the condition holds what follows the keyword."""

    kind: str
    value: str = ""
    branches: tuple[tuple[str, tuple[_Node, ...]], ...] = ()


def render(template: str, data: dict[str, Any]) -> str:
    """Execute a template; `data` is the dot.

    Raises:
        GoTemplateError: it is not in the part of the language that is known here.
    """
    tokens = list(_split(template))
    nodes, rest = _parse(tokens, 0, ())
    if rest != len(tokens):
        raise GoTemplateError(f"an unexpected {tokens[rest][1]!r}")
    written: list[str] = []
    _Scope(data, data, {}).run(nodes, written)
    return "".join(written)


def quoted(text: str) -> str:
    """Text as a Go string; the escapes of JSON are among those of Go."""
    return json.dumps(text, ensure_ascii=False)


def _split(template: str) -> Iterator[tuple[str, str]]:
    """Texts and actions; `{{-` and `-}}` take the blanks beside them away."""
    at = 0
    trims = False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(_SPACE) if trims else text
        text = text.rstrip(_SPACE) if match[1] else text
        if text:
            yield "text", text
        if not match[2].strip().startswith("/*"):
            yield "action", match[2].strip()
        at, trims = match.end(), bool(match[3])
    text = template[at:]
    text = text.lstrip(_SPACE) if trims else text
    if "{{" in text:
        raise GoTemplateError("an action that does not end")
    if text:
        yield "text", text


def _parse(
    tokens: Sequence[tuple[str, str]], at: int, ends: tuple[str, ...]
) -> tuple[tuple[_Node, ...], int]:
    """Nodes up to one of the keywords in `ends`, and where that stands."""
    nodes: list[_Node] = []
    while at < len(tokens):
        kind, value = tokens[at]
        keyword = value.partition(" ")[0] if kind == "action" else ""
        if keyword in ends:
            break
        if keyword in ("if", "range"):
            node, at = _block(tokens, at, keyword)
            nodes.append(node)
            continue
        nodes.append(_Node(kind, value))
        at += 1
    return tuple(nodes), at


def _block(tokens: Sequence[tuple[str, str]], at: int, keyword: str) -> tuple[_Node, int]:
    branches: list[tuple[str, tuple[_Node, ...]]] = []
    condition = tokens[at][1].partition(" ")[2]
    while True:
        body, at = _parse(tokens, at + 1, ("else", "end"))
        branches.append((condition, body))
        if at >= len(tokens):
            raise GoTemplateError(f"{keyword} without end")
        closing = tokens[at][1]
        if closing == "end":
            return _Node(keyword, branches=tuple(branches)), at + 1
        condition = closing.removeprefix("else").strip().removeprefix("if").strip()


class _Scope:
    """The dot and the variables of one place."""

    def __init__(self, root: Any, dot: Any, variables: dict[str, Any]):
        self.root = root
        self.dot = dot
        self.variables = variables

    def run(self, nodes: Sequence[_Node], written: list[str]) -> None:
        for node in nodes:
            if node.kind == "text":
                written.append(node.value)
            elif node.kind == "action":
                self.action(node.value, written)
            elif node.kind == "if":
                self.condition(node, written)
            else:
                self.range(node, written)

    def action(self, text: str, written: list[str]) -> None:
        name, sign, value = (part.strip() for part in text.partition(":="))
        if not sign and re.match(r"\$\w+ *=", text):
            name, sign, value = (part.strip() for part in text.partition("="))
        if sign:
            self.variables[name] = self.value(value)
            return
        written.append(str(self.value(text)))

    def condition(self, node: _Node, written: list[str]) -> None:
        for test, body in node.branches:
            if not test or self.value(test):
                self.run(body, written)
                return

    def range(self, node: _Node, written: list[str]) -> None:
        head, body = node.branches[0]
        names, sign, over = (part.strip() for part in head.partition(":="))
        items = self.value(over if sign else head)
        for number, item in enumerate(items):
            own = [name.strip() for name in names.split(",")] if sign else []
            inner = _Scope(self.root, item, self.variables)
            if own:
                inner.variables[own[0]] = number if len(own) == 2 else item
            if len(own) == 2:
                inner.variables[own[1]] = item
            inner.run(body, written)

    def value(self, expression: str) -> Any:
        tokens = _TOKEN.findall(expression)
        if "".join(tokens).replace(" ", "") != expression.replace(" ", ""):
            blank = '"' in expression  # blanks inside a string were taken away above
            if not blank or len(re.sub(_TOKEN, "", expression).strip()):
                raise GoTemplateError(f"{expression!r} is not known here")
        value, rest = self.call(tokens, 0)
        if rest != len(tokens):
            raise GoTemplateError(f"{expression!r} is not known here")
        return value

    def call(self, tokens: Sequence[str], at: int) -> tuple[Any, int]:
        """A function and its arguments, or one value."""
        if at < len(tokens) and tokens[at] in _FUNCTIONS:
            arguments: list[Any] = []
            function = _FUNCTIONS[tokens[at]]
            at += 1
            while at < len(tokens) and tokens[at] != ")":
                value, at = self.one(tokens, at)
                arguments.append(value)
            return function(*arguments), at
        return self.one(tokens, at)

    def one(self, tokens: Sequence[str], at: int) -> tuple[Any, int]:
        token = tokens[at]
        if token == "(":
            value, at = self.call(tokens, at + 1)
            if at >= len(tokens) or tokens[at] != ")":
                raise GoTemplateError("a bracket that does not close")
            return value, at + 1
        if token.startswith('"'):
            return json.loads(token), at + 1
        if token.isdigit():
            return int(token), at + 1
        if token in ("true", "false"):
            return token == "true", at + 1
        return self.field(token), at + 1

    def field(self, token: str) -> Any:
        name, *path = token.split(".")
        if not name:
            value = self.dot
        elif name == "$":
            value = self.root
        elif name in self.variables:
            value = self.variables[name]
        else:
            raise GoTemplateError(f"{token!r} is not known here")
        for key in path:
            if key:
                value = value[key]
        return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda value, start=0, end=None: value[start:end],
}
