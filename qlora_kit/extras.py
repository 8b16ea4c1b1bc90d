"""Packages that are installed only by those who want what they do: which extra brings which.

`pyproject.toml` says from which versions on. Nothing here imports them: some take ten seconds.
"""

from __future__ import annotations

from importlib.util import find_spec

from qlora_kit.errors import HardwareError

EXTRAS: dict[str, tuple[str, ...]] = {
    "gguf": ("llama_cpp", "sentencepiece"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gptq": ("llmcompressor", "compressed_tensors"),
    "lm-eval": ("lm_eval",),
    "qat": ("compressed_tensors",),
}
"""The modules that each extra makes importable, by its name in `pyproject.toml`."""

PURPOSES: dict[str, str] = {
    "gguf": "GGUF files (quantize, export, evaluate, compare, chat)",
    "onnx": "ONNX (quantize, export, evaluate, compare)",
    "gptq": "quantize and export by gptq and awq",
    "lm-eval": "evaluate --tasks",
    "qat": "storing and loading what quantization_aware trains for int8 and int4-group",
}
"""What each of them is for."""


_OTHERWISE_NAMED = {"llama_cpp": "llama-cpp-python"}


def distributions(name: str) -> tuple[str, ...]:
    """The packages of an extra, by the names that they are installed by."""
    modules = EXTRAS[name]
    return tuple(_OTHERWISE_NAMED.get(one, one.replace("_", "-")) for one in modules)


def has_extra(name: str) -> bool:
    """Whether everything that it brings is installed."""
    return not missing_modules(name)


def missing_modules(name: str) -> tuple[str, ...]:
    """Of the modules that an extra brings, those that cannot be found."""
    return tuple(module for module in EXTRAS[name] if find_spec(module) is None)


def require_extra(name: str, purpose: str) -> None:
    """Make sure of an extra before the work that needs it; `purpose` is what the user asked for.

    Raises:
        HardwareError: it is not installed; names the command that installs it.
    """
    missing = missing_modules(name)
    if missing:
        raise HardwareError(
            f"{purpose} needs {' and '.join(missing)}, not installed here; install with: "
            f"pip install 'qlora-kit[{name}]'"
        )
