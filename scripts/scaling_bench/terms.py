"""What an update computes, and what a process holds, as it can be counted on paper."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from plan_bench.cases import Case

from qlora_kit.train.supervised_loss import chunk_bytes

_MIB = 2**20


@dataclass(frozen=True)
class Terms:
    """What an update has to compute, in 10⁹ floating-point operations (a product and a sum are 2).

    The backward pass takes as much again as the forward pass for frozen weights (the gradient of
    the input alone), and twice as much for the adapter; layers that recompute do the forward pass
    twice.
    """

    products: float
    """With frozen weights, the head among them."""
    adapter: float
    attention: float
    """Of queries with keys and of scores with values; a causal mask leaves half of them."""
    elements: float
    """Numbers that pass through norms, activations and residual sums, in 10⁹."""
    logits: float
    """Of supervised tokens, which pass through a softmax and its gradient, in 10⁹."""
    optimizer: float
    """Trained parameters, in 10⁹."""

    @classmethod
    def of(cls, one: Case) -> Terms:
        tokens = one.tokens * one.batch
        linear, adapter = parameters_of(one)
        again = 1 if one.train["gradient_checkpointing"] else 0
        supervised = tokens / 2  # see `bench_plan.prepared`
        head = supervised * one.hidden * one.vocabulary
        scores = one.layers * one.batch * one.tokens**2 / 2 * one.hidden
        return cls(
            products=2 * (tokens * linear * (2 + again) + 2 * head) / 1e9,
            adapter=2 * tokens * adapter * (3 + again) / 1e9,
            attention=2 * 2 * scores * (3.5 + again) / 1e9,
            elements=tokens * one.layers * (4 * one.hidden + 3 * one.inner) * (2 + again) / 1e9,
            logits=supervised * one.vocabulary / 1e9,
            optimizer=adapter / 1e9,
        )

    def as_row(self) -> list[float]:
        return [*asdict(self).values(), 1.0]


def parameters_of(one: Case) -> tuple[int, int]:
    """(of all linear layers but the head, of the adapter)"""
    kv = one.kv_heads * (one.hidden // one.heads)
    # Each of the seven projections has its own A and B.
    sizes = [(one.hidden, one.hidden), (one.hidden, kv), (one.hidden, kv), (one.hidden, one.hidden)]
    sizes += 2 * [(one.hidden, one.inner)] + [(one.inner, one.hidden)]
    linear = one.layers * sum(inner * outer for inner, outer in sizes)
    return linear, one.layers * one.rank * sum(inner + outer for inner, outer in sizes)


@dataclass(frozen=True)
class Holds:
    """What a process holds when most is alive, in MiB, as it can be counted on paper: float32 on a
    CPU, where unpacked weights stay as long as no layer recomputes.
    """

    weights: float
    """4.127 bits of each number, and 32 more of those that stay unpacked."""
    vocabulary: float
    adapter: float
    """Parameters, gradients, and two states of AdamW."""
    activations: float
    """Of each token and layer twice the hidden states, queries, keys and values, gate and up; its
    input alone where it recomputes, and one layer's whole."""
    logits: float
    """Of a chunk of supervised places."""
    passing: float
    """What a forward pass lets go again, of whose blocks some stay behind as holes."""

    @classmethod
    def of(cls, one: Case) -> Holds:
        linear, adapter = parameters_of(one)
        tokens = one.tokens * one.batch
        kv = one.kv_heads * (one.hidden // one.heads)
        a_layer = 4 * one.hidden + 2 * kv + 2 * one.inner
        recomputes = bool(one.train["gradient_checkpointing"])
        kept = one.layers * one.hidden + a_layer if recomputes else one.layers * a_layer
        passing = tokens * one.layers * (3 * one.hidden + 2 * one.inner)
        return cls(
            weights=linear * (4.127 / 8 + 4 * (not recomputes)) / _MIB,
            vocabulary=4 * one.vocabulary * one.hidden / _MIB,
            adapter=16 * adapter / _MIB,
            activations=4 * tokens * kept / _MIB,
            logits=min(chunk_bytes(one.vocabulary, "cpu"), 4 * tokens / 2 * one.vocabulary) / _MIB,
            passing=4 * passing * (1 + recomputes) / _MIB,
        )

    def as_row(self) -> list[float]:
        return [*asdict(self).values(), 1.0]


HOLD_NAMES = ("weights", "vocabulary", "adapter", "activations", "logits", "passing", "process")
TERM_NAMES = ("products", "adapter", "attention", "elements", "logits", "optimizer", "each update")
