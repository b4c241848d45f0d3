"""Cutting the text of one file in three: training, validation and test text."""

from pathlib import Path

from deq_sequence.text.demo_corpus import SPLITS
from deq_sequence.text.text_files import read_lines
from lib.errors import InputError


def split_file(path: Path, share: float, *, whole_lines: bool) -> dict[str, str]:
    """The text of each split: first train, then valid and test with a ``share`` of it each.

    Args:
        path: a UTF-8 text file.
        share: of all characters, above 0 and below 0.5.
        whole_lines: cut only at the end of a line; a part grows up to it.

    Raises:
        InputError: the file is not UTF-8, or has too few lines for three parts.
    """
    text = "".join(read_lines(path))
    parts, begin = {}, 0
    for split, upto in zip(SPLITS, (1 - 2 * share, 1 - share, 1), strict=True):
        end = round(upto * len(text))
        if whole_lines:
            end = text.find("\n", max(end - 1, 0)) + 1 or len(text)
        parts[split], begin = text[begin:end], end
        if not parts[split].strip():
            raise InputError(
                f"{path} leaves no {split} text with a --held_out of {share}: raise it, give a "
                "text of more lines, or a folder with three files"
            )
    return parts
