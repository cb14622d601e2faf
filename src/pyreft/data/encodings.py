"""Text files of any encoding that people's programs write: told apart for certain, or refused with what to do.

Knows nothing of what the text says.
"""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ReftError
from ..files.text import check_file

# the longer marks first: that of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PACKED = {
    b"\x1f\x8b": "a file of gzip",
    b"BZh": "a file of bzip2",
    b"\xfd7zXZ": "a file of xz",
    b"\x28\xb5\x2f\xfd": "a file of zstd",
    b"PK\x03\x04": "a zip file, as those of Excel are",
    b"\xd0\xcf\x11\xe0": "a file of an old Excel",
    b"PAR1": "a parquet file",
}
_PAGE = "a web page; download the file itself, its raw form."
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` brings the file itself.",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
}
_HEAD = 4096  # bytes


@contextmanager
def open_text(path: Path, encoding: str | None = None) -> Iterator[io.TextIOBase]:
    """Open a text file whose line ends stay as they are; a byte order mark is no part of it.

    Args:
        path: the file.
        encoding: the name of it; by default UTF-8, or what a byte order mark or zero bytes say.

    Raises:
        ReftError: no such file, or one that cannot be read; in the block, bytes that are not of the encoding.
    """
    check_file(path)
    try:
        chosen = _encoding_of(path, _checked(encoding) if encoding else None)
        with path.open(encoding=chosen, newline="") as file:
            yield file
    except UnicodeError:
        raise _undecoded(path, chosen) from None
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise
        raise ReftError(f"{path}: the file cannot be read ({error.strerror}).") from None


def _checked(encoding: str) -> str:
    try:
        if codecs.lookup(encoding)._is_text_encoding:
            return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    except LookupError:
        pass
    raise ReftError(f"expected an encoding such as utf-8, utf-16 or cp1252, got {encoding!r}.", setting="encoding")


def _encoding_of(path: Path, given: str | None) -> str:
    """What the first bytes of a file say, else the encoding that is given; they cannot contradict each other."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for begin, kind in _PACKED.items():
        if head.startswith(begin):
            raise ReftError(
                f"{path}: expected text, this is {kind}; unpack it, save it as CSV, or give it its own ending."
            )
    for begin, what in _OTHERS.items():
        if head.lstrip().lower().startswith(begin):
            raise ReftError(f"{path}: this is {what}")
    for mark, name in _MARKS:
        if head.startswith(mark):
            if given and not codecs.lookup(given).name.startswith(name.removesuffix("-sig")):
                raise ReftError(f"{path} says by its first bytes that it is {name.removesuffix('-sig').upper()}, "
                                f"got {given!r}; leave it out.", setting="encoding")  # fmt: skip
            return name
    if given:
        return given
    even, odd = head[0::2], head[1::2]
    # text of Latin letters in two bytes each: every other byte is zero, and of UTF-8 none
    if odd.count(0) > len(odd) // 2 and not even.count(0):
        return "utf-16-le"
    if even.count(0) > len(even) // 2 and not odd.count(0):
        return "utf-16-be"
    return "utf-8-sig"


def _undecoded(path: Path, encoding: str) -> ReftError:
    """What to say of a file that is not of an encoding, with the first line that is not."""
    if not encoding.startswith("utf-8"):
        return ReftError(f"{path}: the file is not {encoding.upper()} text; name its own with `encoding`, or save it "
                         "as UTF-8.", also=["encoding"])  # fmt: skip
    number, around = 0, b""
    with path.open("rb") as file:
        for line in file:
            number += 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                around = line[max(error.start - 20, 0) : error.start + 20]
                break
    try:
        shown = around.decode("cp1252").strip()
    except UnicodeDecodeError:
        return ReftError(f"{path}, line {number}: the file is not UTF-8 text; save it as UTF-8, or name its encoding "
                         "with `encoding`.", also=["encoding"])  # fmt: skip
    return ReftError(
        f"{path}, line {number}: the file is not UTF-8 text. As cp1252, which Excel writes in Western Europe, it reads "
        f"{shown!r}: if that is right, give `encoding` cp1252; else save the file as UTF-8, or name its own.",
        also=["encoding"],
    )
