"""A run's own settings, for its evaluation: what was trained is what is evaluated."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deq_sequence.options import build_parser, flag_of, parse
from deq_sequence.text.vocabulary import Vocab
from lib.errors import InputError, naming
from lib.runs.run_folder import SETTINGS

# Where the command line and the run differ, an evaluation follows the command line in these.
CHOSEN = frozenset(
    "data dataset eval_batch_size tgt_len eval_tgt_len mem_len f_solver b_solver grad stop_mode "
    "f_thres f_thres_per_word b_thres max_eval_steps spectral_radius_mode amp tf32 deterministic "
    "compile graph cuda num_threads seed eval_state".split()
)
# These belong to a process, not to a run: only the command line sets them.
_OF_THE_PROCESS = frozenset(
    "eval load prompt work_dir name debug restart auto_restart restart_dir max_time multi_gpu "
    "gpu0_bsz".split()
)

VOCABULARY = "vocabulary"  # in a run's settings, besides those of the command line
WORDS = "vocabulary.json"  # in a run's folder: its words (or bytes) in the order of their ids


def read_saved(path: Path) -> dict[str, Any]:
    """The settings in a run's settings.json: name and value of each.

    Raises:
        InputError: the file is not JSON, or holds no settings.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): restore or delete it") from error
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds no settings of a run: restore or delete it")
    return saved


def read_settings(path: Path) -> argparse.Namespace:
    """The settings of a run, checked as a command line is.

    Settings that are newer than the run have their defaults. Those of the process that trained
    (its name, its limit of time, ...) have theirs, too.

    Raises:
        InputError: the file is unreadable, or holds an unknown setting or a bad value.
    """
    with naming(str(path)):
        return settings_of(read_saved(path))


def settings_of(saved: dict[str, Any]) -> argparse.Namespace:
    """As :func:`read_settings`, of settings that are read already."""
    return parse(_words_of_run(saved))


def of_the_model(saved: dict[str, Any]) -> dict[str, Any]:
    """Saved settings without those of the process that trained, and without its paths."""
    kept = {name: value for name, value in saved.items() if name not in _OF_THE_PROCESS}
    return kept | {"data": Path(kept.get("data", "")).name}


def evaluation_settings(
    argv: list[str] | None, folder: Path, log: Callable[[str], None]
) -> argparse.Namespace:
    """The settings by which ``argv`` evaluates the run in ``folder``: its own, where it has any.

    The command line overrides those in :data:`CHOSEN`. ``log`` gets a line on every difference
    that is left between the run, the command line and what is evaluated.

    Raises:
        InputError: the command line or the saved settings cannot be used.
    """
    path = folder / SETTINGS
    unset = dict.fromkeys(vars(build_parser().parse_args([])))
    given = vars(build_parser().parse_args(argv, argparse.Namespace(**unset)))
    given = {name: value for name, value in given.items() if value is not None}
    if not path.is_file():
        if not given.get("load"):
            log(f"note: {path} is missing, so the settings are those of the command line")
        return parse(argv)
    saved, own = read_saved(path), read_settings(path)
    kept = [n for n in given if n in saved and n not in CHOSEN | _OF_THE_PROCESS]
    chosen = {name: value for name, value in given.items() if name not in kept}
    args = parse(_words_of_run(saved) + _words(chosen))
    for name, now in vars(args).items():
        before = getattr(own, name)
        if name not in _OF_THE_PROCESS and now != before:
            log(f"note: {flag_of(name)} is {now!r} in this evaluation, and {before!r} in the run")
    for name in kept:
        before, asked = getattr(own, name), given[name]
        if asked != before:
            log(f"note: {flag_of(name)} is {before!r}, as in the run, and not {asked!r}")
    return args


def check_vocabulary(folder: Path, vocab: Vocab) -> None:
    """Refuse a vocabulary that is not that of the run in ``folder``: words have other ids.

    Weights without settings beside them, and those of older runs, go with any vocabulary.
    """
    path, now = folder / SETTINGS, vocab.fingerprint()
    before = read_saved(path).get(VOCABULARY) if path.is_file() else None
    if before not in (None, now):
        raise InputError(
            f"{folder} was trained with the vocabulary {before}, and --data has {now}: evaluate it "
            "on text with the vocabulary of its training"
        )


def _words_of_run(saved: dict[str, Any]) -> list[str]:
    """The command line that gives the settings of a run.

    Raises:
        InputError: a value is not what its flag accepts.
    """
    others = _OF_THE_PROCESS | {VOCABULARY}
    of_run = {name: value for name, value in saved.items() if name not in others}
    words = _words(of_run)
    found = vars(build_parser().parse_args(words))
    for name, value in of_run.items():
        if found.get(name) != value and not (name == "cutoffs" and value == []):
            raise InputError(f"{value!r} is no value of {flag_of(name)}")
    if of_run.get("same_length") and of_run.get("local_size") == of_run.get("mem_len"):
        del of_run["local_size"]  # it follows from --mem_len, which an evaluation may choose
        words = _words(of_run)
    return words


def _words(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = flag_of(name)
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words
