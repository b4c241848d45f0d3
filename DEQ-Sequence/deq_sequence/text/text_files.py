"""Reading the text files of a corpus."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lib.errors import InputError

_PROBE = 4096  # length in bytes of the beginning of a file that decides its format
_BYTE_NUMBERS = frozenset(b"%d" % value for value in range(256))


def read_lines(path: Path) -> Iterator[str]:
    """Stream the lines of a UTF-8 text file; a byte order mark at its beginning is left out.

    Raises:
        InputError: a line is not UTF-8; the message names the file and the line number.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(
                    f"{path}, line {number}: not UTF-8 text: convert the file, for instance with "
                    f"iconv -t utf-8"
                ) from None


def read_bytes(path: Path) -> bytes:
    """Read the bytes of a file of a character data set.

    The first 4 KiB decide its format: the bytes themselves, or that of Transformer-XL, in which
    bytes are decimal numbers separated by spaces, and newlines are themselves.

    Raises:
        InputError: the file begins with numbers but does not continue with numbers from 0 to 255.
    """
    raw = Path(path).read_bytes()
    if not _starts_as_numbers(raw):
        return raw
    # A newline after a space is a symbol. A newline right after a number only ends the line.
    text = (b" " + raw).replace(b" \n", b" 10 ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy warns of unparsed text
            values = np.fromstring(text, dtype=np.int16, sep=" ")
    except (DeprecationWarning, ValueError):
        values = np.array([-1])
    if values.min() < 0 or values.max() > 255:
        raise InputError(
            f"{path} begins as byte values written as numbers but goes on otherwise: "
            f"give raw text, or numbers from 0 to 255 throughout"
        )
    return values.astype(np.uint8).tobytes()


def _starts_as_numbers(raw: bytes) -> bool:
    numbers = raw[:_PROBE].split()
    if len(raw) > _PROBE:
        numbers = numbers[:-1]  # the last number may be cut off
    return len(numbers) > 1 and _BYTE_NUMBERS.issuperset(numbers)
