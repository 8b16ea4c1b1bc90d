"""What a finished run has come to: everything in its folder that no clock or gauge has written."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from qlora_kit.artifact.record import verify_artifact

# Of what is written into JSON: clocks, and gauges of memory.
_MEASURED = re.compile(
    r"(.*_)?(seconds|per_second|runtime|bytes|created|started|memory)"
    r"|(host|device)_peak_bytes|growth_bytes_per_step|framework"
)
_KEPT = {"num_bytes"}
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Files that hold a time; what else is in them is looked at in summary.json and the certificate, and
# whether artifact.json is right, by `verify`.
_DATED = {"README.md", "certificate.json", "artifact.json"}


def outcome_of(run: Path) -> dict[str, Any]:
    """By name; two runs are the same where these are equal."""
    found: dict[str, Any] = {"names": sorted(_names(run))}
    for name in ("evaluation.json", "summary.json", "data/ledger.json", "merged/certificate.json"):
        if (run / name).exists():
            found[name] = _without_clocks(json.loads((run / name).read_text(encoding="utf-8")))
    found["log.jsonl"] = [_without_clocks(line) for line in _log_of(run) if not _is_of_plan(line)]
    if (run / "merged").is_dir():
        found["merged, verified"] = [str(one) for one in verify_artifact(run / "merged")]
    found["recipe.yaml"] = (run / "recipe.yaml").read_text(encoding="utf-8")
    for folder in ("adapter", "merged"):
        for path in sorted((run / folder).glob("*")):
            if path.name not in _DATED:
                found[f"{folder}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def checkpoints_in(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if _CHECKPOINT.fullmatch(path.name))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two outcomes differ, in words."""
    return [
        f"{name}: {_shorter(one.get(name), other.get(name))}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def _names(run: Path) -> list[str]:
    """Of everything that is there, but for checkpoints: a signal or a clock may have asked for
    more of them, and damaged ones are kept aside; and for what trackers write, under dates. A
    process killed behind its last word leaves its lock, which holds nobody up. With damaged
    checkpoints, the log of their updates is kept aside.
    """
    inside = (path.relative_to(run) for path in run.rglob("*"))
    more = ("log.jsonl.aside",) if any(run.glob("checkpoint-*.damaged*")) else ()
    return [
        str(path)
        for path in inside
        if not path.parts[0].startswith(("checkpoint-", ".lock", "tensorboard", *more))
    ]


def _log_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _is_of_plan(line: dict[str, Any]) -> bool:
    """What was planned beside what was measured: told by a process that made an update, which one
    started again behind the last does not.
    """
    return "predicted_components" in line


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_clocks(inner)
            for key, inner in value.items()
            if key in _KEPT or not _MEASURED.fullmatch(key)
        }
    if isinstance(value, list):
        return [_without_clocks(inner) for inner in value]
    return value


def _shorter(one: Any, other: Any) -> str:
    """The first place where two values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(k for k in [*one, *other] if one.get(k) != other.get(k))
        return f"{key}: {_shorter(one.get(key), other.get(key))}"
    if isinstance(one, list) and isinstance(other, list):
        if len(one) == len(other):
            return _shorter(*next((a, b) for a, b in zip(one, other, strict=True) if a != b))
        extra = [x for x in one if x not in other], [x for x in other if x not in one]
        return f"{extra[0]} missing, {extra[1]} too many"[:400]
    return f"{one!s:.200} became {other!s:.200}"
