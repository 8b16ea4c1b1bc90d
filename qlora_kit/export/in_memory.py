"""The base as dense tensors by loading it whole, for checkpoints that cannot be streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_kit.export.dense import DenseTensor
from qlora_kit.export.names import is_quantization_state, module_of
from qlora_kit.model import mixed_bits as mixed_bits  # a stored base may be of this kind
from qlora_kit.model.base import loading_config, prequantized_settings
from qlora_kit.model.weight import dequantized_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.export.trained import BaseKind, TrainedAdapter
    from qlora_kit.model.skeleton import Skeleton


def iterate_in_memory(trained: TrainedAdapter, base: BaseKind) -> Iterator[DenseTensor]:
    """The tensors of `iterate_dense`, under the names that they have in the model.

    transformers loads the base as it did in training (`dequantized`) or as it is stored.
    """
    skeleton = trained.skeleton
    options = {}
    if base == "dequantized" and prequantized_settings(skeleton) is None:
        options["quantization_config"] = loading_config(
            trained.quantization, skeleton, trained.compute_dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        trained.source.folder,
        dtype=trained.compute_dtype if base == "dequantized" else "auto",
        device_map={"": trained.device if base == "dequantized" else "cpu"},
        trust_remote_code=trained.trust_remote_code,
        use_safetensors=None if trained.allow_pickle else True,
        local_files_only=True,
        **options,
    )
    return iterate_loaded(model, skeleton)


def iterate_loaded(model: PreTrainedModel, skeleton: Skeleton) -> Iterator[DenseTensor]:
    """The tensors of a model in memory, quantized or not, each of those that are tied once."""
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys or is_quantization_state(name):
            continue
        value = tensor
        if name.endswith(".weight"):
            module = module_of(name)
            value = dequantized_weight(model.get_submodule(module))
            if is_turned(model.get_submodule(module), skeleton.model.get_submodule(module)):
                value = value.T.contiguous()
        value = value.cpu()
        yield DenseTensor(
            name, name, value.float() if value.is_floating_point() else value, tensor.dtype
        )


def is_turned(module: nn.Module, plain: nn.Module) -> bool:
    """Whether `module` is a bitsandbytes layer in place of a Conv1D, (out, in) for (in, out)."""
    return isinstance(plain, Conv1D) and isinstance(module, nn.Linear)
