"""Seeded settings as careless and hostile hands write them, and what becomes of each.

Flags, overrides, yaml files, and the settings that a run has saved. Allowed is a refusal in one
line; or settings that hold what was written, that come back from the file that a run saves, and
whose small models can be built. Never a traceback, never another value without a word.

    python tests/faults/odd_settings.py 2000 --seed 0    # the table of outcomes by kind
"""

import argparse
import ast
import collections
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from deq_sequence.command import build_model
from deq_sequence.options import build_parser, flag_of, parse
from deq_sequence.own_settings import CHOSEN, evaluation_settings, read_settings
from deq_sequence.state.strings import get_state_strings
from lib.errors import InputError
from lib.runs.run_folder import SETTINGS
from mdeq_vision import MDEQClsNet, MDEQSegNet
from mdeq_vision.config import config, flat, merge_file, update_config
from mdeq_vision.own_settings import evaluation_config

OUTCOMES = ("refused", "accepted", "silent change", "traceback")
ALLOWED = OUTCOMES[:2]
EXPERIMENTS = Path(__file__).parents[2] / "MDEQ-Vision/experiments"
FILES = {
    MDEQClsNet: EXPERIMENTS / "digits/cls_mdeq_TINY.yaml",
    MDEQSegNet: EXPERIMENTS / "digit_scenes/seg_mdeq_TINY.yaml",
}
WORDS = """
    --dataset state:Z2 --d_model 8 --n_head 2 --d_head 4 --d_inner 8 --mem_len 0 --tgt_len 4
    --n_layer 2 --eval_n_layer 2 --name run
""".split()
SIZES = ("d_model", "n_head", "d_head", "d_inner", "d_embed", "n_layer", "tgt_len", "local_size")
LARGEST = 64  # a model with a larger size is not built
TEXTS = [
    *("", " ", "a b", "'", '"', "[", "(", "{", "#", "%s", "{0}", "$HOME", "..", "-", "--", "--x"),
    *("=", "é", "\u2028", "\udcff", "a\nb", "none", "null", "true", "FALSE", "auto", "Adam", "sgd"),
    *("anderson", "anderson:m=0", "anderson:m=x", "anderson:", "broyden:stop=sample", "cosine"),
    *("phantom", "phantom:steps=-1", "krylov:x=1", "reversible", "state:S3", "state:", "bf16"),
    *("nan", "inf", "-inf", "1e400", "-0.0", "1e-320", "-1", "1.5", "1_0", "0o7", "1e3"),
    *("9" * 400, "9" * 5000, "0x" + "f" * 9000, str(2**31), str(2**63), "a: b", "*a", "&a"),
    *("[]", "[[1]]", "[-1]", "(1,)", "{}", "{'a': 1}", "{[]: 1}", "[nan]", "['a']", "lambda: 0"),
    *("2020-01-01", "1+2j", "b'1'", "[" * 300, "-" * 300 + "1"),
]  # fmt: skip
PLAIN = ["0", "1", "2", "3", "4", "8", "0.5", "0.1", "True", "False", "[1,1]", "[8,8]", "1", "a"]
VALUES = [
    *(None, True, False, 0, 1, 2, 3, -1, 0.5, -0.5, 1e308, 1e-3, 2**31, 2**70, 10**400, "a\0b"),
    *(float("nan"), float("inf"), [], [1], [0, 0], ["a"], [[1]], {}, {"a": 1}, [None], [1.5]),
]  # fmt: skip


@dataclass(frozen=True)
class Odd:
    """One odd input; the same seed makes the same one."""

    kind: str
    seed: int


def odd_settings(count: int, seed: int = 0) -> Iterator[Odd]:
    """``count`` inputs, of all kinds in turn."""
    rng = random.Random(seed)
    for index in range(count):
        yield Odd(list(KINDS)[index % len(KINDS)], rng.getrandbits(32))


def outcome(odd: Odd, folder: Path) -> tuple[str, str]:
    """One of OUTCOMES, and the message or the input that belongs to it."""
    try:
        wrong = KINDS[odd.kind](random.Random(odd.seed), folder)
    except InputError as error:
        return ("refused" if len(str(error).splitlines()) == 1 else "traceback"), str(error)
    except BaseException as error:
        return "traceback", f"{odd}: {error!r}"
    return ("silent change", f"{odd}: {wrong}") if wrong else ("accepted", "")


# ---- words -------------------------------------------------------------------------------------


def _flags(rng: random.Random) -> list[str]:
    """One to three flags with odd values."""
    words = []
    for action in rng.choices(build_parser()._actions[1:], k=rng.randint(1, 3)):  # 0: --help
        words.append(rng.choice(action.option_strings))
        if action.nargs != 0 and rng.random() < 0.95:
            words.append(rng.choice(action.choices or TEXTS) if rng.random() < 0.3 else _text(rng))
    return words


def _text(rng: random.Random) -> str:
    return rng.choice(PLAIN if rng.random() < 0.5 else TEXTS)


def _flag(rng: random.Random, folder: Path) -> str:
    args = parse([*WORDS, *_flags(rng)])
    args.eval = args.debug = args.multi_gpu = False
    path = folder / SETTINGS
    path.write_text(json.dumps(vars(args) | {"cutoffs": args.cutoffs or []}), encoding="utf-8")
    again = read_settings(path)
    of_process = "load work_dir name restart auto_restart restart_dir max_time gpu0_bsz".split()
    lost = [n for n, v in vars(args).items() if n not in of_process and getattr(again, n) != v]
    sizes = [getattr(args, name) for name in SIZES]
    if max(sizes) <= LARGEST and args.dataset == "state:Z2":
        args.compile = False
        build_model(args, get_state_strings("state:Z2", args.seed), torch.device("cpu"))
    return ", ".join(lost)


def _saved_words(rng: random.Random, folder: Path) -> str:
    path = folder / SETTINGS
    saved = vars(parse(WORDS)) | {"cutoffs": []}
    text = _damaged(rng, saved, lambda settings: json.dumps(settings, indent=1))
    path.write_bytes(text)
    found, saved = vars(read_settings(path)), json.loads(text)
    of_process = set(vars(parse(WORDS))) & {"name", "work_dir", "load", "debug", "eval", "restart",
        "auto_restart", "restart_dir", "max_time", "multi_gpu", "gpu0_bsz"}  # fmt: skip
    kept = (n for n in saved if n not in of_process and (n, saved[n]) != ("cutoffs", []))
    return ", ".join(name for name in kept if found[name] != saved[name])


def _evaluated_words(rng: random.Random, folder: Path) -> str:
    own = vars(parse([*WORDS, *rng.choice([["--wnorm"], ["--pre_lnorm", "--varlen"], []])]))
    (folder / SETTINGS).write_text(json.dumps(own | {"cutoffs": []}))
    argv = ["--eval", "--load", "x", *_flags(rng)]
    notes: list[str] = []
    args = vars(evaluation_settings(argv, folder, notes.append))
    named = {note.split()[1] for note in notes}
    asked = vars(build_parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(own))))
    wrong = []
    for name, value in own.items():
        given = asked[name] is not None and asked[name] != value
        if given and name in CHOSEN and args[name] != asked[name]:
            wrong.append(f"{name} is not as given")
        if (
            (args[name] != value or given)
            and flag_of(name) not in named
            and name in {*CHOSEN, *SIZES}
        ):
            wrong.append(f"{name} differs without a note")
    return ", ".join(wrong)


# ---- images ------------------------------------------------------------------------------------


def _override(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(list(FILES))
    keys = [*flat(config), "MODEL.EXTRA.X", "MODEL.EXTRA.FINAL_CONV_KERNEL", "TRAIN.LRR", "A.B"]
    stage = yaml.safe_load(FILES[kind].read_text())["MODEL"]["EXTRA"]["FULL_STAGE"]
    keys += 5 * [f"MODEL.EXTRA.FULL_STAGE.{key}" for key in (*stage, "NUM_BLOCK")]
    written = {key: _text(rng) for key in rng.choices(keys, k=rng.randint(1, 3))}
    opts = [word for pair in written.items() for word in pair]
    return _taken(kind, argparse.Namespace(cfg=FILES[kind], opts=opts), written.items(), folder)


def _file(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(list(FILES))
    path = folder / "odd.yaml"
    path.write_bytes(_damaged(rng, yaml.safe_load(FILES[kind].read_text()), yaml.safe_dump))

    def written() -> Iterator[tuple[str, object]]:  # asked for after the file is accepted
        for key, node in _leaves(yaml.compose(path.read_bytes(), yaml.SafeLoader)):
            yield key, yaml.SafeLoader("").construct_document(node)

    return _taken(kind, argparse.Namespace(cfg=path), written(), folder)


def _leaves(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Full names and values in the order of the file; a section that stands twice has two."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", value


def _evaluated_images(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(list(FILES))
    own, asked, path = config.clone(), config.clone(), folder / "config.yaml"
    update_config(own, argparse.Namespace(cfg=FILES[kind]))
    path.write_bytes(_damaged(rng, yaml.safe_load(own.dump()), yaml.safe_dump, often=0.3))
    keys = rng.choices(list(flat(config)), k=rng.randint(0, 2))
    args = argparse.Namespace(
        cfg=FILES[kind], opts=[w for key in keys for w in (key, _text(rng))], dataDir=None
    )
    update_config(asked, args)
    notes: list[str] = []
    found = flat(evaluation_config(args, asked, path, notes.append))
    named, ran = {note.split()[1] for note in notes}, config.clone()
    merge_file(ran, path)
    silent = ("DEQ.", "MODEL.WNORM", "MODEL.NUM_GROUPS", "TEST.B", "DATASET.ROOT", "TRAIN.IGNORE")
    wrong = [
        key
        for key, value in flat(ran).items()
        if key.startswith(silent) and key not in named
        if found[key] != value or flat(asked).get(key) != value
    ]
    return ", ".join(wrong)


def _taken(
    kind: type, args: argparse.Namespace, written: Iterable[tuple[str, object]], folder: Path
) -> str:
    """Which accepted settings are not as written, or do not come back from a run's file."""
    cfg, again = config.clone(), config.clone()
    update_config(cfg, args)
    path = folder / "saved.yaml"
    path.write_text(cfg.dump(), encoding="utf-8")
    update_config(again, argparse.Namespace(cfg=path))
    if all(_largest(value) <= LARGEST for key, value in flat(cfg).items() if "MODEL." in key):
        torch.manual_seed(0)
        kind(cfg)
    before, after = flat(cfg), flat(again)
    wrong = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    for key, value in written:
        joined = key == "DATASET.ROOT" and cfg.DATA_DIR  # in front of it
        if not joined and not _same(value, before.get(key, before)):
            wrong.append(f"{key} {value!r}")
    return ", ".join(wrong)


def _same(written, taken) -> bool:
    """Whether a setting is what was written, as itself or as a Python literal."""
    found = [written]
    if isinstance(written, str):
        with contextlib.suppress(ValueError, SyntaxError):
            found.append(ast.literal_eval(written))
        found.append({"true": True, "false": False}.get(written.lower(), written))
    found += [list(value) for value in found if isinstance(value, tuple)]
    return any(taken in (value, [value]) for value in found)


def _largest(value) -> float:
    if isinstance(value, (list, dict)):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, (int, float)) else 0


# ---- both --------------------------------------------------------------------------------------


def _damaged(
    rng: random.Random, settings: dict, write: Callable[[dict], str], often: float = 1.0
) -> bytes:
    """A file of settings in which something is odd: a value, a key, a byte, a line, or all."""
    if rng.random() > often:
        return write(settings).encode()
    section = settings
    while any(isinstance(v, dict) for v in section.values()) and rng.random() < 0.8:
        section = rng.choice(
            [v for v in section.values() if isinstance(v, dict) and v] or [{"a": 1}]
        )
    key = rng.choice(list(section))
    how = rng.randrange(9)
    if how < 3:
        section[key] = rng.choice(VALUES) if rng.random() < 0.6 else rng.choice(TEXTS)
    elif how == 3:
        section[f"{key}x"] = section.pop(key)
    elif how == 4:
        del section[key]
    try:
        text = write(settings).encode(errors="surrogatepass")
    except (ValueError, yaml.YAMLError):  # too many digits to write, or no YAML for it
        text = b"{" * 1000
    lines = text.splitlines(keepends=True)
    if how == 5:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif how == 6:
        line = (
            f"{rng.choice(['a', 'TRAIN', '<<'])}: {rng.choice(['&a [*a]', '&a {b: *a}', '*a'])}\n"
        )
        lines.insert(rng.randrange(len(lines)), line.encode())
    text = b"".join(lines)
    if how == 7:
        place = rng.randrange(len(text))
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    elif how == 8:
        text = rng.choice(
            [b"", b"null", b"[]", b"3", text[: rng.randrange(len(text))], b"\xff\xfe"]
        )
    return text


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "flags of words": _flag,
    "saved settings of words": _saved_words,
    "evaluations of words": _evaluated_words,
    "overrides of images": _override,
    "yaml files of images": _file,
    "evaluations of images": _evaluated_images,
}


def main() -> int:
    """Print the table of outcomes, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for odd in odd_settings(args.count, args.seed):
            found, words = outcome(odd, Path(folder))
            counts[odd.kind][found] += 1
            bad += [f"{found}: {words}"] if found not in ALLOWED else []
    print(f"| of {args.count}, seed {args.seed} | {' | '.join(OUTCOMES)} |")
    print("|---" * (len(OUTCOMES) + 1) + "|")
    for kind, found in counts.items():
        print(f"| {kind} | {' | '.join(str(found[name]) for name in OUTCOMES)} |")
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
