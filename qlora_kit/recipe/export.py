"""`export:` what a finished run is turned into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec


class MergeSpec(Spec):
    """How the adapter is added to the base, and how far the result may be from what was trained."""

    base: Literal["auto", "dequantized", "original"] = "auto"
    """`dequantized` is the graph that was trained; `original` the 16-bit weights, often better
    but not what was evaluated. `auto` measures both on held-out rows and keeps the one with
    the lower loss among those within max_kl."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What the sum is rounded to, once. `auto` is the dtype of the base's checkpoint."""

    max_kl: float = Field(default=1e-3, gt=0)
    """Budget: mean KL divergence in nats per token from the trained graph to the merged one."""

    max_rows: int = Field(default=64, gt=0)
    """Held-out rows that the merge is measured on."""

    max_shard_bytes: int = Field(default=4 * 1024**3, gt=0)
    """Size at which a new safetensors shard begins."""


Target = Annotated[str, Field(min_length=1)]


class ExportSpec(Spec):
    """Artifacts made at the end of `train`; each can also be made later by its own verb."""

    merge: bool = False
    """Merge after training and certify the result."""

    merge_options: MergeSpec = MergeSpec()
    """How, when it is merged."""

    to: tuple[Target, ...] = ()
    """What else to make, each in a folder under `exports/`, as by `export RUN --to`: `adapter`,
    `adapter:vllm`, `merged`, `gguf:Q4_K_M`, `lora-gguf`, `ollama`, `onnx`, `gptq`, `nf4`, `int8` …
    What is calibrated sees the recipe's training rows. `adapter:vllm` also makes what vLLM refuses
    in an adapter a fault of the recipe."""

    def contradictions(self) -> Iterator[Fault]:
        repeated = sorted({one for one in self.to if self.to.count(one) > 1})
        if repeated:
            yield Fault("to", f"named twice: {', '.join(repeated)}", "name each once")
