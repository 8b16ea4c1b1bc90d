"""Which changes to a recipe a run can be continued with, and what comes of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, ClassVar, get_args

import pytest

from qlora_kit.checkpoint.drift import (
    BREAKING,
    HARMLESS,
    WEIGHED,
    Drift,
    compare,
    lines_of,
    refusal,
)
from qlora_kit.checkpoint.fingerprints import Fingerprints, differences
from qlora_kit.checkpoint.global_batch import GlobalBatch
from qlora_kit.recipe import Recipe, recipe_from_dict
from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.shape import is_spec, members


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name_or_path": "demo/smollm2-135m-instruct"},
        "data": {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]},
    }
    for name, section in sections.items():
        there = values.get(name)
        values[name] = {**there, **section} if isinstance(there, dict) else section
    return recipe_from_dict(values, "test")


def train_drift(before: dict[str, Any], now: dict[str, Any]) -> Drift:
    return compare(recipe(train=before), recipe(train=now))


def names(drift: Drift) -> tuple[list[str], list[str]]:
    return [one.field for one in drift.accepted], [one.field for one in drift.breaking]


def all_fields(spec: type[Spec], path: str = "") -> Iterator[str]:
    """Every field of the recipe that holds a value, without the numbers of list entries."""
    for name, field in spec.model_fields.items():
        below = f"{path}.{name}" if path else name
        parts = [
            part
            for member in members(field.annotation)
            for part in (get_args(member) or [member])
            if is_spec(part)
        ]
        if not parts or not is_spec(field.annotation):
            yield below
        for part in parts:
            yield from all_fields(part, below)


class TestTheTables:
    def test_every_field_is_classified_exactly_once(self) -> None:
        """A new field of `train`, `evaluate`, `export` or the top has to be decided upon; one of
        the other sections breaks unless it is named as harmless."""
        known = set(all_fields(Recipe))
        assert len(known) > 90
        for field in known:
            section = field.partition(".")[0]
            tables = [field in HARMLESS, field in BREAKING, field in WEIGHED]
            if section in BREAKING:
                assert sum(tables) <= 1, field
            else:
                assert sum(tables) == 1, f"{field}: harmless or breaking? (checkpoint/drift.py)"

    def test_they_name_nothing_that_is_not_there(self) -> None:
        known = {*all_fields(Recipe), *Recipe.model_fields}
        assert {*HARMLESS, *BREAKING, *WEIGHED} <= known

    def test_what_decides_the_result_breaks(self) -> None:
        for section in ("model", "quantization", "lora", "data"):
            assert section in BREAKING
        harmless = {name.partition(".")[0] for name in HARMLESS}
        assert harmless == {"run_dir", "data", "train", "evaluate", "export"}


class TestComparing:
    def test_the_same_recipe_has_no_drift(self) -> None:
        assert compare(recipe(), recipe()) == Drift()
        assert lines_of(Drift()) == ()

    @pytest.mark.parametrize(
        ("section", "change", "field"),
        [
            ("train", {"logging_steps": 9}, "train.logging_steps"),
            ("train", {"report_to": ["tensorboard"]}, "train.report_to"),
            ("train", {"save_strategy": "no", "save_total_limit": 2}, "train.save_strategy"),
            ("train", {"save_total_limit": None}, "train.save_total_limit"),
            ("train", {"gradient_checkpointing": False}, "train.gradient_checkpointing"),
            ("train", {"per_device_eval_batch_size": 1}, "train.per_device_eval_batch_size"),
            ("train", {"eval_strategy": "epoch"}, "train.eval_strategy"),
            ("evaluate", {"generate": {}}, "evaluate.generate"),
            ("evaluate", {"baseline": False}, "evaluate.baseline"),
            ("export", {"merge": True}, "export.merge"),
            ("export", {"merge_options": {"max_kl": 0.5}}, "export.merge_options.max_kl"),
            ("run_dir", "elsewhere", "run_dir"),
        ],
    )
    def test_what_training_does_not_notice_is_accepted(
        self, section: str, change: Any, field: str
    ) -> None:
        assert names(compare(recipe(), recipe(**{section: change}))) == ([field], [])

    @pytest.mark.parametrize(
        ("section", "change", "field"),
        [
            ("model", {"name_or_path": "other/model"}, "model.name_or_path"),
            ("model", {"chat_template": "chatml"}, "model.chat_template"),
            ("model", {"trust_remote_code": True}, "model.trust_remote_code"),
            ("quantization", {"quant_type": "fp4"}, "quantization.quant_type"),
            ("lora", {"r": 8}, "lora.r"),
            ("lora", {"rank_pattern": {"q_proj": 4}}, "lora.rank_pattern"),
            ("data", {"max_length": 99}, "data.max_length"),
            ("data", {"seed": 1}, "data.seed"),
            ("train", {"seed": 1}, "train.seed"),
            ("train", {"optim": "adamw_torch"}, "train.optim"),
            ("train", {"learning_rate": 1e-5}, "train.learning_rate"),
            ("train", {"lr_scheduler_type": "linear"}, "train.lr_scheduler_type"),
            ("train", {"precision": "fp32"}, "train.precision"),
        ],
    )
    def test_what_makes_it_another_run_breaks(
        self, section: str, change: dict[str, Any], field: str
    ) -> None:
        drift = compare(recipe(), recipe(**{section: change}))
        assert names(drift) == ([], [field])
        assert "not known" not in drift.breaking[0].consequence

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"train": [{"path": "c.jsonl"}]}, "data.train.0.path"),
            ({"train": [{"path": "a.jsonl"}, {"path": "c.jsonl"}]}, "data.train"),
            ({"eval": []}, "data.eval"),
            ({"eval": [{"path": "b.jsonl", "columns": {"text": "t"}}]}, "data.eval.0.columns"),
        ],
    )
    def test_of_other_names_for_the_data_the_rows_decide(
        self, change: dict[str, Any], field: str
    ) -> None:
        drift = compare(recipe(), recipe(data=change))
        assert names(drift) == ([], [])
        assert [one.field for one in drift.undecided] == [field]
        assert names(drift.decided()) == ([], [field])
        assert names(drift.decided(("train", "eval"))) == ([field], [])
        part = field.split(".")[1]
        assert names(drift.decided({"train", "eval"} - {part})) == ([], [field])

    def test_of_a_stream_nobody_knows_the_rows(self) -> None:
        stream = {"data": {"streaming": True}, "train": {"max_steps": 9}}
        renamed = {**stream, "data": {"streaming": True, "train": [{"path": "c.jsonl"}]}}
        assert names(compare(recipe(**stream), recipe(**renamed)))[1] == ["data.train.0.path"]

    def test_both_values_are_told(self) -> None:
        (change,) = compare(recipe(), recipe(lora={"r": 8})).breaking
        assert (change.before, change.now) == (16, 8)
        assert str(change).startswith("lora.r: 16 → 8 (other tensors are trained")
        assert not change.is_possible

    def test_a_section_that_comes_and_goes(self) -> None:
        with_answers = recipe(evaluate={"generate": {}})
        (change,) = compare(with_answers, recipe()).accepted
        assert change.before["max_new_tokens"] == 128
        assert str(change).startswith("evaluate.generate: {'metrics':")
        assert "→ unset" in str(change)
        fewer = recipe(evaluate={"generate": {"max_rows": 5}})
        assert names(compare(with_answers, fewer)) == (["evaluate.generate.max_rows"], [])

    def test_a_new_source_is_shown_as_it_would_be_written(self) -> None:
        now = recipe(data={"train": [{"path": "a.jsonl"}, {"path": "c.jsonl"}]})
        (change,) = compare(recipe(), now).undecided
        assert [one["path"] for one in change.now] == ["a.jsonl", "c.jsonl"]


class TestTheBatch:
    @pytest.mark.parametrize(("size", "accumulation"), [(1, 16), (16, 1), (2, 8)])
    def test_the_same_product_is_the_same_batch(self, size: int, accumulation: int) -> None:
        now = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        drift = train_drift({}, now)
        assert len(drift.accepted) == 2
        assert drift.breaking == ()
        for change in drift.accepted:
            assert "the same 16 sequences" in change.consequence
            assert "rounding, so not to the bit" in change.consequence

    def test_draws_that_go_by_micro_batch_are_named(self) -> None:
        now = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        noisy = {"neftune_noise_alpha": 5.0}
        drift = train_drift(noisy, {**noisy, **now})
        assert "draws of dropout or noise" in drift.accepted[0].consequence
        dropout = {"dropout": 0.1}
        drift = compare(recipe(lora=dropout), recipe(lora=dropout, train=now))
        assert "draws of dropout or noise" in drift.accepted[0].consequence

    def test_another_product_breaks_whichever_was_changed(self) -> None:
        drift = train_drift({}, {"per_device_train_batch_size": 8})
        assert names(drift) == ([], ["train.per_device_train_batch_size"])
        assert "32 sequences (8 × 4) instead of 16" in drift.breaking[0].consequence
        drift = train_drift({}, {"gradient_accumulation_steps": 1})
        assert names(drift) == ([], ["train.gradient_accumulation_steps"])

    @pytest.mark.parametrize(
        ("processes", "accumulation", "kept"),
        [(1, 8, True), (1, 4, True), (1, 2, False), (2, 2, False), (4, 2, True), (4, 4, True)],
    )
    def test_it_is_that_of_all_processes(
        self, processes: int, accumulation: int, kept: bool
    ) -> None:
        """Of 2 with 4 × 4; the same rule as `train.continuation` goes by."""
        begun = GlobalBatch(items_per_update=32, items_per_process=16, num_processes=2)
        now = recipe(train={"gradient_accumulation_steps": accumulation})
        drift = compare(recipe(), now, begun, processes)
        assert (drift.breaking == ()) == kept
        assert (begun.from_here_on(4 * accumulation, processes) == 32) == kept
        told = [one for one in drift.accepted if one.field == "processes"]
        assert bool(told) == (processes != 2)

    def test_without_a_checkpoint_the_processes_are_those_of_now(self) -> None:
        now = recipe(train={"gradient_accumulation_steps": 2})
        (change,) = compare(recipe(), now, num_processes=2).breaking
        assert "16 sequences (4 × 2 on each of 2 processes) instead of 32" in change.consequence
        assert "gradient_accumulation_steps: 4 keeps 32" in change.consequence


class TestTheLength:
    @pytest.mark.parametrize(
        ("field", "before", "now"), [("num_train_epochs", 1.0, 3.0), ("max_steps", 100, 300)]
    )
    def test_more_is_accepted_and_less_is_not(self, field: str, before: Any, now: Any) -> None:
        drift = train_drift({field: before}, {field: now})
        assert names(drift) == ([f"train.{field}"], [])
        assert "goes on for longer; cosine is spread over" in drift.accepted[0].consequence
        drift = train_drift({field: now}, {field: before})
        assert names(drift) == ([], [f"train.{field}"])
        assert "not undone" in drift.breaking[0].consequence

    @pytest.mark.parametrize(
        ("schedule", "depends"),
        [
            ({"lr_scheduler_type": "constant"}, False),
            ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}, False),
            ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, True),
            ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 10}, False),
            ({"lr_scheduler_type": "linear", "warmup_steps": 10}, True),
            ({"lr_scheduler_type": "cosine", "warmup_steps": 0}, True),
        ],
    )
    def test_the_schedule_is_spread_or_is_not(
        self, schedule: dict[str, Any], depends: bool
    ) -> None:
        drift = train_drift(schedule, {**schedule, "num_train_epochs": 2.0})
        (change,) = drift.accepted
        assert ("planned so from the start" in change.consequence) == depends
        assert ("does not depend on it" in change.consequence) != depends

    def test_epochs_and_steps_cannot_be_compared(self) -> None:
        for before, now in (({}, {"max_steps": 100}), ({"max_steps": 100}, {})):
            assert names(train_drift(before, now)) == ([], ["train.max_steps"])

    def test_epochs_that_steps_override_have_no_effect(self) -> None:
        drift = train_drift({"max_steps": 9}, {"max_steps": 9, "num_train_epochs": 0.5})
        assert names(drift) == (["train.num_train_epochs"], [])
        assert "no effect" in drift.accepted[0].consequence


def test_a_schedule_that_reads_the_eval_loss_makes_its_cadence_matter() -> None:
    plateau = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 10,
    }
    assert names(train_drift(plateau, {**plateau, "eval_steps": 5})) == ([], ["train.eval_steps"])
    steps = {"eval_strategy": "steps", "eval_steps": 10}
    assert names(train_drift(steps, {**steps, "eval_steps": 5})) == (["train.eval_steps"], [])


class TestTheSchedule:
    PLATEAU: ClassVar = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "epoch",
    }

    @pytest.mark.parametrize(
        ("before", "now", "said"),
        [
            ({"eval_strategy": "epoch"}, PLATEAU, "begins at train.learning_rate"),
            (PLATEAU, {"eval_strategy": "epoch"}, "cosine goes on at the update reached"),
            (PLATEAU, {**PLATEAU, "learning_rate": 1e-5}, "how much it was lowered so far stays"),
            (
                PLATEAU,
                {**PLATEAU, "lr_scheduler_kwargs": {"factor": 0.5}},
                "how much it was lowered so far stays",
            ),
            ({}, {"learning_rate": 1e-5}, "is not the one that the run was begun with"),
        ],
    )
    def test_what_becomes_of_the_rate_is_said(
        self, before: dict[str, Any], now: dict[str, Any], said: str
    ) -> None:
        (change,) = train_drift(before, now).breaking
        assert said in change.consequence


class TestFingerprints:
    SAVED = Fingerprints(**{field.name: f"{field.name} 1" for field in fields(Fingerprints)})

    def test_the_same_ones_do_not_differ(self) -> None:
        assert differences(self.SAVED, self.SAVED) == Drift()

    @pytest.mark.parametrize("name", [field.name for field in fields(Fingerprints)])
    def test_each_is_compared_and_has_words(self, name: str) -> None:
        drift = differences(self.SAVED, replace(self.SAVED, **{name: "2"}))
        (change,) = drift.accepted + drift.breaking
        assert (change.field, change.before, change.now) == (name, f"{name} 1", "2")
        assert change.consequence
        assert bool(drift.accepted) == (
            name in ("packages", "hardware", "native_bf16", "qlora_kit")
        )

    def test_what_an_earlier_version_did_not_write_is_not_compared(self) -> None:
        assert differences(replace(self.SAVED, compute=""), self.SAVED) == Drift()

    def test_settings_of_the_base_are_told_by_name(self) -> None:
        saved, now = (replace(self.SAVED, model_config=f'{{"scale": {n}}}') for n in (1, 2))
        (change,) = differences(saved, now).breaking
        assert change.difference == "model_config: scale 1 → 2"


class TestWords:
    def test_accepted_and_breaking_changes_stand_apart(self) -> None:
        drift = compare(recipe(), recipe(lora={"r": 8}, train={"logging_steps": 9}))
        lines = lines_of(drift)
        assert lines[0].endswith("and accepted:")
        assert lines[1].startswith("  - train.logging_steps: 5 → 9 (")
        assert lines[2].endswith("not the same run:")
        assert lines[3].startswith("  - lora.r: 16 → 8 (")

    def test_a_refusal_says_what_and_what_to_do(self) -> None:
        said = refusal(compare(recipe(), recipe(lora={"r": 8})), "runs/x")
        assert "runs/x was begun otherwise:\n  - lora.r: 16 → 8" in said
        assert "--allow-drift" in said
        assert "--fresh" in said

    def test_drifts_of_recipe_and_fingerprints_add_up(self) -> None:
        one = compare(recipe(), recipe(lora={"r": 8}))
        other = differences(
            TestFingerprints.SAVED, replace(TestFingerprints.SAVED, base="2", packages="2")
        )
        assert names(one + other) == (["packages"], ["lora.r", "base"])

    def test_long_values_are_cut(self) -> None:
        now = recipe(model={"name_or_path": "x" * 500})
        (change,) = compare(recipe(), now).breaking
        assert len(str(change)) < 250

    def test_values_are_written_as_in_a_recipe(self) -> None:
        (change,) = compare(recipe(), recipe(export={"merge": True})).accepted
        assert str(change).startswith("export.merge: false → true")
