"""A model from its folder into memory, quantized tensor by tensor while it is read."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from qlora_kit.errors import ModelError
from qlora_kit.model.quantized import four_bit_modules, is_four_bit, never_repacked
from qlora_kit.model.reason import reason_of
from qlora_kit.model.skeleton import Skeleton, load_config
from qlora_kit.model.source import ModelSource
from qlora_kit.model.stored import require_none_missing
from qlora_kit.model.weights import inspect_weights
from qlora_kit.model.without_bars import without_bars
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from qlora_kit.environment import Hardware
    from qlora_kit.recipe import ModelSpec

# A smaller model is quantized before anybody wonders.
_SHOWN_FROM_PARAMETERS = 300_000_000
_TRIMMED_EVERY_BYTES = 1024**2
_CANNOT_LOAD = (OSError, ValueError, RuntimeError, ImportError, KeyError)


def load_model(
    source: ModelSource,
    spec: ModelSpec,
    quantization_config: QuantizationConfigMixin | None,
    skeleton: Skeleton,
    compute_dtype: torch.dtype,
    hardware: Hardware,
    quantized: Path | None = None,
    reporter: Reporter = SILENT,
) -> PreTrainedModel:
    """From the source, or from a folder that holds it quantized already.

    Raises:
        ModelError: it cannot be loaded, or lacks weights.
    """
    from transformers import PreTrainedModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {
        "dtype": compute_dtype,
        "device_map": {"": place_of(hardware.device)},
        "output_loading_info": True,
    }
    if spec.attn_implementation != "auto":
        options["attn_implementation"] = spec.attn_implementation
    loaded: Any
    try:
        if quantization_config is None or quantized is not None:
            loaded = _mapped(quantized or source.folder, spec, options)
        elif hardware.device != "cpu":
            # The mapped file is the system's to take back; nothing of it is kept on the host.
            options["quantization_config"] = quantization_config
            loaded = _mapped(source.folder, spec, options)
        else:
            options["quantization_config"] = quantization_config
            loaded = _tensor_by_tensor(source.folder, spec, skeleton, options, reporter)
    except _CANNOT_LOAD as error:
        raise ModelError(f"{source.name} cannot be loaded: {reason_of(error)}") from error
    model, found = loaded
    assert isinstance(model, PreTrainedModel)
    model.config._name_or_path = model.name_or_path = str(source.folder)
    require_none_missing(skeleton, found["missing_keys"])
    for module in four_bit_modules(model):
        _compute_in(module, compute_dtype)
    never_repacked(model)
    model.requires_grad_(False)
    model.eval()
    return model


def _mapped(folder: Path, spec: ModelSpec, options: dict[str, Any]) -> Any:
    """Files are mapped into memory: nothing is copied that can be used as it lies there."""
    from transformers import AutoModelForCausalLM

    with without_bars():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=None if spec.allow_pickle else True,
            local_files_only=True,
            **options,
        )


def _tensor_by_tensor(
    folder: Path,
    spec: ModelSpec,
    skeleton: Skeleton,
    options: dict[str, Any],
    reporter: Reporter,
) -> Any:
    """Each tensor is read, quantized and let go before the next: mapped files would stay in memory
    as a whole, in 16 bits, beside what is made of them.
    """
    weights = inspect_weights(folder)
    if weights.format == "pickle" or spec.trust_remote_code:
        loaded = _mapped(folder, spec, options)
        _leave_the_file(loaded[0])
        return loaded
    kind: Any = type(skeleton.model)
    config: Any = load_config(folder)
    if not isinstance(config, kind.config_class):
        config = config.get_text_config()  # the language model of one that sees as well
    num_parameters = sum(one.numel() for one in skeleton.model.parameters())
    shown = reporter if num_parameters >= _SHOWN_FROM_PARAMETERS else SILENT
    holes = _Holes()
    with shown.progress("quantizing", len(weights.tensors)) as progress, ExitStack() as files:

        def was_read(tensor: torch.Tensor) -> None:
            progress.update()
            holes.come_with(tensor)

        slices = _slices(weights.files, files, was_read)
        return kind.from_pretrained(
            None,
            config=config,
            state_dict=slices,
            generation_config=_generation_config(folder),
            **options,
        )


class _Slice:
    """One tensor of a file, not read yet."""

    def __init__(self, inner: Any, was_read: Callable[[torch.Tensor], None]):
        self._inner = inner
        self._was_read = was_read

    def get_dtype(self) -> str:
        return str(self._inner.get_dtype())

    def get_shape(self) -> list[int]:
        return list(self._inner.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._inner[index]
        self._was_read(tensor)
        return tensor


def _slices(
    files: tuple[Path, ...], stack: ExitStack, was_read: Callable[[torch.Tensor], None]
) -> dict[str, _Slice]:
    """Every tensor of these files by name. They stay open with `stack`; they are not mapped."""
    slices: dict[str, _Slice] = {}
    for path in files:
        file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
        for name in file.keys():  # noqa: SIM118 - not a mapping
            slices[name] = _Slice(file.get_slice(name), was_read)
    return slices


class _Holes:
    """What tensors leave in memory that were read, quantized and let go.

    The GNU C library keeps blocks of up to 32 MiB that were freed, between those that are in use;
    it is told to give them back to the system before the next large tensor. Other libraries do so
    by themselves, or not at all.
    """

    def __init__(self) -> None:
        self._since = 0
        self._trim: Any = None
        if platform.libc_ver()[0] == "glibc":
            self._trim = ctypes.CDLL(None).malloc_trim

    def come_with(self, tensor: torch.Tensor) -> None:
        self._since += tensor.nbytes
        if self._trim is not None and self._since >= _TRIMMED_EVERY_BYTES:
            self._trim(0)
            self._since = 0


def _generation_config(folder: Path) -> Any:
    """As transformers finds it: of its own file, or else of the model's configuration."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
    )


def _leave_the_file(model: PreTrainedModel) -> None:
    """Copy what is not quantized on a CPU: it lies in the mapped checkpoint, all of which would
    otherwise stay in memory for it.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()


def place_of(device: str) -> str:
    """The device of this process: under a launcher each has a GPU of its own, chosen by `join`."""
    return device if device == "cpu" else f"{device}:{torch.cuda.current_device()}"


def _compute_in(module: Any, compute_dtype: torch.dtype) -> None:
    """Forward computes in the module's dtype, backward dequantizes to its state's: make them one.

    A checkpoint that was stored quantized brings its own of both.
    """
    module.compute_dtype = compute_dtype
    module.compute_type_is_set = True
    if is_four_bit(module.weight):
        module.weight.quant_state.dtype = compute_dtype
