"""The demo corpus: a small WikiText-style text made from Python's own documentation.

No download is needed. The documents are the modules of the standard library (docstrings and
comments, read from the source files without importing them) and the topics of ``help()``. The text
is the same on every machine with the same Python version and differs a little between versions. An
existing corpus is never rebuilt for another Python version.
"""

import ast
import hashlib
import io
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from deq_sequence.text.docstring_prose import prose
from deq_sequence.text.vocabulary import UNK
from lib.errors import InputError
from lib.runs.atomic_files import atomic_write

FORMAT_VERSION = 1  # to be raised whenever the same sources give another text
MANIFEST = "demo_corpus.json"
SPLITS = ("train", "valid", "test")
MIN_COUNT = 3  # a word that occurs less often than this in train becomes <unk> in all splits
HELD_OUT = {"valid": 0.05, "test": 0.05}  # shares of the tokens
_TEST_FOLDERS = frozenset(("test", "tests", "idle_test"))
_COMMENT = re.compile(r"\s*#+(?!!) ?(.*)")


class Document(NamedTuple):
    """A module or a help topic; a paragraph is a string of space-separated tokens."""

    source: str
    name: str
    paragraphs: list[str]


def build_demo_corpus(datadir: str | Path) -> dict:
    """Write ``train.txt``, ``valid.txt`` and ``test.txt`` into ``datadir`` if they are missing.

    A paragraph is a line of space-separated, lower-cased tokens. A document begins with a blank
    line, a heading line `` = name = `` and a blank line. Each document belongs as a whole to train
    (90 %), valid or test (5 % each), chosen by a hash of its name. A paragraph that occurs several
    times is kept once, so no paragraph of valid or test is seen in training.

    Returns:
        The manifest, also saved as ``demo_corpus.json``: ``format``, ``python`` (the version of
        the documentation), ``types`` (size of the vocabulary of train with ``<eos>``), and per
        split the ``bytes`` of the file, ``tokens`` with one ``<eos>`` per line, and ``unk_share``.

    Raises:
        InputError: the folder cannot be written to; it holds text that this function did not make
            (the text is not changed); or this Python has no sources of the standard library.
    """
    datadir = Path(datadir)
    manifest = _read_manifest(datadir)
    if manifest is not None and _is_complete(datadir, manifest):
        return manifest
    if manifest is None:
        for split in SPLITS:
            if (datadir / f"{split}.txt").exists():
                raise InputError(
                    f"{datadir / split}.txt is not part of a demo corpus and would be overwritten: "
                    f"name another folder for --dataset demo"
                )
    texts = demo_texts()
    manifest = _describe(texts)
    try:
        datadir.mkdir(parents=True, exist_ok=True)
        # The manifest is written first. It marks an interrupted build as ours, and its sizes show
        # that the build is incomplete.
        _write(datadir / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        for split in SPLITS:
            _write(datadir / f"{split}.txt", texts[split])
    except OSError as error:
        raise InputError(
            f"cannot write the demo corpus to {datadir} ({error.strerror}): "
            f"name a folder that can be written to"
        ) from None
    return manifest


def demo_texts(min_count: int | None = None) -> dict[str, str]:
    """The text of each split; words below ``min_count`` (MIN_COUNT) in train become ``<unk>``.

    Raises:
        InputError: this Python has no sources of the standard library.
    """
    documents = list(_documents(Path(sysconfig.get_path("stdlib"))))
    texts = _render(documents, MIN_COUNT if min_count is None else min_count)
    if not all(texts.values()):
        raise InputError(
            "this Python has too little documentation to make the demo corpus from: use an "
            "installation with the sources of the standard library"
        )
    return texts


def _documents(stdlib: Path) -> Iterator[Document]:
    """Yield all modules under ``stdlib`` and all help topics that have prose not yielded before."""
    seen: set[str] = set()
    for source, name, texts in _sources(stdlib):
        paragraphs = [" ".join(tokens) for text in texts for tokens in prose(text)]
        fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
        seen.update(fresh)
        if fresh:
            yield Document(source, name, fresh)


def _sources(stdlib: Path) -> Iterator[tuple[str, str, list[str]]]:
    for folder, subfolders, files in os.walk(stdlib):
        # os.walk visits only the folders that stay in this list. Folders that are not packages,
        # such as site-packages or lib-dynload, have names that are not identifiers.
        subfolders[:] = sorted(f for f in subfolders if f.isidentifier() and f not in _TEST_FOLDERS)
        for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
            name = path.relative_to(stdlib).with_suffix("").as_posix()
            yield "module", name.removesuffix("/__init__"), _texts(path.read_bytes())
    for topic in sorted(topics):
        yield "help", topic, [topics[topic]]


def _texts(source: bytes) -> list[str]:
    """Docstrings and comment blocks of a module, in the order of the file."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = source.decode(encoding)
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # the file is not a module, but a template or an example
        return []
    found = [
        (node.body[0].lineno, docstring)
        for node in _definitions(tree)
        if (docstring := ast.get_docstring(node))
    ]
    return [text for _, text in sorted([*found, *_comment_blocks(text)])]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield ``node`` and all functions and classes in it. Expressions contain none: skipped."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _definitions(child)


def _comment_blocks(text: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""]):
        comment = _COMMENT.match(line)
        if comment:
            block.append(comment[1])
        elif block:
            yield number, "\n".join(block)
            block = []


def _assign(documents: list[Document]) -> list[str]:
    """The split of each document, such that every split has its share of modules and of topics."""
    sizes = [sum(p.count(" ") + 1 for p in document.paragraphs) for document in documents]
    totals = Counter()
    for document, size in zip(documents, sizes, strict=True):
        totals[document.source] += size
    room = {(s, split): share * totals[s] for s in totals for split, share in HELD_OUT.items()}

    def by_hash(i: int) -> bytes:
        return hashlib.sha256(documents[i].name.encode()).digest()

    splits = ["train"] * len(documents)
    for i in sorted(range(len(documents)), key=by_hash):
        for split in HELD_OUT:
            if sizes[i] <= room[documents[i].source, split]:
                room[documents[i].source, split] -= sizes[i]
                splits[i] = split
                break
    return splits


def _render(documents: list[Document], min_count: int) -> dict[str, str]:
    """The text of each split, rare words replaced by ``<unk>``."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document, split in zip(documents, _assign(documents), strict=True):
        heading = " ".join(re.findall(r"[a-z0-9]+", f"{document.source} {document.name}".lower()))
        lines[split] += ["", f"= {heading} =", "", *document.paragraphs]
    counts = Counter(word for line in lines["train"] for word in line.split())

    def known(line: str) -> str:
        return " ".join(word if counts[word] >= min_count else UNK for word in line.split())

    return {split: "".join(f" {known(line)} \n" for line in lines[split]) for split in SPLITS}


def _describe(texts: dict[str, str]) -> dict:
    splits = {}
    for split, text in texts.items():
        words = text.split()
        tokens = len(words) + text.count("\n")
        splits[split] = {
            "bytes": len(text.encode()),
            "tokens": tokens,
            "unk_share": round(words.count(UNK) / tokens, 4),
        }
    return {
        "format": FORMAT_VERSION,
        "python": platform.python_version(),
        "types": len(set(texts["train"].split())) + 1,
        "splits": splits,
    }


def _read_manifest(datadir: Path) -> dict | None:
    try:
        manifest = json.loads((datadir / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _is_complete(datadir: Path, manifest: dict) -> bool:
    try:
        return manifest["format"] == FORMAT_VERSION and all(
            (datadir / f"{split}.txt").stat().st_size == manifest["splits"][split]["bytes"]
            for split in SPLITS
        )
    except (OSError, KeyError, TypeError):
        return False


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
