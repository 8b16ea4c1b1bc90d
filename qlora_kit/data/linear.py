"""Whether a chat template only writes what messages say, or looks into it.

Most templates decide by roles and positions alone and copy the contents through. For such a one
all conversations of the same roles render alike but for the contents, so one rendering serves
them all (`skeleton.py`). That it is such a one is proved from its syntax tree: contents may be
written, trimmed, joined to other text, kept in variables, and asked whether they are there; any
other use makes the template not linear, and each conversation is then rendered by itself.

The proof takes each content to be text that is not blank, and messages to have no other fields
than role and content.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

from jinja2 import nodes


class Kind(Enum):
    """What an expression may carry of the conversation."""

    CLEAN = 0
    """Nothing that a content decides."""
    CONTENT = 1
    """Contents, whole or trimmed, joined with other text; or text without any."""
    MESSAGE = 2
    MESSAGES = 3


class _NotLinearError(Exception):
    """The template looks into a content, or may."""


# What these tests say of any text that is not blank.
_TESTS_OF_TEXT = {
    "string": True,
    "defined": True,
    "undefined": False,
    "none": False,
    "mapping": False,
    "number": False,
    "iterable": True,
    "sequence": True,
}
_TESTS_OF_MESSAGES = ("defined", "undefined", "none", "mapping", "iterable", "sequence", "string")
_TRIMS = ("trim", "strip")


@lru_cache(maxsize=8)
def is_linear(template: str) -> bool:
    """Whether the contents of messages decide nothing but the text that is written for them."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    analysis = _Analysis()
    try:
        known: dict[str, Kind] = {}
        while True:  # variables are assigned in loops: until nothing new is learned
            analysis.block(tree.body)
            if analysis.variables == known:
                return True
            known = dict(analysis.variables)
    except _NotLinearError:
        return False


class _Analysis:
    """Kinds of all expressions in a template; raises _NotLinearError where a content decides."""

    def __init__(self) -> None:
        self.variables: dict[str, Kind] = {"messages": Kind.MESSAGES}

    def block(self, body: list[nodes.Node]) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Output):
            for one in node.nodes:
                self.written(one)
        elif isinstance(node, nodes.If):
            self.branches(node)
        elif isinstance(node, nodes.For):
            self.loop(node)
        elif isinstance(node, nodes.Assign):
            self.assign(node.target, self.kind(node.node))
        elif isinstance(node, nodes.CallBlock) and isinstance(
            node.call.node, nodes.ExtensionAttribute
        ):
            self.block(node.body)  # {% generation %}
        elif isinstance(node, nodes.Macro):
            self.macro(node)
        elif not isinstance(node, nodes.Continue | nodes.Break):
            raise _NotLinearError

    def written(self, node: nodes.Expr) -> None:
        if self.kind(node) not in (Kind.CLEAN, Kind.CONTENT):
            raise _NotLinearError

    def branches(self, node: nodes.If) -> None:
        """What can be reached: a test that holds for every text hides what follows it."""
        arms = [(node.test, node.body), *((one.test, one.body) for one in node.elif_)]
        for test, body in arms:
            truth = self.truth(test)
            if truth is not False:
                self.block(body)
            if truth is True:
                return
        self.block(node.else_)

    def loop(self, node: nodes.For) -> None:
        kind = self.kind(node.iter)
        if kind in (Kind.CONTENT, Kind.MESSAGE) or node.recursive:
            raise _NotLinearError
        self.assign(node.target, Kind.MESSAGE if kind is Kind.MESSAGES else Kind.CLEAN)
        if node.test is not None:
            self.truth(node.test)
        self.block(node.body)
        self.block(node.else_)

    def macro(self, node: nodes.Macro) -> None:
        """A macro that is given, and writes, nothing of a conversation."""
        for argument in node.args:
            self.assign(argument, Kind.CLEAN)
        for output in node.find_all(nodes.Output):
            if any(self.kind(one) is not Kind.CLEAN for one in output.nodes):
                raise _NotLinearError
        self.block(node.body)

    def assign(self, target: nodes.Node, kind: Kind) -> None:
        if isinstance(target, nodes.Name):
            name = target.name
        elif isinstance(target, nodes.NSRef):
            name = f"{target.name}.{target.attr}"
        elif kind is Kind.CLEAN:
            return
        else:
            raise _NotLinearError
        self.variables[name] = _joined(self.variables.get(name, Kind.CLEAN), kind)

    def kind(self, node: nodes.Node | None) -> Kind:
        if node is None or isinstance(node, nodes.Literal):
            return self.contained(node)
        if isinstance(node, nodes.Name):
            return self.variables.get(node.name, Kind.CLEAN)
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return self.part(node)
        if isinstance(node, nodes.Filter):
            return self.filtered(node)
        if isinstance(node, nodes.Call):
            return self.called(node)
        if isinstance(node, nodes.Add | nodes.Concat):
            parts = [node.left, node.right] if isinstance(node, nodes.Add) else node.nodes
            kinds = [self.kind(one) for one in parts]
            if any(kind in (Kind.MESSAGE, Kind.MESSAGES) for kind in kinds):
                raise _NotLinearError
            return Kind.CONTENT if Kind.CONTENT in kinds else Kind.CLEAN
        if isinstance(node, nodes.CondExpr):
            return self.chosen(node)
        if isinstance(node, nodes.And | nodes.Or):
            self.truth(node.left)
            return _joined(self.kind(node.left), self.kind(node.right))
        if isinstance(node, nodes.Not | nodes.Test):
            self.truth(node)
            return Kind.CLEAN
        for child in node.iter_child_nodes():  # comparisons, arithmetic, slices, …
            self.clean(child)
        return Kind.CLEAN

    def contained(self, node: nodes.Node | None) -> Kind:
        for child in node.iter_child_nodes() if node is not None else ():
            self.clean(child)
        return Kind.CLEAN

    def clean(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.Operand | nodes.Pair | nodes.Keyword):
            for child in node.iter_child_nodes():
                self.clean(child)
        elif self.kind(node) is not Kind.CLEAN:
            raise _NotLinearError

    def part(self, node: nodes.Getattr | nodes.Getitem) -> Kind:
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            if node.node.name == "loop":
                return Kind.MESSAGE if node.attr in ("previtem", "nextitem") else Kind.CLEAN
            name = f"{node.node.name}.{node.attr}"
            if name in self.variables:
                return self.variables[name]
        whole = self.kind(node.node)
        if whole is Kind.MESSAGE:
            return self.field(node.attr if isinstance(node, nodes.Getattr) else node.arg)
        if whole is Kind.MESSAGES and isinstance(node, nodes.Getitem):
            self.contained(node.arg)
            return Kind.MESSAGES if isinstance(node.arg, nodes.Slice) else Kind.MESSAGE
        if whole is not Kind.CLEAN:
            raise _NotLinearError
        if isinstance(node, nodes.Getitem):
            self.clean(node.arg)
        return Kind.CLEAN

    def field(self, name: str | nodes.Node) -> Kind:
        if isinstance(name, nodes.Const):
            name = name.value
        if not isinstance(name, str):
            raise _NotLinearError
        return Kind.CONTENT if name == "content" else Kind.CLEAN

    def filtered(self, node: nodes.Filter) -> Kind:
        kind = self.kind(node.node)
        for child in (*node.args, *node.kwargs):
            self.clean(child)
        if kind is Kind.CONTENT and node.name == "trim" and not node.args and not node.kwargs:
            return Kind.CONTENT
        if kind is Kind.MESSAGES and node.name in ("length", "count"):
            return Kind.CLEAN
        if kind is not Kind.CLEAN:
            raise _NotLinearError
        return Kind.CLEAN

    def called(self, node: nodes.Call) -> Kind:
        for child in (*node.args, *node.kwargs):
            self.clean(child)
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _NotLinearError
        if isinstance(node.node, nodes.Getattr):
            kind = self.kind(node.node.node)
            if kind is Kind.CONTENT and node.node.attr == "strip" and not node.args:
                return Kind.CONTENT
            if kind is Kind.MESSAGE and node.node.attr == "get" and len(node.args) == 1:
                return self.field(node.args[0])
            if kind is not Kind.CLEAN:
                raise _NotLinearError
            return Kind.CLEAN
        if isinstance(node.node, nodes.Name) and node.node.name == "namespace":
            return Kind.CLEAN
        self.clean(node.node)
        return Kind.CLEAN

    def chosen(self, node: nodes.CondExpr) -> Kind:
        truth = self.truth(node.test)
        kinds = [] if truth is False else [self.kind(node.expr1)]
        if truth is not True and node.expr2 is not None:
            kinds.append(self.kind(node.expr2))
        return _joined(*kinds)

    def truth(self, node: nodes.Node) -> bool | None:
        """What a condition comes to for every text, where that can be said; its parts checked."""
        if isinstance(node, nodes.Not):
            inner = self.truth(node.node)
            return None if inner is None else not inner
        if isinstance(node, nodes.And | nodes.Or):
            deciding = isinstance(node, nodes.Or)
            left = self.truth(node.left)
            if left is deciding:
                return deciding
            right = self.truth(node.right)
            return right if left is (not deciding) else deciding if right is deciding else None
        if isinstance(node, nodes.Test):
            return self.test(node)
        self.kind(node)  # a content that is there at all is true for every text, by roles alone
        return None

    def test(self, node: nodes.Test) -> bool | None:
        for child in (*node.args, *node.kwargs):
            self.clean(child)
        kind = self.kind(node.node)
        if kind is Kind.CONTENT:
            if node.name not in _TESTS_OF_TEXT:
                raise _NotLinearError
            is_plain = isinstance(node.node, nodes.Getattr | nodes.Getitem)
            return _TESTS_OF_TEXT[node.name] if is_plain else None
        if kind is not Kind.CLEAN and node.name not in _TESTS_OF_MESSAGES:
            raise _NotLinearError
        return None


def _joined(*kinds: Kind) -> Kind:
    """What something is that may be any of these."""
    found = {kind for kind in kinds if kind is not Kind.CLEAN}
    if not found:
        return Kind.CLEAN
    if len(found) > 1:
        raise _NotLinearError
    return found.pop()
