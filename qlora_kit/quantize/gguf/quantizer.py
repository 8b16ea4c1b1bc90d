"""llama.cpp's own quantizer, in a process of its own: it ends its process where a rule is broken.

The child runs `python -m qlora_kit.quantize.gguf.quantizer IN OUT NUMBER THREADS [IMPORTANCE]`.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.scripts import LlamaCpp, last_line
from qlora_kit.quantize.gguf.types import GgufType

_FALLBACKS = re.compile(r"WARNING: (\d+) of +(\d+) tensor\(s\) required fallback")


def quantize_file(
    llama: LlamaCpp,
    source: Path,
    target: Path,
    kind: GgufType,
    threads: int,
    importance: Path | None = None,
) -> tuple[int, int] | None:
    """Quantize one GGUF file to another.

    Args:
        importance: an importance matrix, in llama.cpp's own format.

    Returns:
        How many tensors, and of how many, took a neighbouring type because their rows do not
        fit the blocks of this one; None where all did as asked.

    Raises:
        ModelError: llama.cpp would not.
    """
    if llama.quantizer is not None:
        weighed = [] if importance is None else ["--imatrix", str(importance)]
        files = [str(source), str(target)]
        command = [str(llama.quantizer), *weighed, *files, kind.name, str(threads)]
    else:
        child = [sys.executable, "-m", "qlora_kit.quantize.gguf.quantizer"]
        command = [*child, str(source), str(target), str(kind.number), str(threads)]
        command += [] if importance is None else [str(importance)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise ModelError(f"llama.cpp cannot quantize {source.name} to {kind.name}: {_fault(log)}.")
    found = _FALLBACKS.search(log)
    return (int(found[1]), int(found[2])) if found else None


def _fault(log: str) -> str:
    said = [line for line in log.splitlines() if "failed to quantize" in line or "ERROR" in line]
    return last_line("\n".join(said) or log)


def main(source: str, target: str, number: str, threads: str, importance: str = "") -> int:
    """The child's work; everything that llama.cpp says goes to stderr."""
    import llama_cpp

    def write(_: int, text: bytes, __: object) -> None:
        sys.stderr.write(text.decode("utf-8", errors="replace"))

    callback = llama_cpp.llama_log_callback(write)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(number)
    settings.nthread = int(threads)
    held = _importance(Path(importance)) if importance else None
    if held is not None:
        settings.imatrix = held[0]
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    sys.stderr.flush()
    return int(code)


def _importance(path: Path) -> tuple[Any, list[Any]]:
    """llama.cpp's array of it, which ends with an entry without a name, and what it points to."""
    import llama_cpp
    import numpy as np

    from qlora_kit.quantize.gguf.importance_file import read_importance

    kept = [
        (name.encode(), np.ascontiguousarray(values, dtype=np.float32))
        for name, values in read_importance(path).items()
    ]
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name = name
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries, kept


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
