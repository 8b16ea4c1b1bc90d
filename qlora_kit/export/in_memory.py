"""The base as dense tensors by loading it whole, for checkpoints that cannot be streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_kit.export.dense import DenseTensor
from qlora_kit.export.names import is_quantization_state, module_of
from qlora_kit.model.base import bitsandbytes_config, prequantized_settings
from qlora_kit.model.weight import dequantized_weight

if TYPE_CHECKING:
    from qlora_kit.export.trained import BaseKind, TrainedAdapter


def iterate_in_memory(trained: TrainedAdapter, base: BaseKind) -> Iterator[DenseTensor]:
    """The tensors of `iterate_dense`, under the names that they have in the model.

    transformers loads the base as it did in training (`dequantized`) or as it is stored.
    """
    skeleton = trained.skeleton
    options = {}
    if base == "dequantized" and prequantized_settings(skeleton) is None:
        options["quantization_config"] = bitsandbytes_config(
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
    tied = {target for target, _ in model.all_tied_weights_keys.items()}
    for name, tensor in model.state_dict().items():
        if name in tied or is_quantization_state(name):
            continue
        value = tensor
        if name.endswith(".weight"):
            value = dequantized_weight(model.get_submodule(module_of(name)))
            turned = isinstance(skeleton.model.get_submodule(module_of(name)), Conv1D)
            if turned and tensor.dtype != value.dtype and not tensor.is_floating_point():
                value = value.T.contiguous()
        value = value.cpu()
        yield DenseTensor(
            name, name, value.float() if value.is_floating_point() else value, tensor.dtype
        )
