"""From a run to what is deployed: made from the right merge, measured, recorded, or not there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from transformers import AutoModelForCausalLM

from qlora_kit.artifact.record import read_record
from qlora_kit.artifact.verify import verify
from qlora_kit.environment import probe_hardware
from qlora_kit.errors import AdapterError, DataError, ModelError, QloraKitError, RunError
from qlora_kit.export.export import _better, _Made, export_reopened
from qlora_kit.export.export_card import write_export_card
from qlora_kit.export.export_run import export_after_training
from qlora_kit.export.jobs import ExportRequest, Job, placed, sound_jobs
from qlora_kit.export.ledger import Row
from qlora_kit.export.places import merge_options_of, places_of
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.export.targets import parse_target
from qlora_kit.owned import name_of_draft
from qlora_kit.recipe import LoraSpec, MergeSpec

from .whole_runs import Heard, TinyRun, make_run

DRAFTS = tuple(map(name_of_draft, ("exports", "merged", "merged-original")))
"""What a killed export leaves in a run's folder."""


def export(folder: Path, *names: str, reporter: Heard | None = None, **request: Any) -> Any:
    hardware = probe_hardware()
    return export_reopened(
        reopen_adapter(folder, hardware),
        ExportRequest(tuple(map(parse_target, names)), **request),
        places_of(folder),
        hardware,
        reporter or Heard(),
    )


@dataclass(frozen=True)
class Exported:
    tiny: TinyRun
    certificates: dict[str, dict[str, Any]]
    heard: Heard

    def folder(self, name: str) -> Path:
        return self.tiny.run.exports / name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    heard, names = Heard(), ["adapter:vllm", "nf4", "int8"]
    tiny = make_run(tmp_path_factory.mktemp("exported"), to=(*names, "merged"))
    half = tiny.run.exports / "nf4"
    half.mkdir(parents=True)
    (half / "half.safetensors").touch()  # as a killed attempt leaves it
    made = export_after_training(
        tiny.tuned.model,
        tiny.tuned.base,
        tiny.held_out,
        tiny.recipe,
        tiny.run,
        probe_hardware(),
        heard,
    )
    certificates = {one["target"]: one for one in made[:3]}
    assert list(certificates) == names
    return Exported(tiny, {**certificates, "merged": made[3]}, heard)


def test_the_table_shows_the_whole_chain(exported: Exported) -> None:
    names = [row[0] for row in exported.heard.tables[-1]]
    assert names == [
        "16-bit base",
        "nf4 base",
        "trained",
        "adapter:vllm (on the 16-bit base)",
        "merged, original base in float32",
        "nf4",
        "merged, dequantized base in float32",
        "int8",
    ]


def test_the_card_says_what_the_kept_one_was_chosen_over(
    exported: Exported, tmp_path: Path
) -> None:
    alone, chosen = tmp_path / "alone", tmp_path / "chosen"
    for folder, not_kept in ((alone, None), (chosen, {"perplexity": 1.25, "kl_mean": 0.034})):
        folder.mkdir()
        write_export_card({**exported.certificates["nf4"], "not_kept": not_kept}, None, folder)
    words = "tried as well, and is further off on held-out rows: perplexity 1.25, KL 0.034."
    assert words in (chosen / "README.md").read_text()
    assert "tried as well" not in (alone / "README.md").read_text()


def test_the_last_lines_say_where_each_is(exported: Exported) -> None:
    names = {"adapter:vllm": "adapter-vllm", "nf4": "nf4", "int8": "int8"}
    lines = [f"exported  {name}: {exported.folder(names[name])}" for name in names]
    assert exported.heard.lines[-4:] == [*lines, f"exported  merged: {exported.tiny.run.merged}"]


def test_a_certificate_holds_the_chain_to_its_own_folder(exported: Exported) -> None:
    rows = exported.certificates["nf4"]["ledger"]
    assert [row["name"] for row in rows] == [
        "16-bit base",
        "nf4 base",
        "trained",
        "merged, original base in float32",
        "nf4",
    ]
    trained = rows[2]
    assert (trained["kl_mean"], trained["top1_agreement"]) == (0.0, 1.0)
    assert all(row["perplexity"] > 1 for row in rows)
    assert rows[1]["kl_mean"] > 0.01, "the adapter says something"
    assert rows[4]["disk_bytes"] < rows[3]["disk_bytes"]
    stored = json.loads((exported.folder("nf4") / "certificate.json").read_text())
    assert stored == exported.certificates["nf4"]
    assert {"kind", "quantization_aware"} <= stored["trained_on"].keys(), "as the cards ask"
    card = (exported.folder("nf4") / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1]), "the hub has no such model"
    assert "trained on `base`" in card
    assert "merged into the original weights, and the sum was exported to nf4" in card
    assert "| nf4 |" in card


def test_what_the_ledger_says_of_a_folder_is_what_transformers_makes_of_it(
    exported: Exported,
) -> None:
    """Perplexity of the merge that nf4 was made from, by a plain loop."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(
        exported.tiny.run.folder / "merged-original", dtype=torch.float32
    ).eval()
    losses, count = 0.0, 0
    for row in exported.tiny.held_out.sequences:
        ids, labels = (torch.tensor([one]) for one in (row.input_ids, row.labels))
        with torch.no_grad():
            number = int((labels[:, 1:] != -100).sum())
            losses += float(model(input_ids=ids, labels=labels).loss) * number
        count += number
    rows = {row["name"]: row for row in exported.certificates["nf4"]["ledger"]}
    said = rows["merged, original base in float32"]["perplexity"]
    assert said == pytest.approx(float(torch.tensor(losses / count).exp()), rel=1e-4)


def test_few_bits_are_made_from_the_original_weights_and_eight_from_what_was_trained(
    exported: Exported,
) -> None:
    assert exported.certificates["nf4"]["base"] == "original"
    assert exported.certificates["int8"]["base"] == "dequantized", "what auto kept"
    assert not exported.heard.warnings


def test_all_of_it_is_verified_back_to_the_base(exported: Exported) -> None:
    found = verify(exported.folder("nf4"))
    assert [(link.role, link.kind) for link in found.links] == [
        ("itself", "nf4"),
        ("parent", "merged"),
        ("adapter", "adapter"),
        ("recipe", "recipe"),
        ("base", "base"),
    ]
    assert verify(exported.tiny.run.folder).holds
    record = read_record(exported.folder("nf4"))
    assert record.settings["method"] == "nf4"
    parent = record.made_from.parent
    assert parent is not None
    assert Path(parent.path) == exported.tiny.run.folder / "merged-original"


def test_the_adapter_for_vllm_says_how_it_is_served(exported: Exported) -> None:
    card = (exported.folder("adapter-vllm") / "README.md").read_text()
    assert "vllm serve base --enable-lora --max-lora-rank 8" in card
    rows = {row["name"]: row for row in exported.certificates["adapter:vllm"]["ledger"]}
    merged = {row["name"]: row for row in exported.certificates["nf4"]["ledger"]}
    assert rows["adapter:vllm"]["kl_mean"] == pytest.approx(
        merged["merged, original base in float32"]["kl_mean"], rel=1e-3
    ), "beside the 16-bit base it is the merge into it"


def test_merges_and_figures_that_are_there_are_used_again(exported: Exported) -> None:
    merged = exported.tiny.run.merged
    before = read_record(merged).sha256
    heard = Heard()
    static, out = ("activations=static",), exported.folder("static")
    folder = exported.tiny.run.folder
    killed = [folder / "exports" / name_of_draft("gguf-Q4_K_M"), *map(folder.joinpath, DRAFTS)]
    for draft in killed:
        draft.mkdir()
    (certificate,) = export(folder, "int8", reporter=heard, options=static, out=out)
    assert not [draft for draft in killed if draft.exists()], "of whichever target"
    assert read_record(merged).sha256 == before
    assert any(f"{merged} is there" in line for line in heard.lines)
    assert [row["name"] for row in certificate["ledger"]][:3] == [
        "16-bit base",
        "nf4 base",
        "trained",
    ]
    names = [row[0] for row in heard.tables[-1]]
    assert names[-2:] == ["int8", "int8 (static)"], "the table is the whole run's"

    calibration = read_record(out).calibration
    assert calibration is not None
    row = calibration.num_tokens // 5
    assert calibration.source.startswith(f"{5 * row} of {5 * row} tokens of data.train of ")
    assert certificate["settings"]["activations"] == "static"


def test_a_damaged_merge_is_not_built_upon(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, base="dequantized")
    tiny.merge()
    with (tiny.run.merged / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RunError, match=r"merged is there, but .*qlora-kit verify"):
        export(tiny.run.folder, "int8")
    assert not tiny.run.exports.exists()


def test_text_that_only_helps_is_done_without_where_it_is_gone(tmp_path: Path) -> None:
    from qlora_kit.export.makers import calibration_of

    heard = Heard()
    job = Job(parse_target("int8"), tmp_path, "original", calibration=str(tmp_path / "gone.yaml"))
    given: Any = SimpleNamespace(reporter=heard)
    source: Any = None
    assert calibration_of(job, source, given) is None
    assert "made without calibration" in heard.warnings[0]
    needed = replace(job, is_calibration_needed=True)
    with pytest.raises(QloraKitError):
        calibration_of(needed, source, given)


def test_few_bits_from_the_dequantized_merge_only_with_a_warning(tmp_path: Path) -> None:
    tiny, heard = make_run(tmp_path), Heard()
    out = tmp_path / "out"
    (certificate,) = export(
        tiny.run.folder, "nf4", base="dequantized", reporter=heard, out=out, max_kl=1e-12
    )
    assert certificate["base"] == "dequantized"
    assert any("rounded again on another grid" in line for line in heard.warnings)
    assert not certificate["passed"], (
        "a budget that is missed is a finding, and the folder is there"
    )
    assert (
        heard.warnings[-1] == f"nf4 is further from the trained model than asked; it is in {out}."
    )
    assert verify(out).holds
    assert certificate["ledger"][-1]["name"] == "nf4 (out)"


def test_the_merge_that_a_recipe_keeps_does_not_decide_for_few_bits(tmp_path: Path) -> None:
    tiny, heard = make_run(tmp_path, base="dequantized"), Heard()
    options = MergeSpec(base="dequantized")
    few, many = export(tiny.run.folder, "nf4", "int8", merge=options, reporter=heard)
    assert (few["base"], many["base"]) == ("original", "dequantized")
    assert not any("rounded again" in line for line in heard.warnings)


def test_what_vllm_refuses_is_said_before_the_work(tmp_path: Path) -> None:
    tiny = make_run(tmp_path, LoraSpec(r=4, new_tokens=("<a>",)))
    with pytest.raises(AdapterError, match=r"vLLM cannot serve(.|\n)*new tokens are rows"):
        export(tiny.run.folder, "adapter:vllm")
    assert not tiny.run.exports.exists()
    (certificate,) = export(tiny.run.folder, "adapter")
    rows = {row["name"]: row for row in certificate["ledger"]}
    assert rows["adapter"]["kl_mean"] < 1e-9, "it is what was trained"


def test_a_template_that_differs_fails_the_export_and_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a method had lost a blank of the template on its way."""
    from qlora_kit.export import makers

    tiny = make_run(tmp_path)
    kept = makers.MAKERS["adapter"]

    def lossy(job: Any, given: Any, merged: Any, draft: Path) -> Any:
        content = kept(job, given, merged, draft)
        template = draft / "chat_template.jinja"
        template.write_text(template.read_text().replace("<eos>", "<pad>"))
        return content

    monkeypatch.setitem(makers.MAKERS, "adapter", lossy)
    with pytest.raises(ModelError, match="<pad>"):
        export(tiny.run.folder, "adapter")
    assert not (tiny.run.exports / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "available", "asked", "wanted"),
    [
        ("lora-gguf:Q8_0", ("dequantized", "original"), "auto", "dequantized"),
        ("lora-gguf:Q4_K_M", ("dequantized", "original"), "auto", "original"),
        ("lora-gguf:Q4_K_M", ("dequantized",), "auto", "dequantized"),
        ("lora-gguf:Q8_0", ("original",), "auto", "original"),
        ("lora-gguf:Q8_0", ("dequantized", "original"), "original", "original"),
        ("gguf:Q4_K_M", ("dequantized", "original"), "auto", "original"),
        ("gguf:Q8_0", ("dequantized", "original"), "auto", "auto"),
    ],
)
def test_which_weights_a_target_is_made_of(
    name: str, available: Any, asked: Any, wanted: str
) -> None:
    assert parse_target(name).base_of(available, asked) == wanted


class TestEitherMerge:
    """A GGUF file of few bits is made from both, and what is measured decides."""

    def job(self, tmp_path: Path, asked: Any = "auto", name: str = "gguf:Q4_K_M") -> Job:
        return Job(parse_target(name), tmp_path / "out", asked)

    def test_which_are_made(self, tmp_path: Path) -> None:
        trained = reopen_adapter(make_run(tmp_path).run.folder, probe_hardware()).trained
        both = placed(self.job(tmp_path), trained, Heard())
        assert both.merge_bases == ("original", "dequantized")
        for asked, name in (
            ("original", "gguf:Q4_K_M"),
            ("dequantized", "gguf:Q4_K_M"),
            ("auto", "gguf:Q8_0"),
            ("auto", "nf4"),
        ):
            assert placed(self.job(tmp_path, asked, name), trained, Heard()).or_else is None

    @pytest.mark.parametrize(("loss", "kept"), [(1.9, "dequantized"), (2.1, "original")])
    def test_the_lower_loss_is_kept(self, tmp_path: Path, loss: float, kept: str) -> None:
        heard, nothing = Heard(), cast(Any, None)
        one, other = (
            _Made(self.job(tmp_path, base), None, tmp_path, nothing, nothing, Row("x", ppl, 0.1))
            for base, ppl in (("original", 2.0), ("dequantized", loss))
        )
        best = _better(one, other, heard)
        assert best.job.base == kept
        assert best.instead_of is not None
        assert best.instead_of.perplexity == (2.0 if kept == "dequantized" else loss)
        assert bool(heard.warnings) == (kept == "dequantized")


class TestNames:
    """What is known to be wrong before a model is loaded."""

    def jobs(self, folder: Path, *names: str, **request: Any) -> Any:
        return sound_jobs(
            ExportRequest(tuple(map(parse_target, names)), **request), places_of(folder)
        )

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        (tmp_path / "recipe.yaml").write_text("")
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("guff", "did you mean gguf"),
            ("gguf:Q4_K_N", "did you mean Q4_K_"),
            ("onnx:int4", "there are onnx, onnx:int8-dynamic and onnx:int8-static"),
            ("adapter:tgi", "there is adapter and adapter:vllm"),
            ("merged:f16", "merged has no variants"),
            ("nf4:", "names nothing behind its colon"),
        ],
    )
    def test_unknown_targets_are_refused(self, name: str, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            parse_target(name)

    def test_a_folder_that_is_taken(self, run: Path) -> None:
        (run / "exports" / "nf4").mkdir(parents=True)
        with pytest.raises(RunError, match=r"exports/nf4 exists already.*--out"):
            self.jobs(run, "nf4")

    def test_one_folder_for_two_targets(self, run: Path) -> None:
        with pytest.raises(ModelError, match="belong to one target"):
            self.jobs(run, "nf4", "int8", out=run / "x")
        with pytest.raises(RunError, match="name each target once"):
            self.jobs(run, "nf4", "nf4")

    def test_options_that_do_nothing(self, run: Path) -> None:
        with pytest.raises(ModelError, match="merged has no options"):
            self.jobs(run, "merged", options=("block_size=32",))
        with pytest.raises(DataError, match="--calibration has no effect"):
            self.jobs(run, "nf4", calibration="wikitext2")

    def test_what_is_calibrated_takes_the_training_rows(self, run: Path) -> None:
        (job,) = self.jobs(run, "onnx:int8-static")
        assert job.calibration == str(run / "recipe.yaml")
        alone = run / "elsewhere"
        alone.mkdir()
        (alone / "adapter_config.json").write_text("{}")
        with pytest.raises(DataError, match="name some with --calibration"):
            self.jobs(alone, "onnx:int8-static")

    def test_what_is_no_adapter_is_said_before_what_it_would_need(self, tmp_path: Path) -> None:
        for of_it in (merge_options_of, places_of):
            with pytest.raises(RunError, match=r"rmix does not exist; name the folder of a run"):
                of_it(tmp_path / "rmix")
            with pytest.raises(AdapterError, match=r"is neither a run \(no recipe.yaml\) nor an"):
                of_it(tmp_path)

    def test_few_bits_that_text_helps_take_them_too(self, run: Path) -> None:
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        few, many = self.jobs(run, "gguf:Q4_K_M", "gguf:Q6_K")
        assert (few.calibration, few.is_calibration_needed) == (str(run / "recipe.yaml"), False)
        assert many.calibration is None, "only when it is asked for"
        (off,) = self.jobs(run, "gguf:Q4_K_M", options=("importance=false",))
        assert off.calibration is None

    def test_a_missing_extra_is_named_with_its_command(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qlora_kit.extras.find_spec", lambda name: None)
        with pytest.raises(Exception, match=r"pip install 'qlora-kit\[gguf\]'"):
            self.jobs(run, "gguf:Q4_K_M")
