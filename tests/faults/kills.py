"""Kill training runs over and over, and compare what comes out with runs that were left alone.

PYTHONPATH=tests python tests/faults/kills.py --trainer all --kills 30 --seed 0

Each trainer trains once undisturbed. Then the same run is killed by SIGKILL, its whole process
group, and resumed, so many times: half of the kills while a checkpoint is being written, the
others during a validation, while a record is written (which is then cut off, as by a machine that
went down), during start-up, and anywhere. After every kill all checkpoints and weights that are
there must be readable; at the end weights, checkpoint and records must be those of the undisturbed
run, bit for bit. Exits with 1 if anything is off.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

from attempts import Attempt, ForkServer, run
from harness import (
    STEPS,
    TRAINERS,
    Language,
    Vision,
    differing_records,
    differing_tensors,
    saved_step,
    temporary_files,
    unreadable,
)
from lib.runs.run_folder import CHECKPOINT, METRICS

# Every so many kills the run is started by the command proper, and not forked.
PROPER_EVERY = 6
COLUMNS = (
    "trainer", "steps", "kills", "while writing", "unreadable checkpoints", "lost steps",
    "records differing", "weights equal",
)  # fmt: skip


@dataclass
class Killed:
    """What became of a run that was killed again and again."""

    trainer: str
    kills: Counter = field(default_factory=Counter)  # by moment, as planned
    hits: Counter = field(default_factory=Counter)  # by moment, as found afterwards
    proper: int = 0  # starts of the command proper, the undisturbed run and the last included
    unreadable: list[str] = field(default_factory=list)
    lost: int = 0
    failures: list[str] = field(default_factory=list)  # attempts that ended otherwise
    records: int = 0
    tensors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        found = [*self.failures, *self.unreadable, *(f"differs: {t}" for t in self.tensors)]
        return found + ([f"{self.records} records differ"] if self.records else [])

    def row(self) -> list[str]:
        counts = (self.kills.total(), self.hits["writing"], len(self.unreadable), self.lost)
        equal = "no" if self.tensors or self.failures else "yes"
        return [self.trainer, *map(str, (STEPS, *counts, self.records)), equal]

    def details(self) -> str:
        hits = ", ".join(f"{self.hits[m]} of {n} {m}" for m, n in sorted(self.kills.items()))
        return f"{self.trainer}: {hits}; {self.proper} starts not forked; {self.seconds:.0f} s"


def kill_and_resume(
    trainer: Language | Vision,
    kills: int,
    rng: random.Random,
    parent: Path,
    server: ForkServer,
    whole: Path | None = None,
) -> Killed:
    """Kill a run at ``kills`` moments, end it, and compare it with the undisturbed run.

    Args:
        trainer: which.
        kills: how many, at rising steps, so that the run comes to its end.
        rng: draws the moments.
        parent: a folder for both runs.
        server: most attempts are forked from it; the last never is.
        whole: folder of the undisturbed run, which is trained if None.
    """
    found, began = Killed(trainer.name), time.monotonic()
    if whole is None:
        whole = trainer.folder(parent, "whole")
        found.proper += 1
        found.failures += _failure("undisturbed run", *run(trainer.start(parent, "whole")))
    folder, start_up = trainer.folder(parent, "killed"), {False: 0.05, True: 2.0}
    others = rng.sample(("validation", "recording", "starting", "anywhere"), 4)
    moments = [*["writing"] * (kills - kills // 2), *islice(cycle(others), kills // 2)]
    rng.shuffle(moments)
    # Leaving room for a save at which to be killed.
    steps = sorted(rng.randrange(1, STEPS - 8) for _ in moments)
    for i, (moment, step) in enumerate(zip(moments, steps, strict=True)):
        proper = i % PROPER_EVERY == PROPER_EVERY - 1
        found.proper += proper
        temporary = temporary_files(folder)
        command = trainer.resume(parent, "killed")
        with Attempt(command, server=None if proper else server) as attempt:
            if moment == "starting":
                time.sleep(rng.uniform(0, start_up[proper]))
            else:
                _wait_for(attempt, moment, step, trainer, folder, rng)
            attempt.send(signal.SIGKILL)
            code = attempt.wait()
            if code != -signal.SIGKILL:  # it failed; or it was faster, and that was the last kill
                found.failures += _failure("attempt", code, attempt.errors())
                break
            start_up[proper] = attempt.seconds_to_first_step or start_up[proper]
        found.kills[moment] += 1
        if moment == "recording":
            found.hits[moment] += _cut_last_record(folder, rng)
        else:
            found.hits[moment] += _hit(moment, attempt.steps, trainer, folder, temporary)
        found.unreadable += unreadable(folder)
        found.lost += max(0, attempt.steps.get("train", 0) - saved_step(folder))
    found.proper += 1
    found.failures += _failure("last attempt", *run(trainer.resume(parent, "killed")))
    if not found.failures:
        found.records = differing_records(folder, whole)
        found.tensors = differing_tensors(folder, whole)
    found.seconds = time.monotonic() - began
    return found


def _wait_for(
    attempt: Attempt,
    moment: str,
    step: int,
    trainer: Language | Vision,
    folder: Path,
    rng: random.Random,
) -> None:
    """Return at such a moment, after ``step``."""
    if moment == "validation":
        step = min(s for s in trainer.validated if s >= step)
    attempt.wait_for_step(step)  # its record is written next, then come validation and saving
    if moment == "writing":
        _wait_for_temporary_file(folder)
    longest = {"writing": 4e-4, "recording": 3e-4, "validation": 0.01, "anywhere": 0.05}[moment]
    time.sleep(rng.choice((0, rng.uniform(0, longest))))


def _wait_for_temporary_file(folder: Path) -> None:
    """Return as soon as a checkpoint is being written."""
    before, deadline = set(os.listdir(folder)), time.monotonic() + 10
    while time.monotonic() < deadline:
        if any(n.startswith(f".{CHECKPOINT}") for n in os.listdir(folder) if n not in before):
            return


def _hit(
    moment: str,
    seen: dict[str, int],
    trainer: Language | Vision,
    folder: Path,
    temporary: set[str],
) -> bool:
    """Whether the kill came at such a moment.

    Args:
        moment: as planned.
        seen: the last step in the output, of each kind.
        trainer, folder: of the run.
        temporary: the temporary files that were there before.
    """
    step = seen.get("train", 0)
    if moment == "writing":
        return any(n.startswith(f".{CHECKPOINT}") for n in temporary_files(folder) - temporary)
    if moment == "validation":
        return step in trainer.validated and seen.get("valid", 0) < step
    return bool(seen) == (moment != "starting")


def _cut_last_record(folder: Path, rng: random.Random) -> bool:
    """Leave a part of the last record, if the checkpoint has not its step: it was on the disk."""
    path = folder / METRICS
    *before, last = path.read_bytes().splitlines(keepends=True)
    if json.loads(last)["step"] <= saved_step(folder):
        return False
    path.write_bytes(b"".join(before) + last[: rng.randrange(1, len(last))])
    return True


def _failure(what: str, code: int, errors: str) -> list[str]:
    return [f"{what} ended with {code}: {errors[-2000:]}"] if code else []


def table(results: list[Killed]) -> str:
    """A row for each trainer, in the columns of COLUMNS."""
    rows = [list(COLUMNS), *(result.row() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="kills.py", description="Kill training runs, and compare them with undisturbed ones."
    )
    parser.add_argument("--trainer", choices=[*TRAINERS, "all"], default="all")
    parser.add_argument("--kills", type=int, default=30, help="of each trainer (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args(argv)
    names = list(TRAINERS) if args.trainer == "all" else [args.trainer]
    results = []
    with ForkServer() as server:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                rng = random.Random(f"{args.seed} {name}")
                results.append(
                    kill_and_resume(TRAINERS[name], args.kills, rng, Path(folder), server)
                )
            print(results[-1].details(), flush=True)
    print(table(results))
    problems = [f"{r.trainer}: {problem}" for r in results for problem in r.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
