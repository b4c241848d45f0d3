"""Seeded corruptions of a checkpoint, and what becomes of each.

Each is applied to the newest checkpoint of a run, every fourth to its predecessor too. Allowed is
a refusal in one line, the predecessor with a line that says so, or the very content that was saved
(the damage hit bytes that mean nothing). Never a traceback, never code out of the file, never
other content. :func:`corruptions` and :meth:`Corruption.apply` also serve tests of whole commands.
"""

import io
import math
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from export_weights import export_weights
from lib.errors import InputError
from lib.runs.retention import load_newest, save_newest

OUTCOMES = ("refused", "fell back", "loaded unharmed", "traceback", "code run", "silent wrong")
ALLOWED = OUTCOMES[:3]


@dataclass(frozen=True)
class Corruption:
    """One corruption; the same seed does the same to the same file."""

    kind: str
    seed: int
    both: bool  # whether the predecessor gets one of the same kind

    def apply(self, path: Path, trap: Path) -> None:
        """Corrupt the checkpoint at ``path`` and, if ``both``, its predecessor.

        Args:
            path: the newest checkpoint; checkpoint.1.pt, say, is its predecessor.
            trap: a file that code in the corrupted one would create.
        """
        rng = random.Random(self.seed)
        KINDS[self.kind](path, rng, trap)
        if self.both:
            KINDS[self.kind](path.with_name(f"{path.stem}.1{path.suffix}"), rng, trap)


def corruptions(count: int, seed: int = 0) -> Iterator[Corruption]:
    """``count`` corruptions, of all kinds in turn; each fourth round is of both files."""
    rng = random.Random(seed)
    for index in range(count):
        round_, kind = divmod(index, len(KINDS))
        yield Corruption(list(KINDS)[kind], rng.getrandbits(32), both=round_ % 4 == 3)


class Creates:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# --- Damage to bytes --------------------------------------------------------------------------


def _truncated(data: bytearray, rng: random.Random) -> None:
    # Near the end as often as anywhere: the directory stands there.
    cut = rng.randrange(len(data)) if rng.random() < 0.5 else len(data) - rng.randint(1, 64)
    del data[cut:]


def _flip(data: bytearray, rng: random.Random, start: int = 0, end: int | None = None) -> None:
    data[rng.randrange(start, len(data) if end is None else end)] ^= 1 << rng.randrange(8)


def _several_flips(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 20)):
        _flip(data, rng)


def _flip_in(find: Callable[[bytearray, random.Random], tuple[int, int]]):
    def damage(data: bytearray, rng: random.Random) -> None:
        start, end = find(data, rng)
        for _ in range(rng.randint(1, 3)):
            _flip(data, rng, start, end)

    return damage


def _headers(data: bytearray) -> list[tuple[int, int, int]]:
    """Of each entry of an archive: where its header, its padding and its content begin."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        starts = [entry.header_offset for entry in archive.infolist()]
    found = []
    for start in starts:
        name, extra = struct.unpack_from("<HH", data, start + 26)
        found.append((start, start + 30 + name, start + 30 + name + extra))
    return found


def _a_header(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start, padding, _ = rng.choice(_headers(data))
    return start, padding


def _a_padding(data: bytearray, rng: random.Random) -> tuple[int, int]:
    _, start, end = rng.choice([found for found in _headers(data) if found[1] < found[2]])
    return start, end


def _content_of(part: bytes) -> Callable[[bytearray, random.Random], tuple[int, int]]:
    def find(data: bytearray, rng: random.Random) -> tuple[int, int]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
        found = [
            (content, content + size)
            for (start, padding, content), size in zip(_headers(data), sizes, strict=True)
            if size and part in data[start:padding]
        ]
        return rng.choice(found)

    return find


def _directory(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = data.index(b"PK\x01\x02", _headers(data)[-1][2])
    return start, data.index(b"PK\x06\x06", start)


def _end_records(data: bytearray, rng: random.Random) -> tuple[int, int]:
    return data.rindex(b"PK\x06\x06"), len(data)


def _folder_attribute(data: bytearray, rng: random.Random) -> None:
    """Mark an entry as a folder in the directory: torch would leave its memory as it is."""
    start, end = _directory(data, rng)
    entries = [i for i in range(start, end) if data[i : i + 4] == b"PK\x01\x02"]
    data[rng.choice(entries) + 38] ^= 0x10


def _blocks(data: bytearray, rng: random.Random, count: int) -> list[slice]:
    size = min(rng.choice([16, 128, 512, 4096]), len(data) // 4)
    starts = rng.sample(range(len(data) // size), count)
    return [slice(start * size, (start + 1) * size) for start in starts]


def _zero_block(data: bytearray, rng: random.Random) -> None:
    (block,) = _blocks(data, rng, 1)
    data[block] = bytes(block.stop - block.start)


def _swapped_blocks(data: bytearray, rng: random.Random) -> None:
    first, second = _blocks(data, rng, 2)
    data[first], data[second] = data[second], data[first]


def _inserted(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randint(1, 64))


def _removed(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) - 1)
    del data[at : at + rng.randint(1, 64)]


def _appended(data: bytearray, rng: random.Random) -> None:
    data += rng.choice([bytes(512), rng.randbytes(100)])


def _two_copies(data: bytearray, rng: random.Random) -> None:
    """A damaged one, then a good one: one reader could verify the other's."""
    good = bytes(data)
    _flip_in(_content_of(b"/data/"))(data, rng)
    data += good


def _huge_header(data: bytearray, rng: random.Random) -> None:
    """Let an entry claim more bytes than any disk has, in one of the three places."""
    where = rng.choice([_a_header, _directory, _end_records])
    start, end = where(data, rng)
    at = start + {_a_header: 18, _directory: 20, _end_records: rng.choice([24, 40, 48])}[where]
    data[at : min(at + 8, end)] = b"\xff" * (min(at + 8, end) - at)


def _damage(change: Callable[[bytearray, random.Random], None]):
    def corrupt(path: Path, rng: random.Random, trap: Path) -> None:
        data = bytearray(path.read_bytes())
        change(data, rng)
        path.write_bytes(data)

    return corrupt


# --- Other files ------------------------------------------------------------------------------


def _bytes(make: Callable[[random.Random], bytes]):
    def corrupt(path: Path, rng: random.Random, trap: Path) -> None:
        path.write_bytes(make(rng))

    return corrupt


def _missing(path: Path, rng: random.Random, trap: Path) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random, trap: Path) -> None:
    path.unlink()
    path.mkdir()


def _png(rng: random.Random) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + rng.randbytes(200) + b"IEND\xaeB\x60\x82"


def _with_code(path: Path, rng: random.Random, trap: Path):
    """The checkpoint with an object in it whose unpickling runs code."""
    content = torch.load(path, weights_only=True)
    content[rng.choice(list(content))] = Creates(trap)
    return rng.choice([content, [content], Creates(trap)])


def _pickle_with_code(path: Path, rng: random.Random, trap: Path) -> None:
    path.write_bytes(pickle.dumps(_with_code(path, rng, trap), protocol=rng.randint(0, 5)))


def _torch_with_code(path: Path, rng: random.Random, trap: Path) -> None:
    torch.save(_with_code(path, rng, trap), path)


def _old_torch_with_code(path: Path, rng: random.Random, trap: Path) -> None:
    torch.save(_with_code(path, rng, trap), path, _use_new_zipfile_serialization=False)


def _old_torch(path: Path, rng: random.Random, trap: Path) -> None:
    """The same content without checksums, and cut: whole, it would be as good as the original."""
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    _damage(_truncated)(path, rng, trap)


def _archive_with_code(path: Path, rng: random.Random, trap: Path) -> None:
    """A torch file whose pickle was replaced, with the right checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            code = pickle.dumps(Creates(trap), protocol=2)
            archive.writestr(name, code if name.endswith("data.pkl") else content)


def _tar_with_code(path: Path, rng: random.Random, trap: Path) -> None:
    """With the members of torch's first format."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Creates(trap), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _compressed(path: Path, rng: random.Random, trap: Path) -> None:
    """An archive of a few kilobytes that would unfold into many megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(rng.randint(2**22, 2**23)))
        archive.writestr("archive/version", b"3\n")


def _other_structure(path: Path, rng: random.Random, trap: Path) -> None:
    torch.save(rng.choice([[], {}, {"format": 1}, {1: torch.ones(2)}, torch.ones(3), 5]), path)


def _safetensors(path: Path, rng: random.Random, trap: Path) -> None:
    weights = path.with_name("weights.safetensors")
    export_weights({"weight": torch.ones(3)}, weights)
    os.replace(weights, path)


KINDS: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "truncated": _damage(_truncated),
    "one bit": _damage(_flip),
    "several bits": _damage(_several_flips),
    "bits of a tensor": _damage(_flip_in(_content_of(b"/data/"))),
    "bits of the pickle": _damage(_flip_in(_content_of(b"/data.pkl"))),
    "bits of a local header": _damage(_flip_in(_a_header)),
    "bits of padding": _damage(_flip_in(_a_padding)),
    "bits of the directory": _damage(_flip_in(_directory)),
    "folder attribute": _damage(_folder_attribute),
    "bits of the end records": _damage(_flip_in(_end_records)),
    "zero-filled block": _damage(_zero_block),
    "swapped blocks": _damage(_swapped_blocks),
    "bytes inserted": _damage(_inserted),
    "bytes removed": _damage(_removed),
    "bytes appended": _damage(_appended),
    "two copies, one damaged": _damage(_two_copies),
    "huge sizes in a header": _damage(_huge_header),
    "compressed archive": _compressed,
    "empty": _bytes(lambda rng: b""),
    "noise": _bytes(lambda rng: rng.randbytes(rng.randint(1, 4000))),
    "text": _bytes(lambda rng: b"step 1 | loss 2.5\n" * rng.randint(1, 50)),
    "picture": _bytes(_png),
    "missing": _missing,
    "folder": _folder,
    "pickle with code": _pickle_with_code,
    "torch file with code": _torch_with_code,
    "old torch file with code": _old_torch_with_code,
    "archive with code": _archive_with_code,
    "tar with code": _tar_with_code,
    "old torch file, cut": _old_torch,
    "other structure": _other_structure,
    "safetensors": _safetensors,
}


# --- What becomes of them ---------------------------------------------------------------------

_FORMAT = "corruptions"


def small_checkpoint(step: int) -> dict:
    """What a trainer saves, in small."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).requires_grad_()
    optimizer = torch.optim.RAdam(model.parameters())
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    return {
        "format": _FORMAT,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best_loss": math.inf,
        "mems": [torch.randn(3, 2).bfloat16(), torch.zeros(0)],
        "torch_random": torch.get_rng_state(),
        "random": random.Random(step).getstate(),
    }


def _check(content, source: Path) -> None:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"{source} is not a checkpoint of this trainer")


def same(a, b) -> bool:
    """Whether two contents are equal to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(
            a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Judge:
    """Applies corruptions to a small checkpoint with a predecessor, and says what became of it."""

    def __init__(self, folder: Path):
        self.path, self.trap = folder / "checkpoint.pt", folder / "trap"
        self.before, self.newest = small_checkpoint(1), small_checkpoint(2)

    def outcome(self, corruption: Corruption) -> tuple[str, str]:
        """One of OUTCOMES, and the message or the lines that belong to it."""
        self._write()
        corruption.apply(self.path, self.trap)
        outcome, words = self._read()
        return ("code run" if self.trap.exists() else outcome), words

    def _write(self) -> None:
        folder = self.path.parent
        for entry in folder.iterdir():
            entry.rmdir() if entry.is_dir() else entry.unlink()
        save_newest(self.before, self.path, 2)
        save_newest(self.newest, self.path, 2)

    def _read(self) -> tuple[str, str]:
        lines = []
        try:
            content, source = load_newest(self.path, _check, lines.append)
        except InputError as error:
            return ("traceback" if "\n" in str(error) else "refused"), str(error)
        except BaseException as error:
            return "traceback", repr(error)
        if source == self.path and not lines and same(content, self.newest):
            return "loaded unharmed", ""
        told = len(lines) == 1 and f"{self.path}" in lines[0] and f"{source}" in lines[0]
        if source != self.path and told and "\n" not in lines[0] and same(content, self.before):
            return "fell back", lines[0]
        return "silent wrong", "\n".join(lines)
