"""Picture files of a command line: which there are, names for outputs, one bad file among many."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lib.errors import InputError
from lib.runs.command_line import put
from lib.runs.interrupts import memory_for


class PictureFile(NamedTuple):
    """A file to read."""

    path: Path
    name: str  # for its outputs: without suffix, unlike all others; it may contain folders


def find_pictures(arguments: Iterable[str]) -> tuple[list[PictureFile], list[InputError]]:
    """The files that a command line names, and what is wrong with some arguments.

    A folder stands for all picture files below it, in the order of their paths, by the suffixes
    that Pillow reads; hidden files do not count. Names are those of the files, or their paths
    below the folder. A name that another file has already gets -2, -3, ... behind it.
    """
    found: list[tuple[Path, Path]] = []  # path, and name with suffix
    wrong = []
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for given in arguments:
        argument = Path(given)
        if not given:  # it would stand for this folder
            wrong.append(InputError("the name of a picture is empty: give a file or a folder"))
            continue
        if not os.path.isdir(argument):
            found.append((argument, Path(argument.name)))
            continue
        below = [(path, path.relative_to(argument)) for path in sorted(argument.rglob("*"))]
        inside = [
            (path, relative)
            for path, relative in below
            if path.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in relative.parts)
            and path.is_file()
        ]
        if not inside:
            wrong.append(InputError(f"folder {argument} holds no picture: give another one"))
        found += inside
    taken: set[str] = set()
    pictures = []
    for path, relative in found:
        plain = name = str(relative.with_suffix(""))
        number = 1
        while name.casefold() in taken:  # some file systems ignore the case of letters
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.casefold())
        pictures.append(PictureFile(path, name))
    return pictures, wrong


def use_each(
    arguments: Sequence[str],
    use: Callable[[PictureFile], object],
    check: Callable[[list[PictureFile]], object],
) -> None:
    """Call ``use`` for each picture; those that cannot be used are listed, and lose no others.

    ``check`` is called before, with all pictures.

    Raises:
        InputError: at the end, if a picture or an argument could not be used.
    """
    pictures, wrong = find_pictures(arguments)
    check(pictures)
    number = len(pictures) + len(wrong)
    if number == 1 and wrong:
        raise wrong[0]
    for error in wrong:
        put(f"left out: {error}", sys.stderr)
    for picture in pictures:
        try:
            with memory_for(f"make {picture.path} smaller"):
                use(picture)
        except InputError as error:
            if number == 1:
                raise
            wrong.append(error)
            put(f"left out: {error}", sys.stderr)
    if wrong:
        raise InputError(f"{len(wrong)} of {number} could not be used: see the lines 'left out'")
