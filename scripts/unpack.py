"""Unpack an archive from elsewhere into a new folder, for the get_data.sh of both rooms.

    python3 scripts/unpack.py ARCHIVE FOLDER GIGABYTES

ARCHIVE is a zip or a tar file, compressed or not. FOLDER must not exist. Only files and folders
are unpacked: an archive with anything else (links, devices), with a path that leaves FOLDER, with
two files of one name, or with more than GIGABYTES in all is refused, and leaves no FOLDER behind.
Only the standard library is needed, of Python 3.9 or newer: tar's own filters came with 3.12.
"""

import re
import resource
import shutil
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

BLOCK = 2**20
MEMORY = 2**31  # bytes: a header can claim any length, and is read as a whole
MOST_FILES = 2_000_000  # ImageNet has 1.3 million


class Refused(Exception):
    """The archive must not be unpacked, or cannot be read."""


class Entry(NamedTuple):
    """A file or folder in an archive."""

    name: str
    is_folder: bool
    is_file: bool  # False for both: a link, a device, ...
    open: Callable[[], IO[bytes]]


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    try:
        archive, folder, gigabytes = argv
        most_bytes = int(float(gigabytes) * 1e9)
    except (ValueError, OverflowError):
        print("usage: unpack.py ARCHIVE FOLDER GIGABYTES (a number)", file=sys.stderr)
        return 2
    try:
        unpack(Path(archive), Path(folder), most_bytes)
    except KeyboardInterrupt:
        return 130
    except (Refused, OSError) as error:
        print(f"unpack.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def unpack(archive: Path, folder: Path, most_bytes: int) -> None:
    """Unpack ``archive`` into ``folder``, which is made.

    Raises:
        Refused: the archive is damaged, or holds what must not be unpacked.
        OSError: a file cannot be read or written, or ``folder`` exists.
    """
    folder.mkdir(parents=True)
    try:
        with entries_of(archive) as entries:
            left, number = most_bytes, -1
            for number, entry in enumerate(entries):
                if number >= MOST_FILES:
                    raise Refused(f"{archive} holds more than {MOST_FILES} files")
                target = folder / checked_name(archive, entry)
                (target if entry.is_folder else target.parent).mkdir(parents=True, exist_ok=True)
                if not entry.is_folder:
                    left = copy(archive, entry, target, left)
            if number < 0:
                raise Refused(f"{archive} is damaged or no archive (it holds nothing)")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def checked_name(archive: Path, entry: Entry) -> str:
    """The path of an entry, relative to the folder."""
    name = entry.name
    parts = name.replace("\\", "/").split("/")
    leaves = name.startswith(("/", "\\")) or ".." in parts or re.match("[A-Za-z]:", name)
    if leaves or "\0" in name:
        raise Refused(f"{archive} holds a path that leaves the folder: {name!r}")
    if not (entry.is_file or entry.is_folder):
        raise Refused(f"{archive} holds {name!r}, which is no file (a link or a device)")
    return name


def copy(archive: Path, entry: Entry, target: Path, left: int) -> int:
    """Write an entry of at most ``left`` bytes to a new file; return how many are left."""
    try:
        with open(target, "xb") as file, entry.open() as content:
            while block := content.read(BLOCK):
                left -= len(block)
                if left < 0:
                    raise Refused(f"{archive} unfolds into more than it should")
                file.write(block)
    except (FileExistsError, IsADirectoryError) as error:
        raise Refused(f"{archive} holds two entries of one name: {entry.name!r}") from error
    return left


@contextmanager
def entries_of(archive: Path) -> Iterator[Iterator[Entry]]:
    """The entries of a zip or tar file, in its order; what is wrong with it is a Refused."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield (zip_entry(file, info) for info in file.infolist())
        else:
            with tarfile.open(archive) as file:
                yield (tar_entry(file, info) for info in file)
                # A damaged header looks like the end to tarfile; the true end is a block of zeros.
                file.fileobj.seek(file.offset)
                if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise Refused(f"{archive} is damaged (it is cut off)")
    except (Refused, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # gzip's way to say "damaged"
            raise Refused(f"{archive} is damaged ({error})") from error
        raise
    except Exception as error:  # on a damaged archive the readers raise many kinds
        raise Refused(f"{archive} is damaged or no archive ({error})") from error


def zip_entry(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where no Unix made it
    return Entry(
        info.filename,
        info.is_dir() and kind in (0, stat.S_IFDIR),
        not info.is_dir() and kind in (0, stat.S_IFREG),
        lambda: file.open(info),
    )


def tar_entry(file: tarfile.TarFile, info: tarfile.TarInfo) -> Entry:
    return Entry(info.name, info.isdir(), info.isreg(), lambda: file.extractfile(info))


if __name__ == "__main__":
    with suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    sys.exit(main(sys.argv[1:]))
