"""First bytes of files that are no UTF-8 text: what the file is, and what to do with it."""

_ENCODINGS = {
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_BINARY = {
    b"\x1f\x8b": ("compressed by gzip", "Unpack it, or let its name end in .gz."),
    b"BZh": ("compressed by bzip2", "Unpack it, or let its name end in .bz2."),
    b"\xfd7zXZ\x00": ("compressed by xz", "Unpack it, or let its name end in .xz."),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Unpack it."),
    b"PK\x03\x04": (
        "a spreadsheet (.xlsx) or another zip archive",
        "Export the sheet as CSV UTF-8, or unpack the archive.",
    ),
    b"\xd0\xcf\x11\xe0": ("a document of an old Microsoft Office", "Export it as CSV UTF-8."),
    b"PAR1": ("a Parquet file", "Let its name end in .parquet."),
    b"ARROW1": ("an Arrow file", "Let its name end in .arrow."),
    b"%PDF-": ("a PDF document", "Write its text into a .txt file."),
    b"SQLite format 3": ("an SQLite database", "Export its table as CSV UTF-8."),
}

LONGEST = 48
"""Bytes that show what a file is."""


def describe_text(start: bytes) -> str | None:
    """Say what a file is whose first bytes forbid to read it as UTF-8; None if they do not."""
    for mark, encoding in _ENCODINGS.items():
        if start.startswith(mark):
            return f"the file is {encoding}, by its first bytes. {convert(encoding)}"
    if start.startswith(_POINTER):
        return "the file is a pointer of Git LFS, not the data. Fetch them: git lfs pull."
    return None


def describe_binary(start: bytes) -> str | None:
    """Say what a file is that turned out to be no text; None if its first bytes are of no known kind."""
    for mark, (kind, remedy) in _BINARY.items():
        if start.startswith(mark):
            return f"is {kind}, by its first bytes. {remedy}"
    return None


def convert(encoding: str) -> str:
    """Say how a file is converted to UTF-8."""
    return f"Convert it to UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW."
