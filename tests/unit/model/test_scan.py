"""The pass over a checkpoint's tensors: what is not finite is named, and two models told apart."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.errors import ModelError
from qlora_kit.model import scan as scan_module
from qlora_kit.model.scan import iterate_tensors, scan_weights
from qlora_kit.model.weights import weight_files

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(64, 128, generator=generator).to(dtype),
        "layers.0.weight": torch.randn(96, 64, generator=generator).to(dtype),
        "layers.1.weight": torch.randn(5, 7, generator=generator).to(dtype),
        "ids": torch.arange(9),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }


def save(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


def save_shards(folder: Path, values: dict[str, torch.Tensor], *cuts: int) -> Path:
    """In several files with an index; `cuts` are the positions where a file begins."""
    folder.mkdir(parents=True)
    names = list(values)
    ends = [*cuts, len(names)]
    weight_map = {}
    for number, (start, end) in enumerate(zip((0, *cuts), ends, strict=True)):
        file_name = f"part-{number}.safetensors"
        save_file({name: values[name] for name in names[start:end]}, folder / file_name)
        weight_map |= dict.fromkeys(names[start:end], file_name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 3000, -1])
def test_what_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, value: float, position: int
) -> None:
    values = tensors(dtype)
    values["layers.0.weight"].view(-1)[position] = value
    found = scan_weights(save(tmp_path, values))
    assert found.non_finite == ("layers.0.weight",)
    with pytest.raises(ModelError, match=r"layers\.0\.weight: holds NaN or infinity"):
        found.require_finite()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = tensors(dtype)
    values["layers.1.weight"].view(-1)[:4] = torch.tensor(
        [limits.max, limits.min, limits.tiny, -0.0], dtype=dtype
    )
    scan_weights(save(tmp_path, values)).require_finite()


def test_only_three_of_many_are_listed(tmp_path: Path) -> None:
    values = {f"t{number}": torch.tensor([float("nan")]) for number in range(5)}
    with pytest.raises(ModelError, match=r"t0, t1, t2 and 2 more: holds NaN"):
        scan_weights(save(tmp_path, values)).require_finite()


def test_nan_in_one_bf16_shard_of_several(tmp_path: Path) -> None:
    values = tensors(torch.bfloat16)
    values["layers.1.weight"][2, 2] = float("nan")
    assert scan_weights(save_shards(tmp_path / "m", values, 2, 3)).non_finite == (
        "layers.1.weight",
    )


def test_the_fingerprint_does_not_depend_on_shards_or_file_names(tmp_path: Path) -> None:
    values = tensors(torch.bfloat16)
    whole = scan_weights(save(tmp_path / "whole", values))
    assert scan_weights(save_shards(tmp_path / "two", values, 1)) == whole
    reversed_order = dict(reversed(values.items()))
    assert scan_weights(save_shards(tmp_path / "three", reversed_order, 1, 3)) == whole


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.weight", lambda t: t.view(-1)[2000].add_(0.5)),  # between the samples
        ("layers.0.weight", lambda t: t.view(-1)[0].add_(0.5)),
        ("layers.1.weight", lambda t: t.copy_(t.flip(0).clone())),  # the same sum
        ("ids", lambda t: t[8].add_(1)),
    ],
)
def test_any_changed_tensor_changes_the_fingerprint(
    tmp_path: Path, name: str, change: object
) -> None:
    before = scan_weights(save(tmp_path / "before", tensors())).fingerprint
    values = tensors()
    change(values[name])  # type: ignore[operator]
    assert scan_weights(save(tmp_path / "after", values)).fingerprint != before


def test_names_shapes_and_dtypes_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    ones = torch.ones(4, 6)
    variants = [
        {"a": ones},
        {"b": ones},
        {"a": ones.reshape(6, 4)},
        {"a": ones.to(torch.float64)},
        {"a": ones, "a_again": ones.clone()},
    ]
    found = {
        scan_weights(save(tmp_path / str(number), values)).fingerprint
        for number, values in enumerate(variants)
    }
    assert len(found) == len(variants)


def test_the_number_of_threads_is_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    values = {"w": torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0))}
    files = weight_files(save(tmp_path, values))
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(scan_module._scan(iterate_tensors(files)).fingerprint)
    torch.set_num_threads(1)
    assert len(found) == 1


class TestTheCache:
    def test_files_that_have_not_changed_are_not_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = save(tmp_path, tensors())
        first = scan_weights(folder)
        monkeypatch.setattr(scan_module, "_scan", lambda _: pytest.fail("read again"))
        assert scan_weights(folder) == first

    def test_a_changed_file_of_the_same_size_is(self, tmp_path: Path) -> None:
        folder = save(tmp_path, tensors())
        first = scan_weights(folder)
        values = load_file(folder / "model.safetensors")
        values["embed.weight"][1, 1] = float("nan")
        size = (folder / "model.safetensors").stat().st_size
        save(folder, values)
        assert (folder / "model.safetensors").stat().st_size == size
        second = scan_weights(folder)
        assert second.non_finite == ("embed.weight",)
        assert second.fingerprint != first.fingerprint

    def test_a_file_that_keeps_its_time_but_not_its_size_is(self, tmp_path: Path) -> None:
        folder = save(tmp_path, tensors())
        path = folder / "model.safetensors"
        first, stat = scan_weights(folder), path.stat()
        save(folder, {**tensors(), "more": torch.ones(3)})
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert scan_weights(folder) != first

    def test_a_file_that_keeps_its_time_and_its_size_is(self, tmp_path: Path) -> None:
        """As archives and `cp -p` leave it."""
        folder = save(tmp_path, tensors())
        path = folder / "model.safetensors"
        first, stat = scan_weights(folder), path.stat()
        values = tensors()
        values["embed.weight"][1, 1] += 1
        save(folder, values)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert scan_weights(folder).fingerprint != first.fingerprint

    @pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": "x"}', "\x00"])
    def test_a_damaged_entry_counts_as_none(self, tmp_path: Path, content: str) -> None:
        folder = save(tmp_path, tensors())
        first = scan_weights(folder)
        (kept,) = (Path(os.environ["QLORA_KIT_CACHE"]) / "scans").iterdir()
        kept.write_text(content)
        assert scan_weights(folder) == first

    def test_a_cache_that_cannot_be_written_to_stops_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "file"))
        assert not scan_weights(save(tmp_path / "model", tensors())).non_finite

    def test_nothing_but_the_entry_is_left_behind(self, tmp_path: Path) -> None:
        scan_weights(save(tmp_path, tensors()))
        (kept,) = (Path(os.environ["QLORA_KIT_CACHE"]) / "scans").iterdir()
        assert kept.suffix == ".json"
        assert not kept.name.startswith(".")


class TestPickles:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_have_the_fingerprint_of_the_same_safetensors(
        self, tmp_path: Path, zipped: bool
    ) -> None:
        whole = scan_weights(save(tmp_path / "safe", tensors()))
        folder = tmp_path / "pickled"
        folder.mkdir()
        torch.save(tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert scan_weights(folder, allow_pickle=True) == whole
        with pytest.raises(ModelError, match=r"pytorch_model\.bin\), which can run code"):
            scan_weights(folder)

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"no pickle", id="text"),
            pytest.param(b"", id="empty"),
            pytest.param(b"PK\x03\x04 cut off", id="cut off"),
        ],
    )
    def test_a_damaged_one_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin cannot be read as PyTorch"):
            scan_weights(tmp_path, allow_pickle=True)

    def test_one_that_would_run_code_does_not(self, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"w": torch.ones(2), "x": Payload()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="cannot be read as PyTorch weights"):
            scan_weights(tmp_path, allow_pickle=True)
        assert not (tmp_path / "ran").exists()

    def test_one_that_holds_no_tensors_by_name(self, tmp_path: Path) -> None:
        torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="holds a list and no weights by name"):
            scan_weights(tmp_path, allow_pickle=True)


def test_a_shard_that_breaks_off_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "m", tensors(), 2)
    shard = folder / "part-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"part-1\.safetensors is truncated"):
        scan_weights(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "m", tensors(), 2)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks part-1\.safetensors"):
        scan_weights(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    folder = save_shards(tmp_path / "m", tensors(), 2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        scan_weights(folder)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        scan_weights(tmp_path)


def test_weights_that_moved_are_still_the_same(tmp_path: Path) -> None:
    first = scan_weights(save(tmp_path / "one", tensors()))
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert scan_weights(tmp_path / "two") == first


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_file_is_not_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Neither mapped nor read: 64 MiB in four tensors, of which one is there at a time."""

    def mapped_mib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(one.split()[1]) for one in lines if one.startswith("RssFile")) / 1024

    path = tmp_path / "model.safetensors"
    save_file({f"weight.{n}": torch.ones(4 * 2**20) for n in range(4)}, path)
    before, most = mapped_mib(), 0.0
    for _, tensor in iterate_tensors([path]):
        assert float(tensor.sum()) == 4 * 2**20
        most = max(most, mapped_mib() - before)
    assert most < 8
