"""Tiny random models that disagree with themselves at every token, and rows for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.runtime.forward import CausalScorer

NUM_TOKENS = 128
CONTEXT = 96


def llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    """Weights wide enough that logits differ and greedy answers do not fall into a loop."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=NUM_TOKENS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": llama, "gpt2": gpt2}


def scorer(model: nn.Module, compute_dtype: torch.dtype | None = None) -> CausalScorer:
    return CausalScorer(model, 0, compute_dtype)  # type: ignore[arg-type]


class WholeLogits(LlamaForCausalLM):
    """A model of the old kind, which cannot leave out positions."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


class SaysAlways(nn.Module):
    """A model whose logits are the same everywhere: what it says can be worked out by hand."""

    def __init__(self, probabilities: list[float]):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
        self.config = LlamaConfig(vocab_size=len(probabilities))
        self.device = torch.device("cpu")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def rows(lengths: list[int], seed: int = 0, context: float = 0.4) -> list[TokenSequence]:
    """Random ids; the first share of each row is context, and one token in five later on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, NUM_TOKENS, (length,), generator=generator).tolist()
        start = int(length * context)
        labels = [
            IGNORE_INDEX if place < start or (start and place % 5 == 0) else token
            for place, token in enumerate(ids)
        ]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"rows.jsonl:{number + 1}"))
    return made
