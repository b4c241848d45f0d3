"""Writing files whole or not at all."""

import contextlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# The names of the files that a write leaves behind if it is killed.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}", re.DOTALL)


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the folder of ``path``; it matches TEMPORARY."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextmanager
def atomic_write(path: Path, before_rename: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` once the block has ended well.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and are renamed
    over ``path``: whoever reads sees the old file or the whole new one, also after a crash.

    Args:
        path: the file to write.
        before_rename: called between the two, when nothing can fail for want of space any more.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; ``path`` is untouched.
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
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say what did not fit
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Let a rename survive a power cut; where folders cannot be opened, it is up to the system."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
