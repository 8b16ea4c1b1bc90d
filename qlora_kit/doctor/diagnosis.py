"""The whole examination, in the order in which it is told."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.doctor import findings, probes, surroundings
from qlora_kit.doctor.apart import Outcome, run_apart
from qlora_kit.doctor.findings import Finding
from qlora_kit.environment import Hardware, cache_dir, hub_is_offline
from qlora_kit.packages import Package, required_packages

_PROBES: dict[str, Callable[[], Any]] = {
    "packages": required_packages,
    "torch": probes.torch_build,
    "hardware": probes.hardware,
    "memory": probes.memory,
    "four_bit": probes.four_bit,
    "optimizer": probes.optimizer_error,
    "speed": probes.operations_per_second,
    "cache": cache_dir,
    "hub_cache": probes.hub_cache,
}


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found. `hardware` is None where torch does not run."""

    python: str
    platform: str
    hardware: Hardware | None
    packages: tuple[Package, ...]
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """What is needed and does not work."""
        return tuple(finding for finding in self.findings if finding.status == "broken")

    def as_dict(self) -> dict[str, Any]:
        return {"holds": not self.broken, **asdict(self)}


def diagnose(omp_num_threads: str = "") -> Diagnosis:
    """Examine this machine; whatever is lacking is a finding, never an exception.

    `omp_num_threads` is the variable of that name. The hub is asked once, and only where it is
    not forbidden.
    """
    is_offline = hub_is_offline()
    asked = _PROBES if is_offline else {**_PROBES, "hub": probes.hub_answer}
    outcomes = run_apart(asked)
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(),
        hardware=outcomes["hardware"].value,
        packages=outcomes["packages"].value or (),
        findings=tuple(_findings(outcomes, is_offline, omp_num_threads)),
    )


def _findings(
    outcomes: Mapping[str, Outcome], is_offline: bool, omp_num_threads: str
) -> Iterator[Finding]:
    yield findings.packages_finding(platform.python_version(), outcomes["packages"])
    yield findings.torch_finding(outcomes["torch"])
    machine, build = outcomes["hardware"].value, outcomes["torch"].value
    if machine is not None and build is not None:
        yield findings.device_finding(machine, build)
        yield findings.dtype_finding(machine)
        yield findings.threads_finding(build.num_threads, machine.num_cpus, omp_num_threads)
        if not outcomes["memory"].fault:
            yield findings.memory_finding(outcomes["memory"].value, machine)
        yield findings.speed_finding(outcomes["speed"])
    yield findings.four_bit_finding(outcomes["four_bit"])
    device = "cpu" if machine is None else machine.device
    yield findings.optimizer_finding(outcomes["optimizer"], device)
    caches = (outcomes["cache"].value, outcomes["hub_cache"].value)
    yield from surroundings.disk_findings([Path.cwd(), *filter(None, caches)])
    yield surroundings.hub_finding(is_offline, outcomes.get("hub"))
    yield from surroundings.optional_findings(device)
