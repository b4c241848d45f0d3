"""Wrong files of every kind that a command reads, each with what is to become of it.

A subject is a generator of (what was changed, one of OUTCOMES with the reason of a bad one).
"""

import contextlib
import copy
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from run_progress import progress

from corruptions import corruptions
from deq_sequence.command import build_model
from deq_sequence.options import parse
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from harness import TRAINERS, differences
from image_files import write_cityscapes
from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.processes import Processes
from lib.runs.run_folder import METRICS, Run, read_metrics
from lib.runs.trainer import Trainer
from mdeq_vision.command import load_config
from mdeq_vision.datasets import get_cls_dataset
from mdeq_vision.datasets.cityscapes import WAY_OUT, check_names, read_list
from mdeq_vision.model import get_cls_net
from mdeq_vision.options import experiment_parser
from mdeq_vision.tasks import ClassificationTrainer
from wrong_contents import changes, judge

SAVED, END = 5, 7  # steps: the checkpoint, and where the run that goes on from it ends
CPU = torch.device("cpu")


def _outcome(action: Callable[[], bool]) -> str:
    """Of an action that returns whether its result is right."""
    try:
        return "unharmed" if action() else "silent wrong"
    except InputError as error:
        return f"traceback: {error}" if "\n" in str(error) else "refused"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"


# ---- checkpoints -------------------------------------------------------------------------------


def words_checkpoints(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    flags = TRAINERS["language"].start(folder, "run")[1:]
    more = "--num_threads 1 --pretrain_steps 4 --scheduler dev_perf --warmup_step 2"
    args = parse([*flags, *more.split()])
    corpus = get_lm_corpus(args.data, args.dataset)
    return _checkpoints(
        lambda: LMTrainer(args, build_model(args, corpus, CPU), corpus, CPU), folder, count, seed
    )


def images_checkpoints(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    flags = TRAINERS["classification"].start(folder, "run")[1:]
    more = "TRAIN.PRETRAIN_STEPS 4 WORKERS 0 TRAIN.OPTIMIZER rmsprop TRAIN.MOMENTUM 0.5"
    parser = experiment_parser("cls_train.py", "")
    cfg = load_config(parser.parse_intermixed_args([*flags, *more.split()]))
    data = [get_cls_dataset(cfg, split) for split in ("train", "test")]
    return _checkpoints(
        lambda: ClassificationTrainer(cfg, get_cls_net(cfg), *data, CPU, [], Processes()),
        folder,
        count,
        seed,
    )


def _train(trainer: Trainer, upto: int) -> dict:
    trainer.model.train()
    for batch in trainer.batches():
        trainer.update(batch)
        if trainer.step == upto:
            break
    return copy.deepcopy(trainer.state_dict())


def _checkpoints(
    make: Callable[[], Trainer], folder: Path, count: int, seed: int
) -> Iterator[tuple[str, str]]:
    torch.manual_seed(0)
    trainer = make()
    trainer.best = {"phase": "stacked", "score": -2.5, "step": 4, "name": "score"}
    content, path = _train(trainer, SAVED), folder / "checkpoint.pt"

    def use(content) -> dict:
        trainer = make()
        trainer.load_state_dict(content, path)
        return _train(trainer, END)

    def same(a: dict, b: dict) -> bool:
        return not list(differences(a, b))

    torch.save(content, path)
    expected = use(load(path))
    for change in changes(content, count, seed):
        yield f"{change.place}: {change.kind}", judge(path, change, use, expected, same)


# ---- caches of texts ---------------------------------------------------------------------------


def caches(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Damage to the bytes, and other content with right checksums, in turn."""
    _write_texts(folder)
    known = {dataset: get_lm_corpus(folder, dataset) for dataset in ("wt103", "enwik8")}
    whole = {dataset: (folder / f"corpus.{dataset}.pt").read_bytes() for dataset in known}
    contents = {dataset: load(folder / f"corpus.{dataset}.pt") for dataset in known}
    damages = corruptions(count, seed)
    for index, damage in enumerate(damages):
        dataset = list(known)[index % 4 // 2]
        path = folder / f"corpus.{dataset}.pt"
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        path.write_bytes(whole[dataset])
        if index % 2:
            (change,) = changes(contents[dataset], 1, damage.seed)
            torch.save(change.content, path)
            what = f"{dataset}{change.place}: {change.kind}"
        else:
            replace(damage, both=False).apply(path, folder / "trap")
            what = f"{dataset}: {damage.kind}"
        outcome = _outcome(lambda name=dataset: _equals(get_lm_corpus(folder, name), known[name]))
        yield what, "code run" if (folder / "trap").exists() else outcome


def _write_texts(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in (("train", 20), ("valid", 5), ("test", 5)):
        text = "".join(" ".join(rng.choices("abcdefg", k=9)) + " <unk>\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)


def _equals(found, expected) -> bool:
    tensors = all(torch.equal(getattr(found, s), getattr(expected, s)) for s in _SPLITS)
    return tensors and found.vocab.idx2sym == expected.vocab.idx2sym


_SPLITS = ("train", "valid", "test")

# ---- lists of images ---------------------------------------------------------------------------

# What other programs, other systems and bad luck leave in a text.
_ODD = [
    *("\t", " ", "\n", "\r", "\r\n", "\0", "\ufeff", "\u2028", "\x85", "\x0b", "\xa0", "é", "/"),
    *("../", "//", "~", "#", ",", '"', "\\", "a" * 300, "/etc/passwd", "\udc80", "\N{SNOWMAN}"),
]


def _changed_text(text: str, rng: random.Random) -> tuple[str, bytes]:
    """A text with one to three changes, and their names."""
    names = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, upto = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        lines = text.split("\n")
        kind = rng.choice(["odd", "gone", "one gone", "twice", "lines", "join", "cut", "swap"])
        match kind:
            case "odd":
                text = text[:at] + rng.choice(_ODD) + text[at:]
            case "gone":
                text = text[:at] + text[upto:]
            case "one gone":
                text = text[:at] + text[at + 1 :]
            case "twice":
                text = text[:upto] + text[at:]
            case "lines":
                rng.shuffle(lines)
                text = "\n".join(lines)
            case "join":
                text = text.replace("\n", rng.choice(["", " ", "\t"]), 1)
            case "cut":
                text = text[:at]
            case "swap":
                text = text.replace("\t", rng.choice([" ", ",", "\t\t", " \t "]))
        text = text or "\n"
        names.append(kind)
    data = bytearray(text.encode("utf-8", "surrogateescape"))
    if rng.random() < 0.1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        names.append("bit")
    return ", ".join(names), bytes(data)


def lists(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Every pair that is read must be one that was written; lines may be lost or repeated."""
    root = write_cityscapes(folder / "data", n_train=3, n_val=1, n_test=1)
    for kind in ("leftImg8bit", "gtFine"):
        for split in ("train", "val", "test"):
            for city in list((root / f"cityscapes/{kind}").glob(f"{split}/*")):
                city.rename(city.with_name(f"new {city.name}"))
    path, place, rng = folder / "list.lst", root / "cityscapes", random.Random(seed)
    images = sorted(place.glob("leftImg8bit/train/*/*.png"))
    labels = sorted(place.glob("gtFine/train/*/*_labelIds.png"))
    pairs = list(zip(images, labels, strict=True))
    text = "".join(f"{a.relative_to(place)}\t{b.relative_to(place)}\n" for a, b in pairs)
    alone = "".join(f"{a.relative_to(place)}\n" for a in images)

    def right() -> bool:
        found = [
            tuple(f and f.resolve() for f in pair)
            for pair in read_list(path, place, WAY_OUT, check_names)
        ]
        known = {(a.resolve(), b.resolve()) for a, b in pairs} | {
            (a.resolve(), None) for a in images
        }
        return set(found) <= known

    for _ in range(count):
        what, data = _changed_text(rng.choice([text, alone]), rng)
        path.write_bytes(data)
        yield f"{what}: {data!r}", _outcome(right)


# ---- records of runs ---------------------------------------------------------------------------

_VALUES = [None, True, -1, 1.5, "7", "", [], {}, [1], float("nan"), 10**400, "train", "é\ud800"]


def records(folder: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """What is read must be the beginning of what was written, but for values of free entries."""
    written = [
        {"kind": "train", "step": 1, "loss": 2.5, "forward_nfe": 3.0, "forward_rel_residual": 0.5},
        {"kind": "valid", "step": 2, "phase": "stacked", "loss": 2.0},
        {"kind": "skipped", "step": 3, "loss": float("inf")},
        {"kind": "final_test", "step": 4, "loss": 2.0},
        {"kind": "summary", "step": 4, "finished": True, "skipped": 0},
    ]
    rng = random.Random(seed)
    for number in range(count):
        place = folder / str(number)
        place.mkdir(parents=True)
        changed = copy.deepcopy(written)
        record = rng.choice(changed)
        key = rng.choice(list(record))
        kind = rng.choice(["value", "value", "gone", "line", "deep", "bytes"])
        if kind == "value":
            record[key] = rng.choice(_VALUES)
        elif kind == "gone":
            record.pop(key)
        lines = [json.dumps(r) for r in changed]
        at = rng.randrange(len(lines))
        if kind == "line":
            lines[at] = rng.choice(["null", "[]", "3", '"text"', "", "{", "{}", lines[at][:-5]])
        elif kind == "deep":
            lines[at] = "[" * 100_000
        data = bytearray("".join(f"{line}\n" for line in lines).encode())
        if kind == "bytes":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (place / METRICS).write_bytes(data)
        yield f"{kind} {key}: {data!r:.300}", _outcome(lambda place=place: _continues(place))


def _continues(place: Path) -> bool:
    """Read the records as run_progress.py and a resumed run do."""
    state, step = progress(place)
    before = read_metrics(place)
    with contextlib.redirect_stdout(io.StringIO()):
        Run(place, ("settings.json", "{}"), 2).close()
    after = read_metrics(place)
    sound = state in ("new", "running", "stopped", "finished") and type(step) is int
    kept = [r for r in before if r["step"] <= 2 and not r["kind"].startswith(("final_", "summary"))]
    return sound and repr(after) == repr(kept)


SUBJECTS = {
    "checkpoints of words": words_checkpoints,
    "checkpoints of images": images_checkpoints,
    "caches of texts": caches,
    "lists of images": lists,
    "records of runs": records,
}
