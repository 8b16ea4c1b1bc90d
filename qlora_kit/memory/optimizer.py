"""What an optimizer keeps from one update to the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_kit.model.qat.room import STATE_BYTES

# bitsandbytes keeps 8 bits for tensors of so many numbers and more, with a scale for each block.
_FEWEST_IN_8_BITS = 4096
_BLOCK_SIZE = 256
_FLOAT_BYTES = 4


def state_bytes(optim: str, sizes: Iterable[int]) -> int:
    """Args: sizes: how many numbers each trained tensor has."""
    each = STATE_BYTES[optim]
    if "8bit" not in optim:
        return int(each * sum(sizes))
    return int(sum(each * _bytes_of_state(size) for size in sizes))


def checkpoint_bytes(optim: str, sizes: Sequence[int]) -> int:
    """Of a copy of what is trained, in 32 bits, and of the optimizer's state."""
    return _FLOAT_BYTES * sum(sizes) + state_bytes(optim, sizes)


def _bytes_of_state(size: int) -> int:
    """Of one of its states, which takes a byte a number where it is large."""
    return size + 4 * -(-size // _BLOCK_SIZE) if size >= _FEWEST_IN_8_BITS else 4 * size
