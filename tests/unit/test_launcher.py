"""What accelerate's launcher hands on, and every shipped configuration of it."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qlora_kit import run
from qlora_kit.environment import (
    LauncherSettings,
    launcher_settings,
    probe_hardware,
    require_one_process,
)
from qlora_kit.errors import LaunchError
from qlora_kit.launcher import require_going_on, require_launch
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.train.arguments import optimizer_for

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
CONFIGURATIONS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "sky.yaml")
SCRIPTS = (FOLDER / "slurm.sh", FOLDER / "sky.yaml")

FSDP = LauncherSettings(fsdp=True, fsdp_version="2")
EIGHT_BITS = ("quantization.load_in_4bit=false", "quantization.load_in_8bit=true")
DEEPSPEED = LauncherSettings(deepspeed=True, zero_stage="2")
SHARDABLE = ("quantization.quant_storage=bfloat16", "train.optim=adamw_torch")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides)


def command_of(path: Path) -> list[str]:
    """What opens the file, as a shell would split it."""
    lines = path.read_text().splitlines()
    return shlex.split(next(line for line in lines if line.startswith("# ")).removeprefix("# "))


def test_there_are_configurations() -> None:
    wanted = {
        "one_gpu",
        "ddp",
        "ddp_multinode",
        "fsdp2_qlora",
        "deepspeed_zero2",
        "deepspeed_zero3",
    }
    assert {path.stem for path in CONFIGURATIONS} == wanted


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_the_kit_accepts_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through accelerate's own parser, to the variables that it would start processes with."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    words = command_of(path)
    assert words[:2] == ["accelerate", "launch"]
    arguments = launch_command_parser().parse_args(words[2:])
    assert ROOT / arguments.config_file == path
    assert arguments.training_script == "qlora_kit"
    verb, name, *overrides = arguments.training_script_args
    assert verb == "train"
    asked = load_recipe(Path(name), overrides)

    known = set(vars(arguments))
    for prefix, section in (("fsdp_", config.fsdp_config), ("", config.deepspeed_config)):
        for key in section:
            assert key in known, f"{key} is none of accelerate's"
            assert key.startswith(prefix)
            setattr(arguments, key, section[key])
    for key in ("num_processes", "num_machines", "main_process_port", "mixed_precision"):
        setattr(arguments, key, getattr(config, key))
    arguments.dynamo_backend = "no"
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    arguments.use_fsdp = bool(config.fsdp_config)
    if config.deepspeed_config:
        monkeypatch.setattr("qlora_kit.launcher.find_spec", lambda name: name)
        variables = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        variables = prepare_multi_gpu_env(arguments)
    monkeypatch.setattr(os, "environ", variables)
    settings = launcher_settings()
    assert settings.fsdp == ("fsdp" in path.name)
    assert settings.deepspeed == ("zero" in path.name)
    require_launch(settings, asked, "bf16", "cuda", config.num_processes)


@pytest.mark.parametrize("settings", [FSDP, LauncherSettings()])
def test_a_run_asks_for_the_optimizer_of_its_launcher(
    settings: LauncherSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def optimizer(device: str, *, is_sharded: bool) -> None:
        asked.append((device, is_sharded))
        raise LaunchError("far enough")

    monkeypatch.setattr(run, "launcher_settings", lambda: settings)
    monkeypatch.setattr(run, "optimizer_for", optimizer)
    with pytest.raises(LaunchError, match="far enough"):
        run.run_recipe(recipe(f"run_dir={tmp_path / 'run'}"))
    assert asked == [(probe_hardware().device, settings.fsdp)]


def test_fsdp_takes_what_auto_is_under_it() -> None:
    asked = recipe(SHARDABLE[0]).with_optimizer(optimizer_for("cuda", is_sharded=True).name)
    require_launch(FSDP, asked, "bf16", "cuda", 2)
    other = recipe(SHARDABLE[0]).with_optimizer(optimizer_for("cuda").name)
    with pytest.raises(LaunchError, match="paged_adamw_8bit, which does not know"):
        require_launch(FSDP, other, "bf16", "cuda", 2)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_opens_with_its_command_and_names_a_recipe(path: Path) -> None:
    words = command_of(path)
    assert str(path.relative_to(ROOT)) in words
    named = [
        one for one in re.findall(r"recipes/[\w./-]+\.yaml", " ".join(words)) if "sky" not in one
    ]
    assert named
    assert all((ROOT / one).is_file() for one in named)


def test_slurm_gives_time_to_save_and_queues_again() -> None:
    text = (FOLDER / "slurm.sh").read_text()
    assert "#SBATCH --signal=TERM@120" in text
    assert "scontrol requeue" in text


def test_slurm_gives_each_process_its_cores() -> None:
    """Since Slurm 22.05 srun does not take --cpus-per-task from sbatch."""
    text = (FOLDER / "slurm.sh").read_text()
    assert text.index("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK") < text.index("\nsrun ")


def test_sky_is_yaml_and_starts_train() -> None:
    values = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert "-m qlora_kit train" in values["run"]
    assert values["num_nodes"] == 2


@pytest.mark.parametrize(
    ("settings", "overrides", "device", "said"),
    [
        (LauncherSettings(mixed_precision="bf16"), (), "cpu", "recipe trains in fp32"),
        (LauncherSettings(dynamo_backend="INDUCTOR"), (), "cpu", "nothing here is compiled"),
        (LauncherSettings(left_alone=True), (), "cpu", "starts only one"),
        (LauncherSettings(megatron=True), (), "cuda", "Megatron-LM"),
        (LauncherSettings(parallel=True), (), "cuda", "parallelism_config"),
        (FSDP, SHARDABLE, "cpu", "silently become DDP"),
        (replace(FSDP, fsdp_version="1"), SHARDABLE, "cuda", "fsdp_version: 1"),
        (replace(FSDP, fsdp_ram_efficient=True), SHARDABLE, "cuda", "ram_efficient"),
        (
            replace(FSDP, fsdp_activation_checkpointing=True),
            (*SHARDABLE, "train.gradient_checkpointing=true"),
            "cuda",
            "set one of them to false",
        ),
        (FSDP, SHARDABLE[1:], "cuda", "quant_storage: bfloat16"),
        (
            FSDP,
            (SHARDABLE[0], "train.optim=paged_adamw_8bit"),
            "cuda",
            "does not know sharded parameters",
        ),
        (FSDP, (*EIGHT_BITS, SHARDABLE[1]), "cuda", "8-bit base"),
        (FSDP, (*SHARDABLE, "train.eval_strategy=epoch"), "cuda", "train.eval_strategy"),
        (DEEPSPEED, (), "cuda", "not installed"),
        (DEEPSPEED, (), "cpu", "DeepSpeed on a CPU"),
        (DEEPSPEED, (), "cuda", "save_strategy"),
        (
            DEEPSPEED,
            ("train.save_strategy='no'", "train.save_minutes=5"),
            "cuda",
            "checkpoints (train.save_minutes)",
        ),
        (replace(DEEPSPEED, zero_stage="1"), (), "cuda", "ZeRO stage 1"),
        (replace(DEEPSPEED, accumulation="32"), (), "cuda", "gradient_accumulation_steps: 32"),
        (replace(DEEPSPEED, clipping="0.3"), (), "cuda", "gradient_clipping: 0.3"),
        (replace(DEEPSPEED, clipping="much"), (), "cuda", "gradient_clipping: much"),
        (
            replace(DEEPSPEED, zero_stage="", deepspeed_file="ds.json"),
            (),
            "cuda",
            "deepspeed_config_file: ds.json",
        ),
    ],
)
def test_what_would_not_happen_is_refused(
    settings: LauncherSettings, overrides: tuple[str, ...], device: str, said: str
) -> None:
    with pytest.raises(LaunchError, match=re.escape(said)):
        require_launch(settings, recipe(*overrides), "fp32", device, 2)


def test_a_checkpoint_that_cannot_be_put_back_is_refused_before_the_work() -> None:
    checkpoint = Path("runs/x/checkpoint-4")
    with pytest.raises(LaunchError, match=r"checkpoint-4 cannot be gone on .*--fresh"):
        require_going_on(DEEPSPEED, checkpoint)
    require_going_on(DEEPSPEED, None)
    require_going_on(FSDP, checkpoint)


def test_what_says_nothing_is_accepted() -> None:
    require_launch(LauncherSettings(), recipe(), "fp32", "cpu", 2)
    quiet = LauncherSettings(mixed_precision="no", dynamo_backend="NO")
    require_launch(quiet, recipe(), "bf16", "cuda", 2)
    require_launch(replace(quiet, mixed_precision="bf16"), recipe(), "bf16", "cuda", 2)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_accelerate_alone_starts_one_process_whatever_it_is_told(
    is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, on a machine with one GPU, and with distributed_type: "NO"."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for count in ("1", "2"):
        words = ["--num_processes", count, "--num_machines", "1", "-m", "qlora_kit", "train"]
        arguments = launch_command_parser().parse_args(words)
        arguments.use_cpu, arguments.mixed_precision = is_cpu, "no"
        arguments.dynamo_backend, arguments.num_cpu_threads_per_process = "no", 1
        variables = prepare_simple_launcher_cmd_env(arguments)[1]
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", variables)
            assert launcher_settings().left_alone == (count == "2")


def test_a_verb_for_one_process_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(LaunchError, match="2 processes of merge were launched") as caught:
            require_one_process("merge")
        assert caught.value.is_told_elsewhere == (rank == "1")
