"""A process that has imported everything, and forks one that runs the command line.

Reads one order a line as JSON from standard input and answers each
with two lines: the number of the process that it has forked, and later how that ended. The forked
process is the real command line, signal handlers, interpreter exit and all; only the imports, which
take longer than the run of a tiny model, are done beforehand.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from faulty_disk import FaultyDisk

from crash.faults import Watch
from qlora_kit import cli
from qlora_kit.__main__ import begin
from qlora_kit.errors import QloraKitError


def warm_up() -> None:
    """Import what a run imports on its way, as the command line does; starts no thread."""
    begin(trains=False)
    import accelerate.state  # noqa: F401
    import bitsandbytes  # noqa: F401
    import transformers.trainer  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import qlora_kit.preflight
    import qlora_kit.run  # noqa: F401


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            obey(order)
            return
        print(json.dumps({"process": process}), flush=True)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def obey(order: dict[str, Any]) -> None:
    """In the forked process: standard streams, folder and arguments as a shell would set them."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    err = os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((nothing, out, err)):
        os.dup2(descriptor, number)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["qlora-kit", *order["arguments"]]
    if "disk" in order:
        run_on_a_faulty_disk(Path(order["arguments"][-1]), **order["disk"])
        return
    watch = Watch(**order["watch"])
    sys.addaudithook(watch)
    cli.main()


def run_on_a_faulty_disk(recipe: Path, at: int, fault: str, told: str) -> None:
    """The library call behind `train`, which alone takes another disk."""
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.recipe import load_recipe
    from qlora_kit.run import run_recipe

    disk = FaultyDisk(at, fault)  # type: ignore[arg-type]
    try:
        run_recipe(load_recipe(recipe), console_reporter(), disk=disk)
    except QloraKitError as error:
        sys.exit(f"error: {error}")
    finally:
        Path(told).write_text(json.dumps(disk.operations), encoding="utf-8")


if __name__ == "__main__":
    warm_up()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    serve()
