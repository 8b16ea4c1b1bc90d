"""Schemas: from a row to what it means."""

from qlora_kit.data.schemas.meaning import content_key, fine_tuning_example
from qlora_kit.data.schemas.recognise import NO_SCHEMA, SCHEMAS, Recogniser

__all__ = ["NO_SCHEMA", "SCHEMAS", "Recogniser", "content_key", "fine_tuning_example"]
