"""Atomic writes: the whole new file, or no change."""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Names of the temporary files that a killed write leaves behind.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)


def temporary_beside(path: Path) -> Path:
    """A new hidden path in the folder of ``path``; its name matches TEMPORARY."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def atomic_write(path: Path, before_rename: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` if the block ends without an error.

    The data goes to a temporary file in the same folder, which is flushed to the disk and then
    renamed. ``before_rename`` is called between, when lack of space can no longer be an error.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; ``path`` is unchanged.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
        # So the rename survives a power cut, where this is supported.
        with contextlib.suppress(OSError):
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # the error of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
