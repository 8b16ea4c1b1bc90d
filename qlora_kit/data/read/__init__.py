"""Rows of files, folders, patterns, hub data sets and the demo, each with where it came from.

Every row of a source comes out, as a `Row` or as a `BadRow` with its reason; a file that cannot
be read at all is a DataError. Memory is bounded by the longest row, whatever the file's size.
"""

from qlora_kit.data.read.opened import SourceFile
from qlora_kit.data.read.sources import (
    files_left_out,
    read_source,
    require_readable,
    source_files,
    source_fingerprint,
)
from qlora_kit.data.rows import BadRow, Record, Row

__all__ = [
    "BadRow",
    "Record",
    "Row",
    "SourceFile",
    "files_left_out",
    "read_source",
    "require_readable",
    "source_files",
    "source_fingerprint",
]
