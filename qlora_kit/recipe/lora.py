"""`lora:` the adapter that is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec

Name = Annotated[str, Field(min_length=1)]


class LoraSpec(Spec):
    """A low-rank update, scaled by alpha / r (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(default=16, gt=0)
    """Rank of the update."""

    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with use_rslora)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input during training."""

    target_modules: Name | tuple[Name, ...] = "all-linear"
    """`all-linear` (every linear layer but the head and expert routers), a list of module
    names, or a regular expression over full names."""

    exclude_modules: tuple[Name, ...] = ()
    """Modules to leave out of target_modules."""

    use_rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(r) (arXiv:2312.03732)."""

    use_dora: bool = False
    """Train magnitude and direction apart, DoRA (arXiv:2402.09353). Slower per step."""

    rank_pattern: dict[Name, PositiveInt] = Field(default_factory=dict)
    """Rank by module name or regular expression, where it differs from r."""

    alpha_pattern: dict[Name, PositiveFloat] = Field(default_factory=dict)
    """Alpha by module name or regular expression, where it differs from alpha."""

    modules_to_save: tuple[Name, ...] = ()
    """Unquantized modules trained in full and saved with the adapter, such as `lm_head`."""

    init: Literal["default", "gaussian", "pissa", "loftq"] = "default"
    """How A and B start. `loftq` fits them to the error of the quantized base, computed from the
    16-bit weights. `pissa` is refused: it moves part of the base into the adapter, which a
    quantized base cannot give, and the adapter alone would then fit no base at all."""

    new_tokens: tuple[Name, ...] = ()
    """Tokens to add to the vocabulary; only their embedding rows are trained."""

    def contradictions(self) -> Iterator[Fault]:
        yield from self._pattern_faults()
        if self.init == "pissa":
            yield Fault(
                "init",
                "pissa rewrites the base, and a quantized one cannot be rewritten",
                "use loftq, which leaves the base as it is",
            )
        if self.use_dora and self.init == "loftq":
            yield Fault("init", f"{self.init} does not go with use_dora", "use init: default")
        repeated = sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1})
        if repeated:
            yield Fault("new_tokens", f"named twice: {', '.join(repeated)}", "name each once")
        if any(not token.strip() for token in self.new_tokens):
            yield Fault("new_tokens", "a token is only white space", "remove it")
        embeddings = {"embed_tokens", "wte"} & set(self.modules_to_save)
        if self.new_tokens and embeddings:
            yield Fault(
                "new_tokens",
                f"modules_to_save already trains all of {sorted(embeddings)[0]}",
                "drop one of the two",
            )

    def _pattern_faults(self) -> Iterator[Fault]:
        """PEFT matches text in target_modules against full names, keys of patterns at their end."""
        if self.target_modules == ():
            yield Fault("target_modules", "must name at least one module", "try all-linear")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            yield from _regex_faults("target_modules", self.target_modules)
            if re.fullmatch(r"\w+", self.target_modules):
                yield Fault(
                    "target_modules",
                    f"text is a regular expression over full names, and '{self.target_modules}' "
                    "matches no layer",
                    f"write a list: [{self.target_modules}]",
                )
        for name in ("rank_pattern", "alpha_pattern"):
            for module in getattr(self, name):
                yield from _regex_faults(f"{name}.{module}", module)


def _regex_faults(path: str, pattern: str) -> Iterator[Fault]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield Fault(path, f"is not a regular expression: {error}", "escape it, or write a list")
