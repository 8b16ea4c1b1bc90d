"""From what a user names to something that runs it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_kit.checkpoint.run_directory import is_run
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.runtime.protocol import Runtime

RuntimeName = Literal["transformers", "llama.cpp", "onnxruntime"]

_LIBRARIES: dict[RuntimeName, tuple[str, ...]] = {
    "transformers": ("qlora_kit.subject", "transformers.models.auto.modeling_auto", "bitsandbytes"),
    "llama.cpp": ("qlora_kit.runtime.llama_cpp", "llama_cpp"),
    "onnxruntime": ("qlora_kit.runtime.onnx", "onnxruntime"),
}

ONNX_FILE = "model.onnx"


def open_runtime(
    name: str, model_spec: ModelSpec | None = None, force: bool = False, reporter: Reporter = SILENT
) -> Runtime:
    """Open a run, an adapter folder, a transformers folder, a hub id or a demo model; a GGUF file
    or the folder of one; or an ONNX folder.

    `model_spec` and `force` are as in `subject.load_subject`, and mean nothing to the others.

    Raises:
        QloraKitError: nothing of the kind is there, or what would run it is not installed.
    """
    kind = runtime_of(name)
    path = Path(name).expanduser()
    if kind == "llama.cpp":
        from qlora_kit.runtime.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime.open(path)
    if kind == "onnxruntime":
        from qlora_kit.runtime.onnx import OnnxRuntime

        return OnnxRuntime.open(path)

    from qlora_kit.runtime.transformers import TransformersRuntime
    from qlora_kit.subject import load_subject

    return TransformersRuntime.of(load_subject(name, model_spec, force, reporter))


def import_runtime(name: str) -> None:
    """Import what opening `name` will need, so that it can be timed without."""
    for module in _LIBRARIES[runtime_of(name)]:
        if find_spec(module) is not None:
            import_module(module)


def runtime_of(name: str) -> RuntimeName:
    """What runs it, decided by what is there; transformers says what is wrong with the rest."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and not path.is_dir():
        return "llama.cpp"
    if not path.is_dir() or is_run(path) or any(path.glob("*.safetensors")):
        return "transformers"
    if (path / ONNX_FILE).is_file():
        return "onnxruntime"
    return "llama.cpp" if any(path.glob("*.gguf")) else "transformers"
