"""What this machine can do and what it lacks: measured, then said in terms of a recipe."""

from qlora_kit.doctor.diagnosis import Diagnosis, diagnose
from qlora_kit.doctor.findings import Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
