"""Installed packages against the ranges that the kit's own metadata asks for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "qlora-kit"


@dataclass(frozen=True)
class Package:
    """One dependency. `installed` is None where it is missing; `needed` is its version range."""

    name: str
    installed: str | None
    needed: str
    fits: bool


def required_packages(extra: str = "") -> tuple[Package, ...]:
    """What every run needs, or what an extra asks for beyond that; empty where the kit runs from a
    folder without being installed.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ()
    requirements = [Requirement(line) for line in lines]
    return tuple(_package(one) for one in requirements if _is_of(one, extra))


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    is_of_all = marker is None or marker.evaluate({"extra": ""})
    if not extra or is_of_all:
        return is_of_all and not extra
    return marker is not None and marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> Package:
    needed = ",".join(sorted(map(str, requirement.specifier), reverse=True))
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Package(requirement.name, None, needed, False)
    fits = requirement.specifier.contains(installed, prereleases=True)
    return Package(requirement.name, installed, needed, fits)
