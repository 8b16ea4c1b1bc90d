"""What a file is that holds no rows, told by its first bytes."""

from __future__ import annotations

_PICKLE = "a pickle, which could run code when it is opened"
# Protocols 0 and 1 have no mark of their own: a list, dict, tuple or object that is memoized.
_OLD_PICKLES = (
    *(b"(" + kind + b"p" + memo + b"\n" for kind in (b"l", b"d", b"t") for memo in (b"0", b"1")),
    *(kind + b"q" + memo for kind in (b"]", b"}") for memo in (b"\0", b"\1")),
    *(b"c" + module + b"\n" for module in (b"copy_reg", b"copyreg", b"__builtin__", b"builtins")),
)
_AS_ROWS = "save its rows as .jsonl"
_UNPACK = "unpack it, and name the file inside"
_NO_ROWS = "name a file of rows"

# (where, bytes, what it is, what to do)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (
        0,
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the data",
        "run git lfs pull",
    ),
    (0, b"\x80\x02", _PICKLE, _AS_ROWS),
    (0, b"\x80\x03", _PICKLE, _AS_ROWS),
    (0, b"\x80\x04", _PICKLE, _AS_ROWS),
    (0, b"\x80\x05", _PICKLE, _AS_ROWS),
    *((0, start, _PICKLE, _AS_ROWS) for start in _OLD_PICKLES),
    (0, b"SQLite format 3\0", "an SQLite database", _AS_ROWS),
    (0, b"%PDF-", "a PDF document", "extract its text first"),
    (0, b"\x89PNG", "a PNG image", _NO_ROWS),
    (0, b"\xff\xd8\xff", "a JPEG image", _NO_ROWS),
    (0, b"GIF8", "a GIF image", _NO_ROWS),
    (0, b"II*\0", "a TIFF image", _NO_ROWS),
    (0, b"MM\0*", "a TIFF image", _NO_ROWS),
    (8, b"WEBP", "a WebP image", _NO_ROWS),
    (8, b"WAVE", "a sound file", _NO_ROWS),
    (0, b"ID3", "a sound file", _NO_ROWS),
    (0, b"OggS", "a sound file", _NO_ROWS),
    (0, b"fLaC", "a sound file", _NO_ROWS),
    (4, b"ftyp", "a video file", _NO_ROWS),
    (0, b"GGUF", "a GGUF model", _NO_ROWS),
    (0, b"\x93NUMPY", "a NumPy array", _AS_ROWS),
    (0, b"\x89HDF\r\n", "an HDF5 file", _AS_ROWS),
    (0, b"\xd0\xcf\x11\xe0", "an old Microsoft Office file", "export it as .csv"),
    (0, b"Obj\x01", "an Avro file", "convert it to .parquet"),
    (0, b"ORC", "an ORC file", "convert it to .parquet"),
    (0, b"FEA1", "a Feather file of the first version", "convert it to .parquet"),
    (0, b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"BZh", "compressed with bzip2", _UNPACK),
    (0, b"\xfd7zXZ\0", "compressed with xz", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "compressed with LZ4", _UNPACK),
    (0, b"\x1f\x8b", "compressed twice", "unpack it once"),
    (0, b"\x28\xb5\x2f\xfd", "compressed twice", "unpack it once"),
    (257, b"ustar", "a tar archive", "unpack it, and name the folder"),
    (0, b"\x7fELF", "a program", _NO_ROWS),
    (0, b"\xff\xfe\0\0", "UTF-32 text", "save it as UTF-8"),
    (0, b"\0\0\xfe\xff", "UTF-32 text", "save it as UTF-8"),
)


def no_data(head: bytes) -> tuple[str, str] | None:
    """What the file is and what to do, where its first bytes (unpacked) show that it has no rows.

    Pages and text of unknown layout are left to `is_page` and to the reader of the format.
    """
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _archive(head)
    for offset, signature, what, hint in _SIGNATURES:
        if head[offset:].startswith(signature):
            return what, hint
    if b"/annex/objects/" in head[:200] and head.count(b"\n") <= 1:
        return "a git-annex pointer, not the data", "run git annex get"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 10**8:
        return "a safetensors file of model weights", _NO_ROWS
    if head and not head.strip(b"\0"):
        return "nothing but NUL bytes", "write or fetch it again"
    return None


def _archive(head: bytes) -> tuple[str, str]:
    if b"/data.pkl" in head or b"/.format_version" in head:
        return "a PyTorch file, which holds a pickle", _AS_ROWS
    if b"xl/" in head:
        return "an Excel workbook", "export it as .csv"
    if b"word/" in head:
        return "a Word document", "extract its text first"
    if b".npy" in head[:200]:
        return "an archive of NumPy arrays", _AS_ROWS
    if b"[Content_Types].xml" in head:
        return "a Microsoft Office file", "export it as .csv"
    return "a zip archive", "unpack it, and name the folder"


_PAGE_STARTS = tuple(
    b"<" + tag
    for tag in (
        *(b"!doctype", b"!--", b"html", b"head", b"body", b"title", b"meta", b"script"),
        *(b"div", b"h1>", b"pre>", b"?xml", b"error"),
    )
)


def is_page(head: bytes) -> bool:
    """Whether this is HTML or XML: what a failed download leaves behind."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    return start.startswith(_PAGE_STARTS)


def wide_encoding(head: bytes) -> str | None:
    """UTF-32 or UTF-16 without a byte order mark, where NUL stands in all bytes but each 4th or
    2nd.
    """
    sample = head[:512]
    for width, name in ((4, "UTF-32"), (2, "UTF-16")):
        num_units = len(sample) // width
        columns = [sample[start::width].count(0) > 0.8 * num_units for start in range(width)]
        if num_units > 1 and columns.count(True) == width - 1:
            return name
    return None
