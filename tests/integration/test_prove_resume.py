"""prove-resume on a tiny model: three real processes, one of them killed."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Call, write_recipe


def test_a_killed_run_is_proved_to_be_the_same(
    tmp_path: Path, tiny_llama: Path, call: Call
) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama, lora={"r": 4, "alpha": 8, "dropout": 0.1}, export={"merge": False}
    )
    kept = tmp_path / "kept"
    said = call("prove-resume", str(recipe), "--keep", str(kept), "--json")
    assert said.code == 0, said.err
    proof = json.loads(said.out)
    assert proof["holds"]
    assert proof["whole"]["losses"] == proof["resumed"]["losses"]
    assert len(proof["whole"]["losses"]) == 6
    assert proof["killed_after"] < 6
    assert "to the last bit" in said.err
    assert (kept / "killed" / "adapter").is_dir()
    again = call("prove-resume", str(recipe), "--keep", str(kept))
    assert again.code == 1
    assert "is there already" in again.err
