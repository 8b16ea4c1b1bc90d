"""Shapes of models and of what they are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One shape: of the model, and of what it is trained on."""

    name: str
    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    batch: int
    rank: int
    train: dict[str, Any]
    ragged: bool = False
    bits: int = 4
    is_tied: bool = True
    attention: str = "auto"
    more: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, as its family has it alone."""
    aware: dict[str, Any] = field(default_factory=dict)
    """`quantization_aware`, of a base in 16 or 32 bits."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Of the adapter, beside its rank."""


def case(name: str, family: str = "llama", *sizes: int, **others: Any) -> Case:
    hidden, inner, layers, heads, kv_heads, vocabulary, tokens, batch, rank = sizes
    train = others.pop("train", {})
    return Case(
        name,
        family,
        hidden,
        inner,
        layers,
        heads,
        kv_heads,
        vocabulary,
        tokens,
        batch,
        rank,
        train,
        **others,
    )


_ALL, _NONE = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
_ACCUMULATED = {"gradient_accumulation_steps": 2}
_EIGHT = {"optim": "paged_adamw_8bit"}
CASES = (
    case("llama-base", "llama", 256, 1024, 6, 4, 2, 8192, 256, 4, 16),
    case("llama-long", "llama", 256, 768, 4, 4, 4, 8192, 1024, 1, 16),
    case("llama-wide", "llama", 768, 2048, 3, 12, 4, 4096, 128, 4, 8),
    case("llama-deep", "llama", 192, 512, 16, 3, 3, 4096, 256, 2, 8),
    case("llama-all", "llama", 256, 1024, 8, 4, 2, 8192, 512, 4, 16, train=_ALL),
    case("llama-none", "llama", 256, 1024, 8, 4, 2, 8192, 512, 2, 16, train=_NONE),
    case("llama-rank-64", "llama", 512, 1536, 4, 8, 2, 8192, 256, 2, 64),
    case("llama-rank-4", "llama", 512, 1536, 4, 8, 2, 8192, 256, 2, 4),
    case("llama-vocabulary", "llama", 256, 512, 4, 4, 4, 64000, 256, 4, 8),
    case("llama-untied", "llama", 384, 1024, 4, 6, 6, 32000, 256, 2, 16, is_tied=False),
    case("llama-batch-16", "llama", 256, 768, 4, 4, 2, 8192, 128, 16, 8),
    case("llama-ragged", "llama", 256, 768, 4, 4, 2, 8192, 384, 4, 8, ragged=True),
    case("llama-accumulated", "llama", 512, 1024, 3, 8, 8, 4096, 256, 2, 64, train=_ACCUMULATED),
    case(
        "llama-8-bits",
        "llama",
        512,
        1024,
        3,
        8,
        8,
        4096,
        128,
        1,
        64,
        train=_EIGHT,
    ),
    case(
        "llama-plain",
        "llama",
        256,
        768,
        4,
        4,
        2,
        8192,
        256,
        2,
        8,
        train={"fused_loss": False, "fused_lora": False},
    ),
    case("llama-eager", "llama", 256, 768, 4, 4, 2, 8192, 512, 2, 8, attention="eager"),
    case("llama-unquantized", "llama", 384, 1024, 4, 6, 6, 8192, 256, 2, 8, bits=16),
    case("qwen2", "qwen2", 384, 1536, 5, 6, 2, 32000, 256, 3, 16),
    case("gemma", "gemma", 256, 1024, 5, 4, 1, 32000, 256, 3, 16),
    case("gpt2", "gpt2", 384, 1536, 5, 6, 6, 8192, 256, 3, 16),
)


def _family(family: str, **more: Any) -> Case:
    """Four layers of 256, and two rows of 256 tokens."""
    return case(family, family, 256, 768, 4, 4, 2, 8192, 256, 2, 8, more=more)


_NEAR = {"sliding_window": 128}
FAMILIES = (
    _family("gpt_neox"),
    _family("gptj", rotary_dim=32),
    _family("bloom"),
    _family("opt", ffn_dim=768, word_embed_proj_dim=256),
    _family("phi"),
    _family("phi3"),
    _family("qwen3"),
    _family("gemma2", **_NEAR),
    _family("gemma3_text", **_NEAR),
    _family("mistral"),
    _family("stablelm"),
    _family("starcoder2"),
    _family("olmo2"),
    _family("cohere"),
    _family("granite"),
    _family("glm4"),
    _family("nemotron"),
    _family("smollm3"),
    _family("lfm2"),
)
"""Other architectures, each once."""


def _aware(name: str, *sizes: int, family: str = "llama", **others: Any) -> Case:
    aware = {"method": others.pop("method", "nf4"), "train": others.pop("what", "adapter")}
    return case(f"aware-{name}", family, *sizes, bits=16, aware=aware, **others)


AWARE = (
    _aware("base", 256, 1024, 6, 4, 2, 8192, 256, 4, 16),
    _aware("wide", 1024, 4096, 3, 16, 4, 4096, 64, 1, 16),
    _aware("deep", 192, 512, 16, 3, 3, 4096, 256, 2, 8),
    _aware("all", 512, 1536, 8, 8, 2, 8192, 512, 2, 16, train=_ALL),
    _aware("int8", 768, 2048, 3, 12, 4, 4096, 128, 4, 8, method="int8"),
    _aware("int4", 768, 2048, 3, 12, 4, 4096, 128, 4, 8, method="int4-group"),
    _aware("full", 384, 1024, 6, 6, 2, 8192, 256, 4, 8, what="full"),
    _aware("full-wide", 1024, 4096, 3, 16, 4, 4096, 64, 1, 8, what="full"),
    _aware("full-all", 512, 1536, 8, 8, 2, 8192, 512, 2, 8, what="full", train=_ALL),
    _aware("full-8-bits", 512, 1536, 6, 8, 2, 8192, 256, 2, 8, what="full", train=_EIGHT),
    _aware(
        "full-accumulated", 512, 1536, 6, 8, 2, 8192, 256, 2, 8, what="full", train=_ACCUMULATED
    ),
    _aware("full-gpt2", 384, 1536, 5, 6, 6, 8192, 256, 3, 8, what="full", family="gpt2"),
)
"""Training that quantizes what it trains."""


def _dora(name: str, *sizes: int, family: str = "llama", **others: Any) -> Case:
    return case(f"dora-{name}", family, *sizes, lora={"use_dora": True}, **others)


DORA = (
    _dora("base", 256, 1024, 6, 4, 2, 8192, 256, 4, 16),
    _dora("wide", 1024, 4096, 3, 16, 4, 4096, 64, 1, 16),
    _dora("deep", 192, 512, 16, 3, 3, 4096, 256, 2, 8),
    _dora("all", 512, 1536, 8, 8, 2, 8192, 512, 2, 16, train=_ALL),
    _dora("whole", 768, 2048, 3, 12, 4, 4096, 128, 4, 8, bits=16),
    _dora("gpt2", 384, 1536, 5, 6, 6, 8192, 256, 3, 8, family="gpt2"),
)
"""Adapters that take norms of unpacked weights."""


def configuration_of(one: Case) -> dict[str, Any]:
    """Of the model's sizes, as its family names them."""
    values: dict[str, Any] = {"vocab_size": one.vocabulary, "eos_token_id": 1, "pad_token_id": 0}
    values |= {"bos_token_id": 1, "tie_word_embeddings": one.is_tied}
    if one.family == "gpt2":
        values |= {"n_embd": one.hidden, "n_layer": one.layers, "n_head": one.heads}
        values |= {"n_inner": one.inner, "n_positions": 2048}
    else:
        values |= {"hidden_size": one.hidden, "num_hidden_layers": one.layers}
        values |= {"intermediate_size": one.inner, "num_attention_heads": one.heads}
        values |= {"num_key_value_heads": one.kv_heads, "head_dim": one.hidden // one.heads}
    return {**values, **one.more}
