"""The last checkpoints of a run: checkpoint.pt, and before it checkpoint.1.pt, checkpoint.2.pt, ...

A save never leaves the run without a readable checkpoint, whenever it is killed; and a start that
finds the newest one damaged goes on from the one before.
"""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

from lib.checkpoint import load, save_atomic
from lib.errors import InputError
from lib.files import TEMPORARY, temporary_beside


def save_newest(content, path: str | Path, keep: int) -> None:
    """Write ``content`` as the newest checkpoint, and keep those before it.

    The new file is written in full before any other is touched; then each takes the next number,
    and the new one the name ``path``. A kill at any instant leaves ``path`` with its old or its
    new content (only where the file system has no hard links, it is missing for an instant, with
    the old content as number 1).

    Args:
        content: tensors and plain containers.
        path: the name of the newest, such as checkpoint.pt; its predecessor is checkpoint.1.pt.
        keep: the number of files that are kept, this one among them.

    Raises:
        OSError: it cannot be written; on a full disk all files are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the newest checkpoint is kept")
    path = Path(path)
    save_atomic(content, path, before_rename=lambda: _rotate(path, keep))
    for number, older in _predecessors(path).items():
        if number >= keep:
            older.unlink(missing_ok=True)


def versions(path: str | Path) -> list[Path]:
    """The checkpoints that are there, newest first: ``path`` itself, then those before it.

    Any may be missing in between, ``path`` too.
    """
    path = Path(path)
    newest = [path] if path.is_file() else []
    return newest + list(_predecessors(path).values())


def load_newest(
    path: str | Path, check: Callable[[object, Path], None], log: Callable[[str], None]
) -> tuple[object, Path]:
    """Read the newest good checkpoint of those that :func:`versions` finds.

    Args:
        path: the name of the newest.
        check: given what was read and its file, raises an InputError if it is no checkpoint of
            this trainer. Settings are not its business: those of an older one differ as well.
        log: given a line that names the files passed over, why, and the one used, if any was.

    Returns:
        The content, and the file that it was read from.

    Raises:
        InputError: none is good; the message is that of the newest.
    """
    path = Path(path)
    found = versions(path) or [path]  # of which load() says that it is missing
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

    They become checkpoint.damaged.pt, checkpoint.damaged.2.pt, ..., so that the next saves do not
    push good files out for them. Nothing is deleted or overwritten.

    Returns:
        The new names.
    """
    path = Path(path)
    found = versions(path)
    bad = found[: found.index(used)] if used in found else []
    if path.is_dir():  # it would fail the next save
        bad.insert(0, path)
    return [_rename_damaged(path, file) for file in bad]


def clean_temporaries(folder: str | Path) -> None:
    """Remove what writes that were killed left in ``folder``; no write may be going on there."""
    folder = Path(folder)
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if TEMPORARY.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def _numbered(path: Path, number: int | str) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _predecessors(path: Path) -> dict[int, Path]:
    """The older checkpoints that are there by number, newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]*){re.escape(path.suffix)}")
    found = {}
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and entry.is_file():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def _rotate(path: Path, keep: int) -> None:
    """Give ``path`` the name of number 1 too, and those before it the next numbers."""
    older = _predecessors(path)
    if keep == 1 or not path.is_file():
        return
    if 1 in older and older[1].samefile(path):  # done already, by a save killed before its end
        return
    # A number that is missing takes up the shift; the last one to keep is overwritten.
    gap = next(number for number in itertools.count(1) if number not in older)
    for number in reversed(range(1, min(gap, keep - 1))):
        os.replace(_numbered(path, number), _numbered(path, number + 1))
    # By way of a hidden name, as a link cannot overwrite.
    link = temporary_beside(path)
    try:
        os.link(path, link)
    except OSError:  # no links on this file system
        link = path
    os.replace(link, _numbered(path, 1))


def _rename_damaged(path: Path, file: Path) -> Path:
    names = itertools.chain(["damaged"], (f"damaged.{number}" for number in itertools.count(2)))
    target = next(t for t in (_numbered(path, name) for name in names) if not os.path.lexists(t))
    os.rename(file, target)
    return target
