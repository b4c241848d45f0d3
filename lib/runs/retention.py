"""The last checkpoints of a run: checkpoint.pt, then checkpoint.1.pt and so on, each older.

If the newest one is damaged, a resumed run continues from the next older one.
"""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

from lib.errors import InputError
from lib.runs.atomic_files import TEMPORARY, temporary_beside
from lib.runs.checkpoint import load, save_atomic


def save_newest(content, path: str | Path, keep: int) -> None:
    """Write ``content`` as the newest of ``keep`` checkpoints; ``path`` is its file.

    The new file is first written in full. Then each older file gets the next number, and the new
    one the name ``path``. A kill at any time leaves ``path`` with its old or new content.
    Exception: on a file system without hard links it is missing for a moment, with its old content
    in number 1.

    Raises:
        OSError: the file cannot be written; on a full disk all files are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the newest checkpoint is kept")
    path = Path(path)
    save_atomic(content, path, before_rename=lambda: _rotate(path, keep))
    for number, older in _predecessors(path).items():
        if number >= keep:
            older.unlink(missing_ok=True)


def versions(path: str | Path) -> list[Path]:
    """The existing checkpoints, newest first; ``path`` itself may be missing."""
    path = Path(path)
    newest = [path] if path.is_file() else []
    return newest + list(_predecessors(path).values())


def load_newest(
    path: str | Path, check: Callable[[object, Path], None], log: Callable[[str], None]
) -> tuple[object, Path]:
    """Read the newest good checkpoint that :func:`versions` finds.

    Args:
        path: that of the newest checkpoint.
        check: called with a content and its file; raises an InputError if it is no checkpoint of
            this trainer. Settings are not checked: they are the same in the older files.
        log: called with a warning line if a file was passed over.

    Returns:
        The content and its file.

    Raises:
        InputError: that of the newest, if none is good.
    """
    path = Path(path)
    found = versions(path) or [path]  # for a missing file load() raises the right error
    errors = []
    for source in found:
        try:
            content = load(source)
            check(content, source)
        except InputError as error:
            errors.append(error)
            continue
        missing = [] if found[0] == path else [f"no file {path}"]
        if problems := missing + [" ".join(str(error).split()) for error in errors]:
            log(f"warning: {'; '.join(problems)}; going on from {source}, saved before it")
        return content, source
    raise errors[0]


def set_aside(path: str | Path, used: Path) -> list[Path]:
    """Rename the checkpoints newer than ``used``, which :func:`load_newest` passed over.

    The next saves would otherwise keep damaged files and delete good ones. Nothing is overwritten:
    the new paths, which are returned, are checkpoint.damaged.pt, checkpoint.damaged.2.pt, ...
    """
    path = Path(path)
    found = versions(path)
    bad = found[: found.index(used)] if used in found else []
    if path.is_dir():  # the next save would fail
        bad.insert(0, path)
    numbers = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (_numbered(path, f"damaged{number}") for number in numbers)
    return [file.rename(next(n for n in names if not os.path.lexists(n))) for file in bad]


def clean_temporaries(folder: str | Path) -> None:
    """Remove the files of killed writes in ``folder``; no write may be in progress."""
    folder = Path(folder)
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if TEMPORARY.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def _numbered(path: Path, number: int | str) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _predecessors(path: Path) -> dict[int, Path]:
    """The existing older checkpoints by number, newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]*){re.escape(path.suffix)}")
    found = {}
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and entry.is_file():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def _rotate(path: Path, keep: int) -> None:
    """Shift the numbers of the older checkpoints, and link ``path`` to number 1."""
    older = _predecessors(path)
    if keep == 1 or not path.is_file():
        return
    if 1 in older and older[1].samefile(path):  # done by a save that was killed after it
        return
    # The shift ends at the first missing number, or overwrites the last number to keep.
    gap = next(number for number in itertools.count(1) if number not in older)
    for number in reversed(range(1, min(gap, keep - 1))):
        os.replace(_numbered(path, number), _numbered(path, number + 1))
    # Through a hidden name, as os.link cannot overwrite a file.
    link = temporary_beside(path)
    try:
        os.link(path, link)
    except OSError:  # this file system has no hard links
        link = path
    os.replace(link, _numbered(path, 1))
