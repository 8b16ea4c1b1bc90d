"""Random access to a checkpoint's tensors, whatever shards they are in."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.errors import ModelError
from qlora_kit.model.weights import weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """Tensors by name, in the order of the files; each is read when it is asked for.

    A context manager: the files stay mapped while it is open.

    Raises:
        ModelError: a file is missing, truncated or not what its name says.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        self._files = weight_files(folder, allow_pickle)
        self._stack = ExitStack()
        self._owner: dict[str, Any] = {}

    def __enter__(self) -> Checkpoint:
        for path in self._files:
            if path.suffix == ".bin":
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self._owner.update(dict.fromkeys(tensors, tensors))
                continue
            try:
                shard = self._stack.enter_context(safe_open(path, framework="pt"))
                self._owner.update(dict.fromkeys(shard.keys(), shard))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} cannot be read as safetensors ({error}); it is truncated or damaged. "
                    "Get it again."
                ) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._owner.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def names(self) -> list[str]:
        return list(self._owner)

    def tensor(self, name: str) -> torch.Tensor:
        owner = self._owner[name]
        tensor = owner[name] if isinstance(owner, dict) else owner.get_tensor(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def describe(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype without reading the values.

        Raises:
            ModelError: a dtype that cannot be made dense, such as float8.
        """
        owner = self._owner[name]
        if isinstance(owner, dict):
            return owner[name].shape, owner[name].dtype
        view = owner.get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise ModelError(
                f"{self.folder}: {name} is stored as {view.get_dtype()}, which is not read here; "
                "take the 16-bit model."
            )
        return torch.Size(view.get_shape()), _DTYPES[view.get_dtype()]
