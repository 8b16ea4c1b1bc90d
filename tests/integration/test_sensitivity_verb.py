"""`qlora-kit sensitivity` from the outside, and a recipe made of what it wrote."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import yaml
from conftest import build_llama, build_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from qlora_kit.recipe import load_recipe

from .conftest import Call, task_rows, write_recipe, write_rows

FEW = ("--num-tokens", "96", "--window-tokens", "32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("wide"), initializer_range=0.3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", task_rows())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = [f"The {n} lamps are painted in {n * 7 % 13} colours.\n" for n in range(80)]
    path.write_text("".join(words))
    return path


def test_ranks_and_draws_and_chooses(
    wide: Path, text: Path, tmp_path: Path, call: Call, tiny_llama: Path
) -> None:
    out = tmp_path / "out"
    arguments = (str(wide), "--data", str(text), *FEW, "--no-double-quant", "--max-kl", "0.2")
    said = call("sensitivity", *arguments, "--stability", "--out", str(out))
    assert said.code == 0, said.err
    for part in ("What each layer costs in nf4", "Spearman", "outlier columns", "The mixture ("):
        assert part in said.out
    values = json.loads((out / "sensitivity.json").read_text())
    kls = [entry["kl"] for entry in values["ranking"]]
    assert len(kls) == 14
    assert kls == sorted(kls, reverse=True)
    assert values["stability"]["num_units"] == 14
    assert len(values["statistics"]) == 14
    assert values["mixture"]["measured"]["kl_mean"] <= 0.2
    width, height = struct.unpack(">II", (out / "heat-map.png").read_bytes()[16:24])
    assert min(width, height) > 300
    fragment = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe = load_recipe(write_recipe(tmp_path / "recipe", tiny_llama, **fragment))
    assert recipe.quantization.overrides
    again = call("sensitivity", *arguments, "--out", str(out))
    assert again.code == 1
    assert "exists already" in again.err


def test_estimates_in_one_pass(wide: Path, rows: Path, call: Call) -> None:
    said = call(
        "sensitivity", str(wide), "--data", str(rows), *FEW, "--cheap", "--check", "5", "--json"
    )
    assert said.code == 0, said.err
    values = json.loads(said.out)
    assert values["mode"] == "cheap"
    assert values["check"]["num_units"] == 5
    assert sum(entry["measured"] is not None for entry in values["ranking"]) == 5


def test_takes_the_rows_of_a_recipe(wide: Path, tmp_path: Path, call: Call) -> None:
    recipe = write_recipe(tmp_path, wide)
    said = call("sensitivity", str(wide), "--data", str(recipe), *FEW, "--by", "kind", "--json")
    assert said.code == 0, said.err
    names = {entry["name"] for entry in json.loads(said.out)["ranking"]}
    assert "mlp.down_proj" in names
    assert len(names) == 7


def test_steps_down(wide: Path, text: Path, call: Call) -> None:
    said = call(
        "sensitivity",
        str(wide),
        "--data",
        str(text),
        *FEW,
        "--cheap",
        "--progressive",
        "--max-kl",
        "0.1",
        "--steps",
        "2",
    )
    assert said.code == 0, said.err
    assert "From 16 bits down to a KL of 0.1" in said.out
    assert "← kept" in said.out
    assert "quantization:" in said.out


def test_looks_at_weights_alone(wide: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (str(wide), "--statistics", "--out", str(out))
    said = call("sensitivity", *arguments, "--json")
    assert said.code == 0, said.err
    assert len(json.loads(said.out)) == 14
    assert json.loads((out / "statistics.json").read_text()) == json.loads(said.out)
    again = call("sensitivity", *arguments)
    assert again.code == 1
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--statistics --data x.txt", "--data has no effect"),
        ("--statistics --budget 1GiB", "--budget has no effect"),
        ("--statistics --by layer --max-kl 1", "--by and --max-kl have no effect"),
        ("--statistics --cheap --check 3 --seed 1", "--cheap, --check and --seed have no effect"),
        ("--data x.txt --steps 7", "--steps has no effect without --progressive"),
        ("--data x.txt --method int8 --block-size 64", "--block-size has no effect with"),
        ("--data x.txt --method int4 --double-quant", "--double-quant has no effect with"),
    ],
)
def test_options_that_do_nothing_are_refused(options: str, words: str, call: Call) -> None:
    said = call("sensitivity", "model", *options.split())
    assert said.code == 2
    assert words in said.err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "--data"),
        (("--data", "x.txt", "--budget", "1GiB", "--max-kl", "1"), 2, "give one of them"),
        (("--data", "x.txt", "--budget", "5 apples"), 2, "5.0GiB"),
        (("--data", "x.txt", "--check", "3"), 2, "--cheap"),
        (("--data", "x.txt", "--progressive"), 2, "--max-kl"),
        (("--data", "x.txt", "--block-size", "48"), 1, "got 48"),
        (("--data", "x.txt", "--method", "int4", "--max-kl", "1"), 1, "cannot be loaded as int4"),
        (("--data", "nowhere.txt"), 1, "nowhere.txt"),
    ],
)
def test_says_what_is_wrong_before_the_work(
    wide: Path, call: Call, options: tuple[str, ...], code: int, words: str
) -> None:
    said = call("sensitivity", str(wide), *options)
    assert said.code == code
    assert words in said.err


def test_says_what_cannot_be_written_before_the_work(
    wide: Path, text: Path, call: Call, tmp_path: Path
) -> None:
    out = text / "out"
    said = call("sensitivity", str(wide), "--data", str(text), *FEW, "--out", str(out))
    assert said.code == 1
    assert "text.txt is a file" in said.err
    assert "reference" not in said.out, "nothing was loaded"


def test_experts_are_no_part_of_a_mixture(text: Path, tmp_path: Path, call: Call) -> None:
    """Training refuses such a base, so a recipe for it would be of no use."""
    folder = tmp_path / "moe"
    build_tokenizer(folder)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    arguments = (str(folder), "--data", str(text), *FEW, "--cheap")
    said = call("sensitivity", *arguments, "--max-kl", "0.2", "--out", str(tmp_path / "out"))
    assert said.code == 1
    assert "keeps its experts in fused tensors" in said.err
    assert not (tmp_path / "out").exists()
    ranked = call("sensitivity", *arguments)
    assert ranked.code == 0
    assert "% of the parameters are fused experts" in ranked.out + ranked.err


def test_says_what_is_too_little_or_too_long(
    wide: Path, text: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("qlora_kit.quantize.sensitivity.run.load_reference", never)
    little = call("sensitivity", str(wide), "--data", str(text), "--num-tokens", "99999")
    assert little.code == 1
    assert "the rows have" in little.err
    long = call("sensitivity", str(wide), "--data", str(text), "--window-tokens", "1000")
    assert "attends to 256 tokens at most" in long.err
    small = call("sensitivity", str(wide), "--data", str(text), *FEW, "--cheap", "--budget", "9KB")
    assert small.code == 1
    assert "less than the 0.10 MiB that the model takes with every layer at its narrowest" in (
        small.err
    )


def test_rows_unasked_are_as_long_as_the_model_attends_to(
    text: Path, tmp_path: Path, call: Call
) -> None:
    short = build_llama(tmp_path / "short", max_position_embeddings=64)
    arguments = (str(short), "--data", str(text), "--num-tokens", "96", "--cheap", "--json")
    said = call("sensitivity", *arguments)
    assert said.code == 0, said.err
    same = call("sensitivity", *arguments, "--window-tokens", "64")
    assert json.loads(same.out)["ranking"] == json.loads(said.out)["ranking"]
    long = call("sensitivity", *arguments, "--window-tokens", "65")
    assert long.code == 1
    assert "attends to 64 tokens at most" in long.err


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.timeout(1800)
def test_the_demo_model_is_ranked_alike_on_other_rows_and_mixed_better_than_uniform(
    shared_data: Path, tmp_path: Path, call: Call
) -> None:
    """What docs/sensitivity.md says of it, with the estimates of one pass."""
    text = str(shared_data / "wikitext-2" / "valid.txt")
    size = ("--num-tokens", "512", "--window-tokens", "128", "--seed", "0")
    chosen = ("--cheap", "--stability", "--budget", "111.03MiB", "--out", str(tmp_path / "lab"))
    said = call("sensitivity", "demo/smollm2-135m-instruct", "--data", text, *size, *chosen)
    assert said.code == 0, said.err
    values = json.loads((tmp_path / "lab" / "sensitivity.json").read_text())
    assert values["stability"] == {"spearman": pytest.approx(0.85, abs=0.05), "num_units": 210}
    mixture = values["mixture"]
    uniform = {one["name"]: one["kl_mean"] for one in mixture["others"]}
    assert mixture["measured"]["num_bytes"] <= 111.03 * 2**20
    assert mixture["measured"]["kl_mean"] < 0.75 * min(uniform.values())
