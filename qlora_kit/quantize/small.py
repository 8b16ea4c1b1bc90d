"""A small model of the same architecture, on which a library is tried before the real work.

Whether an exporter or a quantizer can follow a model depends on the code that computes it, not on
its weights or sizes: a few layers with random weights tell, in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import Skeleton, build_skeleton
from qlora_kit.quantize.layers import quantized_layers
from qlora_kit.quantize.method import Calibration, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MAX_PARAMETERS = 50_000_000
_MAX_LAYERS = 8
_VOCABULARY = 128
# Token ids of the text: above those that mean something, once `_fewer_tokens` has moved them.
_FIRST_ID = 8
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_WIDTHS = ("hidden", "intermediate", "ffn", "inner", "word_embed_proj_dim")
# What upstream raises where sizes do not go together.
_DOES_NOT_RUN = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)


def try_on_small(source: Source, attempt: Callable[[Source, PreTrainedModel], None]) -> str:
    """Call `attempt` with a small model in float32 and its skeleton in place of the source's.

    Where one of smaller sizes fails, one of the source's own widths is tried as well, if that is
    small enough: what no size can do fails. Returns why nothing was tried, or nothing.

    Raises:
        ModelError: the attempt's own, where it fails.
    """
    failure: ModelError | None = None
    for skeleton in _small_skeletons(source.skeleton):
        model = _with_random_weights(skeleton, source.hardware.device)
        if model is None:
            continue
        try:
            attempt(replace(source, skeleton=skeleton), model)
        except ModelError as error:
            failure = error
        else:
            return ""
    if failure is not None:
        raise failure
    return (
        f"no small model could be made of {type(source.skeleton.model).__name__} to try it on, so "
        "what the library cannot follow shows only once the work is under way"
    )


def some_text(num_tokens: int = 64, num_rows: int = 4) -> Calibration:
    """Random tokens, which every small model knows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_FIRST_ID, _VOCABULARY, (num_rows, num_tokens), generator=generator)
    rows = [tuple(row) for row in ids.tolist()]
    sequences = tuple(TokenSequence(row, row, f"row {n}") for n, row in enumerate(rows))
    return Calibration(sequences, num_rows * num_tokens, "random tokens")


def skips_that_fit(skeleton: Skeleton, skip_modules: Sequence[str]) -> tuple[str, ...]:
    """What is skipped in the small model: nothing, if that would leave nothing to quantize."""
    return tuple(skip_modules) if quantized_layers(skeleton, skip_modules) else ()


def _small_skeletons(whole: Skeleton) -> Iterator[Skeleton]:
    """The smallest first. Code that comes with a model may want anything of its configuration."""
    if whole.model.__module__.startswith("transformers_modules"):
        return
    sizes: set[int] = set()
    for change in (_narrower, _as_wide):
        found = _of_few_layers(whole, change)
        if found is not None and _num_parameters(found) not in sizes:
            sizes.add(_num_parameters(found))
            yield found


def _of_few_layers(whole: Skeleton, change: Callable[[PreTrainedConfig], None]) -> Skeleton | None:
    """With as few layers as have every kind of module; None where there is no such model."""
    kinds = _kinds(whole)
    num_layers = int(whole.model.config.get_text_config().num_hidden_layers)
    for count in range(min(2, num_layers), min(_MAX_LAYERS, num_layers) + 1):
        config = copy.deepcopy(whole.model.config)
        config.dtype = torch.float32
        try:
            _fewer_layers(config.get_text_config(), count)
            _fewer_tokens(config, config.get_text_config())
            change(config.get_text_config())
            found = build_skeleton(config)
        except (ModelError, *_DOES_NOT_RUN):
            return None
        if _kinds(found) == kinds:
            return found if _num_parameters(found) <= _MAX_PARAMETERS else None
    return None


def _num_parameters(skeleton: Skeleton) -> int:
    return sum(parameter.numel() for parameter in skeleton.model.parameters())


def _kinds(skeleton: Skeleton) -> set[type]:
    return {type(module) for module in skeleton.model.modules()}


def _fewer_layers(text: PreTrainedConfig, count: int) -> None:
    """The first of every kind that the lists with an entry for each layer tell apart, and as many
    of those after it as are wanted.
    """
    whole = int(text.num_hidden_layers)
    lists = {
        key: value
        for key, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == whole
    }
    first: dict[str, int] = {}
    for number in range(whole):
        first.setdefault(repr([value[number] for value in lists.values()]), number)
    chosen = set(first.values())
    chosen.update(
        [number for number in range(whole) if number not in chosen][: count - len(chosen)]
    )
    picked = sorted(chosen)[:_MAX_LAYERS] if len(chosen) > count else sorted(chosen)
    for key, value in lists.items():
        setattr(text, key, [value[number] for number in picked])
    text.num_hidden_layers = len(picked)


def _fewer_tokens(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    """Special tokens become the first ones."""
    for key, value in vars(text).items():
        if key.startswith("vocab_size") and isinstance(value, int):
            setattr(text, key, min(value, _VOCABULARY))
    for one in (config, text):
        for key, value in vars(one).items():
            if key.endswith(("_token_id", "_token_index")) and value is not None:
                setattr(one, key, 0)


def _as_wide(text: PreTrainedConfig) -> None:
    """Nothing."""


def _narrower(text: PreTrainedConfig) -> None:
    """One head that holds keys with as many queries to it as there are, or two where each has its
    own; all widths in the same proportion.
    """
    heads = int(text.num_attention_heads)
    holders = int(_value(text, "num_key_value_heads") or heads)
    few_holders = 1 if heads > holders else min(holders, 2)
    fewer = heads // holders * few_holders
    if isinstance(_value(text, "num_key_value_heads"), int):
        text.num_key_value_heads = few_holders
    text.num_attention_heads = fewer
    for key, value in vars(text).items():
        is_width = any(part in key for part in _WIDTHS) and "layer" not in key
        if is_width and isinstance(value, int) and not isinstance(value, bool):
            setattr(text, key, max(1, value * fewer // heads))
    if "hidden_size" in text.attribute_map:
        text.hidden_size = text.hidden_size * fewer // heads
    top = int(_value(text, "num_experts_per_tok") or 1)
    for key in _EXPERTS:
        value = _value(text, key)
        if isinstance(value, int):
            setattr(text, key, min(value, max(8, 2 * top)))


def _value(config: PreTrainedConfig, key: str) -> Any:
    """None where an architecture does not have it."""
    return getattr(config, key, None)


def _with_random_weights(skeleton: Skeleton, device: str) -> PreTrainedModel | None:
    """None where it cannot compute: sizes that do not go together are no fault of a library."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([some_text().sequences[0].input_ids])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                skeleton.model.config, dtype=torch.float32
            ).eval()
            for parameter in model.parameters():
                parameter.nan_to_num_(0.0, 0.0, 0.0).add_(torch.randn_like(parameter) * 0.02)
            logits = model(input_ids=ids, use_cache=False).logits
    except _DOES_NOT_RUN:
        return None
    return model.to(device) if bool(torch.isfinite(logits).all()) else None  # type: ignore[arg-type]
