"""Packages that are installed only by those who want what they do: which extra brings which.

`pyproject.toml` says in which versions, and the installed kit's metadata after it. Nothing here
imports them: some take ten seconds.
"""

from __future__ import annotations

from importlib.util import find_spec

from qlora_kit.errors import HardwareError
from qlora_kit.packages import required_packages

EXTRAS: dict[str, tuple[str, ...]] = {
    "gguf": ("llama_cpp", "sentencepiece"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gptq": ("llmcompressor", "compressed_tensors"),
    "lm-eval": ("lm_eval",),
    "qat": ("compressed_tensors",),
    "liger": ("liger_kernel",),
}
"""The modules that each extra makes importable, by its name in `pyproject.toml`."""

PURPOSES: dict[str, str] = {
    "gguf": "GGUF files (quantize, export, evaluate, compare, chat)",
    "onnx": "ONNX (quantize, export, evaluate, compare)",
    "gptq": "quantize and export by gptq and awq",
    "lm-eval": "evaluate --tasks",
    "qat": "storing and loading what quantization_aware trains for int8 and int4-group",
    "liger": "norms, gated MLPs and rotary embeddings by Triton kernels on a GPU (train)",
}
"""What each of them is for."""


_OTHERWISE_NAMED = {"llama_cpp": "llama-cpp-python"}


def distributions(name: str) -> tuple[str, ...]:
    """The packages of an extra, by the names that they are installed by."""
    modules = EXTRAS[name]
    return tuple(_OTHERWISE_NAMED.get(one, one.replace("_", "-")) for one in modules)


def has_extra(name: str) -> bool:
    """Whether everything that it brings is installed, in versions that it allows."""
    return fault_of(name) is None


def fault_of(name: str) -> str | None:
    """What of an extra is not installed or, where all is, in another version than it allows."""
    missing = [module for module in EXTRAS[name] if find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)}, not installed here"
    other = [
        f"{one.name} {one.needed} ({one.installed} is installed)"
        for one in required_packages(name)
        if one.installed is not None and not one.fits
    ]
    return " and ".join(other) or None


def require_extra(name: str, purpose: str) -> None:
    """Make sure of an extra before the work that needs it; `purpose` is what the user asked for.

    Raises:
        HardwareError: it is not installed, or in another version; names the command that installs
            it.
    """
    fault = fault_of(name)
    if fault is not None:
        raise HardwareError(
            f"{purpose} needs {fault}; install with: pip install 'qlora-kit[{name}]'"
        )
