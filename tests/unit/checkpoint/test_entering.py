"""What is found in the folder of a run that is gone on with, and what is decided upon it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.checkpoint.checkpoints import publish_checkpoint
from qlora_kit.checkpoint.disk import DISK
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.checkpoint.entry import Entry, enter, require_same_work
from qlora_kit.checkpoint.fingerprints import (
    FINGERPRINTS_FILE,
    Fingerprints,
    SourcePrint,
    fingerprints_text,
)
from qlora_kit.checkpoint.global_batch import PROGRESS_FILE
from qlora_kit.checkpoint.run_directory import (
    RECIPE_RECORD,
    RunDirectory,
    finished_run,
    open_run,
)
from qlora_kit.errors import RunError
from qlora_kit.recipe import Recipe, load_recipe, recipe_from_dict, recipe_text, save_recipe

PRINTS = Fingerprints("b", "t", "c", "d" * 64, "e" * 64, "p", "h")
SOURCES = (
    SourcePrint("train", "a.jsonl", "1" * 64, 64),
    SourcePrint("train", "more.jsonl", "2" * 64, 8),
    SourcePrint("eval", "b.jsonl", "3" * 64, 10),
)


def recipe_in(folder: Path, path: str = "a.jsonl", **train: Any) -> Recipe:
    return recipe_from_dict(
        {
            "model": {"name_or_path": "demo/smollm2-135m-instruct"},
            "data": {"train": [{"path": path}], "eval": [{"path": "b.jsonl"}]},
            "train": {"optim": "adamw_torch_fused", **train},
            "run_dir": str(folder),
        },
        "test",
    )


def begun_run(folder: Path, recipe: Recipe, *steps: int, **shared: int) -> RunDirectory:
    """A run with whole checkpoints, as one process has written them unless `shared` says else."""
    folder.mkdir()
    batch = {"items_per_update": 16, "items_per_process": 16, "num_processes": 1, **shared}

    def fill(draft: Draft) -> None:
        draft.put("weights", [b"1234"])
        draft.put(PROGRESS_FILE, [json.dumps(batch).encode()])
        draft.put(RECIPE_RECORD, [recipe_text(recipe).encode()])
        draft.put(FINGERPRINTS_FILE, [fingerprints_text(PRINTS, SOURCES).encode()])

    for step in steps:
        publish_checkpoint(folder / f"checkpoint-{step}", fill)
    run = RunDirectory(folder)
    save_recipe(recipe, run.recipe)
    return run


def entered(
    recipe: Recipe, *, allow_drift: bool = False, num_processes: int = 1
) -> tuple[Entry, str]:
    with ExitStack() as held:
        entry = enter(recipe, allow_drift, held, DISK, num_processes, optimizer="adamw_torch_fused")
    return entry, "\n".join((*entry.said, *entry.warned))


class TestARecipeThatIsGone:
    def test_is_put_back_from_the_newest_whole_checkpoint(self, tmp_path: Path) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 4, 8, 12)
        run.recipe.unlink()
        (run.folder / "checkpoint-12" / "weights").write_bytes(b"1")
        entry, told = entered(recipe)
        assert (entry.is_new, entry.checkpoint) == (False, run.folder / "checkpoint-8")
        assert "training begins at the first update" not in told
        assert "recipe.yaml was gone; it is written again from checkpoint-8" in told
        assert load_recipe(run.recipe) == recipe

    def test_is_what_the_given_one_is_held_against(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.recipe.unlink()
        with pytest.raises(RunError, match=r"was begun otherwise:\n  - train.seed: 42 → 1"):
            entered(recipe_in(tmp_path / "run", seed=1))
        assert load_recipe(run.recipe) == recipe_in(tmp_path / "run")

    def test_without_a_whole_checkpoint_everything_is_named_and_left(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.recipe.unlink()
        run.adapter.mkdir()
        (run.folder / "checkpoint-4" / "weights").unlink()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunError) as refused:
            entered(recipe_in(tmp_path / "run"))
        said = str(refused.value)
        for words in ("checkpoint-4 (", "weights", "adapter", "recipe.yaml is gone", "--fresh"):
            assert words in said
        assert f"run_dir={run.folder}-2" in said
        assert sorted(tmp_path.rglob("*")) == before

    def test_with_an_adapter_alone_too(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"))
        run.recipe.unlink()
        run.adapter.mkdir()
        with pytest.raises(RunError, match=r"what a run has left \(adapter\), but its recipe"):
            entered(recipe_in(tmp_path / "run"))

    def test_of_a_finished_run_it_is_still_known_what_differs(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.recipe.unlink()
        run.summary.write_text("{}")
        with pytest.raises(RunError, match=r"finished run of another recipe:\n  - train.seed: 42"):
            entered(recipe_in(tmp_path / "run", seed=1))

    def test_other_commands_say_where_a_copy_is(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.recipe.unlink()
        with pytest.raises(RunError, match=r"Copy .*checkpoint-4/checkpoint_recipe.yaml to "):
            open_run(run.folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"model: {name_or_", b"data: {train: 3}\n"])
class TestARecipeThatCannotBeRead:
    def test_is_set_aside_and_put_back(self, tmp_path: Path, content: bytes) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 4)
        run.recipe.write_bytes(content)
        entry, told = entered(recipe)
        assert entry.checkpoint == run.folder / "checkpoint-4"
        assert "cannot be read and is set aside as recipe.yaml.damaged" in told
        assert load_recipe(run.recipe) == recipe
        assert (run.folder / "recipe.yaml.damaged").read_bytes() == content

    def test_without_a_checkpoint_is_left(self, tmp_path: Path, content: bytes) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"))
        run.adapter.mkdir()
        run.recipe.write_bytes(content)
        with pytest.raises(RunError, match=r"its recipe.yaml cannot be read"):
            entered(recipe_in(tmp_path / "run"))
        assert run.recipe.read_bytes() == content


class TestASummaryThatIsDamaged:
    def test_is_measured_again_from_the_checkpoint(self, tmp_path: Path) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 4)
        run.summary.write_text("")
        assert finished_run(recipe) is None
        entry, told = entered(recipe)
        assert entry.checkpoint == run.folder / "checkpoint-4"
        assert "summary.json is damaged and is set aside as summary.json.damaged" in told
        assert not run.summary.exists()

    def test_without_a_checkpoint_nothing_is_trained_again(self, tmp_path: Path) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe)
        run.summary.write_text('{"hol')
        with pytest.raises(RunError, match=r"summary.json is damaged, and there is no checkpoint"):
            entered(recipe)
        assert run.summary.read_text() == '{"hol'


class TestAFolderWhoseRecipeIsNewerThanItsCheckpoint:
    """A run went on with other values, which was allowed, and was killed before it saved."""

    def begun(self, folder: Path) -> RunDirectory:
        run = begun_run(folder, recipe_in(folder), 4)
        save_recipe(recipe_in(folder, seed=1), run.recipe)
        return run

    def test_the_checkpoint_was_not_trained_by_it(self, tmp_path: Path) -> None:
        self.begun(tmp_path / "run")
        changed = recipe_in(tmp_path / "run", seed=1)
        with pytest.raises(RunError, match=r"train.seed: 42 → 1"):
            entered(changed)
        entry, told = entered(changed, allow_drift=True)
        assert "train.seed: 42 → 1" in told
        assert not entry.is_changed  # the folder's is the one that is asked for

    def test_going_back_to_the_first_changes_nothing(self, tmp_path: Path) -> None:
        self.begun(tmp_path / "run")
        entry, told = entered(recipe_in(tmp_path / "run"))
        assert "changed since" not in told
        assert entry.is_changed

    def test_without_a_checkpoint_the_folder_s_counts(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"))
        save_recipe(recipe_in(tmp_path / "run", seed=1), run.recipe)
        assert "changed since" not in entered(recipe_in(tmp_path / "run", seed=1))[1]


class TestAnOptimizerLeftToTheKit:
    def test_of_a_new_run_is_that_of_the_machine(self, tmp_path: Path) -> None:
        entry, _ = entered(recipe_in(tmp_path / "run", optim="auto"))
        assert entry.recipe == recipe_in(tmp_path / "run", optim="adamw_torch_fused")

    def test_of_a_begun_run_is_that_of_its_checkpoint(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        begun = recipe_in(folder, optim="paged_adamw_8bit")
        run = begun_run(folder, begun, 4)
        run.log.write_text("{}\n")
        entry, told = entered(recipe_in(folder, optim="auto"))
        assert (entry.recipe, entry.is_changed) == (begun, False)
        assert "changed since" not in told
        assert "training begins at the first update" not in told
        assert entry.warned == ()
        save_recipe(recipe_in(folder, optim="sgd"), run.recipe)
        entry, _ = entered(recipe_in(folder, optim="auto"))
        assert (entry.recipe, entry.is_changed) == (begun, True)

    def test_of_a_run_that_has_trained_nothing_yet_is_its_own_too(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        begun_run(folder, recipe_in(folder, optim="paged_adamw_8bit"))
        entry, told = entered(recipe_in(folder, optim="auto"))
        assert entry.recipe.train.optim == "paged_adamw_8bit"
        assert "optimizer paged_adamw_8bit (auto: with which the run was begun" in told
        assert "training begins at the first update" in told

    def test_of_a_recipe_that_is_gone_is_the_copy_s(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        run = begun_run(folder, recipe_in(folder, optim="sgd"), 4)
        run.recipe.unlink()
        entry, _ = entered(recipe_in(folder, optim="auto"))
        assert (entry.recipe.train.optim, entry.is_changed) == ("sgd", False)

    def test_that_somebody_has_left_open_in_the_folder_is_the_machine_s(
        self, tmp_path: Path
    ) -> None:
        folder = tmp_path / "run"
        begun_run(folder, recipe_in(folder, optim="auto"), 4)
        entry, _ = entered(recipe_in(folder, optim="auto"))
        assert (entry.recipe.train.optim, entry.is_changed) == ("adamw_torch_fused", True)

    @pytest.mark.parametrize("steps", [(), (4,)])
    def test_that_does_not_go_with_the_recipe_is_refused(
        self, tmp_path: Path, steps: tuple[int, ...]
    ) -> None:
        """Or the folder would come to hold a recipe that nothing reads any more."""
        folder = tmp_path / "run"
        run = begun_run(folder, recipe_in(folder, optim="sgd"), *steps)
        before = run.recipe.read_bytes()
        for allow_drift in (False, True):
            with pytest.raises(RunError, match=r"train.optim: sgd, and train.adam_beta1"):
                entered(recipe_in(folder, optim="auto", adam_beta1=0.8), allow_drift=allow_drift)
        assert run.recipe.read_bytes() == before

    def test_that_is_named_is_another(self, tmp_path: Path) -> None:
        begun_run(tmp_path / "run", recipe_in(tmp_path / "run", optim="paged_adamw_8bit"), 4)
        with pytest.raises(RunError, match=r"train.optim: paged_adamw_8bit → adamw_torch_fused"):
            entered(recipe_in(tmp_path / "run", optim="adamw_torch_fused"))


class TestProcesses:
    def test_the_same_global_batch_by_hand_is_accepted(self, tmp_path: Path) -> None:
        """Two processes with 4 × 4 become one with 4 × 8."""
        begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4, items_per_update=32, **TWO)
        _, told = entered(recipe_in(tmp_path / "run", gradient_accumulation_steps=8))
        assert "processes: 2 → 1 (an update still trains on the same 32 sequences" in told
        assert "gradient_accumulation_steps: 4 → 8 (an update still trains on the same 32" in told
        assert "not the same run" not in told

    def test_another_global_batch_breaks_and_the_way_back_is_told(self, tmp_path: Path) -> None:
        begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4, items_per_update=32, **TWO)
        with pytest.raises(RunError) as refused:
            entered(recipe_in(tmp_path / "run", gradient_accumulation_steps=2))
        assert "trains on 8 sequences (4 × 2) instead of 32" in str(refused.value)
        assert "gradient_accumulation_steps: 8 keeps 32" in str(refused.value)
        with pytest.raises(RunError, match=r"64 sequences \(4 × 8 on each of 2 processes\)"):
            entered(recipe_in(tmp_path / "run", gradient_accumulation_steps=8), num_processes=2)

    def test_random_states_that_are_not_put_back_are_told(self, tmp_path: Path) -> None:
        noisy = recipe_in(tmp_path / "run", neftune_noise_alpha=5.0)
        begun_run(tmp_path / "run", noisy, 4, items_per_update=32, **TWO)
        assert "is not put back: dropout and noise are drawn anew" in entered(noisy)[1]
        assert "not put back" not in entered(noisy, num_processes=2)[1]
        quiet = recipe_in(tmp_path / "other")
        begun_run(tmp_path / "other", quiet, 4, items_per_update=32, **TWO)
        told = entered(quiet)[1]
        assert "processes: 2 → 1" in told
        assert "not put back" not in told


TWO = {"num_processes": 2}


class TestData:
    def run_of(self, folder: Path) -> tuple[Path, Entry]:
        """One whose rows are now in another file."""
        begun_run(folder, recipe_in(folder), 4)
        entry, _ = entered(recipe_in(folder, path="renamed.jsonl"))
        assert entry.checkpoint is not None
        return entry.checkpoint, entry

    def test_another_name_for_the_same_rows_is_accepted_and_listed(self, tmp_path: Path) -> None:
        checkpoint, entry = self.run_of(tmp_path / "run")
        drift = require_same_work(checkpoint, PRINTS, False, SOURCES, entry.undecided)
        (change,) = drift.accepted
        assert str(change).startswith("data.train.0.path: a.jsonl → renamed.jsonl (the rows are")
        assert not drift.breaking
        assert entry.is_changed

    def test_the_name_is_not_noted_before_that_is_known(self, tmp_path: Path) -> None:
        self.run_of(tmp_path / "run")
        kept = load_recipe(tmp_path / "run" / "recipe.yaml")
        assert kept.data.train[0].path == "a.jsonl"

    def test_other_rows_are_refused_and_the_files_named(self, tmp_path: Path) -> None:
        checkpoint, entry = self.run_of(tmp_path / "run")
        now = (
            SourcePrint("train", "renamed.jsonl", "9" * 64, 70),
            replace(SOURCES[1], digest="8" * 64, num_rows=9),
            SOURCES[2],
        )
        prints = replace(PRINTS, data_train="f" * 64)
        with pytest.raises(RunError) as refused:
            require_same_work(checkpoint, prints, False, now, entry.undecided)
        said = str(refused.value)
        assert "a.jsonl (64 rows, digest 111111111111) is not read any more" in said
        assert "renamed.jsonl (70 rows, digest 999999999999) is new" in said
        changed = (
            "more.jsonl was changed (8 rows, digest 222222222222 → 9 rows, digest 888888888888)"
        )
        assert changed in said
        assert "data.train.0.path: a.jsonl → renamed.jsonl" in said
        assert "1" * 13 not in said
        assert "b.jsonl" not in said

    def test_where_no_file_changed_that_is_said(self, tmp_path: Path) -> None:
        checkpoint, _ = self.run_of(tmp_path / "run")
        with pytest.raises(RunError, match="data_eval: its files are as they were"):
            require_same_work(checkpoint, replace(PRINTS, data_eval="f" * 64), False, SOURCES)

    def test_a_digest_is_short(self, tmp_path: Path) -> None:
        checkpoint, _ = self.run_of(tmp_path / "run")
        drift = require_same_work(checkpoint, replace(PRINTS, data_train="f" * 64), True)
        assert str(drift.breaking[0]).startswith("data_train: dddddddddddd → ffffffffffff (")

    def test_without_a_checkpoint_there_are_no_rows_to_hold_them_against(
        self, tmp_path: Path
    ) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"))
        run.adapter.mkdir()
        with pytest.raises(RunError, match=r"data.train.0.path: a.jsonl → renamed.jsonl"):
            entered(recipe_in(tmp_path / "run", path="renamed.jsonl"))


class TestAFinishedRun:
    def test_what_differs_is_named_field_by_field(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.summary.write_text("{}")
        with pytest.raises(RunError) as refused:
            entered(recipe_in(tmp_path / "run", seed=1, logging_steps=9))
        said = str(refused.value)
        assert "already holds a finished run of another recipe:\n" in said
        assert "  - train.logging_steps: 5 → 9\n  - train.seed: 42 → 1\n" in said
        assert "--fresh" in said
        assert f"run_dir={run.folder}-2" in said

    def test_many_differences_are_cut(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.summary.write_text("{}")
        values = dict.fromkeys(NUMBERS, 7)
        other = recipe_in(tmp_path / "run", **values).model_dump(mode="json")
        other["lora"] |= {"r": 3, "alpha": 4, "dropout": 0.5, "use_rslora": True}
        other["evaluate"] |= {"perplexity": False, "baseline": False}
        with pytest.raises(RunError) as refused:
            entered(recipe_from_dict(other, "test"))
        assert "  - and 1 more\nIt is finished" in str(refused.value)
        assert str(refused.value).count("\n  - ") == 21

    def test_the_same_recipe_is_said_to_be_the_same(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        run.summary.write_text("{}")
        with pytest.raises(RunError, match="a finished run of this very recipe"):
            entered(recipe_in(tmp_path / "run"))


NUMBERS = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "loraplus_lr_ratio",
    "warmup_steps",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "logging_steps",
    "save_minutes",
    "save_total_limit",
    "max_memory_mib",
)


class TestFingerprintsOfAnotherVersion:
    def rewritten(self, folder: Path, content: str) -> Path:
        folder.mkdir()
        (folder / FINGERPRINTS_FILE).write_text(content)
        return folder

    def test_what_a_newer_one_has_added_is_passed_over(self, tmp_path: Path) -> None:
        values = {**json.loads(fingerprints_text(PRINTS, SOURCES)), "phase_of_moon": "full"}
        values["sources"].append({"part": "train"})
        values["sources"][0]["colour"] = "red"
        checkpoint = self.rewritten(tmp_path / "one", json.dumps(values))
        assert require_same_work(checkpoint, PRINTS, False, SOURCES).all == ()

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"base": "b"}', "without tokenizer, chat_template, data_train"),
            ("[]", "no mapping"),
            ("{", "Expecting"),
            (fingerprints_text(PRINTS).replace('"b"', "3"), "no text at base"),
        ],
    )
    def test_what_is_missing_is_named(self, tmp_path: Path, content: str, said: str) -> None:
        checkpoint = self.rewritten(tmp_path / "one", content)
        with pytest.raises(RunError, match="another version has written it") as refused:
            require_same_work(checkpoint, PRINTS, True)
        assert said in str(refused.value)
        assert "--fresh" in str(refused.value)


class TestWhatNobodyCanGoOnFrom:
    """Other tensors are trained, so that those of the checkpoint have no place."""

    @pytest.mark.parametrize(
        "change",
        [
            {"lora": {"r": 4}},
            {"lora": {"target_modules": ["q_proj"]}},
            {"lora": {"use_dora": True}},
            {"train": {"loraplus_lr_ratio": 16.0}},
        ],
    )
    def test_is_refused_even_where_drift_is_allowed(
        self, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 5)
        before = run.recipe.read_bytes()
        changed = recipe_from_dict({**recipe.model_dump(exclude_unset=True), **change}, "test")
        with pytest.raises(RunError, match="--allow-drift cannot help"):
            entered(changed, allow_drift=True)
        assert run.recipe.read_bytes() == before

    def test_is_what_begins_anew_where_there_is_no_checkpoint(self, tmp_path: Path) -> None:
        recipe = recipe_in(tmp_path / "run")
        begun_run(tmp_path / "run", recipe)
        changed = recipe_from_dict(
            {**recipe.model_dump(exclude_unset=True), "lora": {"r": 4}}, "test"
        )
        entry, _ = entered(changed)
        assert entry.checkpoint is None


def test_updates_without_a_checkpoint_are_warned_of(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "run")
    run = begun_run(tmp_path / "run", recipe)
    entry, _ = entered(recipe)
    assert "no checkpoint" in "".join(entry.said)
    run.log.write_text('{"step": 1}\n')
    entry, _ = entered(recipe)
    assert "holds a log of updates, but no checkpoint" in entry.warned[0]


class TestDraftsOfMergesAndExports:
    HEX = "0123456789abcdef0123456789abcdef"

    def test_of_a_killed_run_are_cleared(self, tmp_path: Path) -> None:
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 4)
        run.exports.mkdir()
        names = (".merged", ".merged-original", ".quantized", ".exports", "exports/.gguf-q4_k_m")
        for name in names:
            (run.folder / f"{name}.{self.HEX}.draft" / "inside").mkdir(parents=True)
        (run.folder / ".merged.mine").mkdir()
        entered(recipe)
        assert not list(run.folder.rglob("*.draft"))
        assert (run.folder / ".merged.mine").is_dir()

    def test_of_a_finished_run_stay(self, tmp_path: Path) -> None:
        """They may be of a `merge` or an `export` that is at work."""
        recipe = recipe_in(tmp_path / "run")
        run = begun_run(tmp_path / "run", recipe, 4)
        run.summary.write_text("{}")
        draft = run.folder / f".merged.{self.HEX}.draft"
        draft.mkdir()
        with pytest.raises(RunError):
            entered(recipe)
        assert draft.is_dir()


class TestAnotherVersionOfThisProgram:
    def test_is_accepted_and_listed(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        checkpoint = run.folder / "checkpoint-4"
        before, now = (replace(PRINTS, qlora_kit=f"0.1.0 at {one * 40}") for one in "ab")
        (checkpoint / FINGERPRINTS_FILE).write_text(fingerprints_text(before))
        drift = require_same_work(checkpoint, now, False)
        assert [one.field for one in drift.accepted] == ["qlora_kit"]
        assert drift.breaking == ()

    def test_of_one_that_did_not_say_it_is_unknown(self, tmp_path: Path) -> None:
        run = begun_run(tmp_path / "run", recipe_in(tmp_path / "run"), 4)
        checkpoint = run.folder / "checkpoint-4"
        values = json.loads((checkpoint / FINGERPRINTS_FILE).read_text())
        del values["qlora_kit"]
        (checkpoint / FINGERPRINTS_FILE).write_text(json.dumps(values))
        now = replace(PRINTS, qlora_kit="0.1.0")
        assert require_same_work(checkpoint, now, False).all == ()
