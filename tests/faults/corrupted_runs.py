"""Whole runs that are resumed from corrupted checkpoints, through the commands of the trainers.

A run of each trainer is stopped near its end; its newest checkpoint, every fourth time its
predecessor too, is corrupted, and the command told to go on. Allowed is exit code 2 with one line,
or a run that ends bit for bit as the undisturbed one did, from whichever checkpoint it went on.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from attempts import Attempt, ForkServer
from corruptions import Corruption, corruptions
from harness import SAVED_EVERY, STEPS, differing_tensors, records
from lib.runs.run_folder import CHECKPOINT

TO = "run"


class CorruptedRun:
    """One trainer's run, stopped ``SAVED_EVERY`` steps or so before its end, to be corrupted.

    Args:
        trainer: of :data:`harness.TRAINERS`.
        parent: folder for its runs.
        whole: the folder of the undisturbed run.
        server: to start the commands from.
    """

    def __init__(self, trainer, parent: Path, whole: Path, server: ForkServer):
        self.trainer, self.parent, self.whole, self.server = trainer, parent, whole, server
        self.folder, self.trap = trainer.folder(parent, TO), parent / "trap"
        self.kept = parent / "kept"
        with Attempt(trainer.start(parent, TO), server=server) as attempt:
            attempt.wait_for_step(STEPS - SAVED_EVERY)
            attempt.send(signal.SIGKILL)
        self.folder.rename(self.kept)

    def outcome(self, corruption: Corruption) -> tuple[str, str]:
        """What becomes of one corruption, and what the command said."""
        shutil.copytree(self.kept, self.folder)
        corruption.apply(self.folder / CHECKPOINT, self.trap)
        with Attempt(self.trainer.resume(self.parent, TO), server=self.server) as attempt:
            code, said = attempt.wait(), attempt.errors()
            log = "\n".join(attempt.lines)
        try:
            return self._judge(code, said, log), said + log
        finally:
            shutil.rmtree(self.folder)
            self.trap.unlink(missing_ok=True)

    def _judge(self, code: int, said: str, log: str) -> str:
        if self.trap.exists():
            return "code run"
        if code == 2 and len(said.splitlines()) == 1 and "Traceback" not in said:
            return "refused"
        if code != 0 or "Traceback" in said:
            return "traceback"
        if records(self.folder) != records(self.whole):
            return "silent wrong"
        if differing_tensors(self.folder, self.whole):
            return "silent wrong"
        return "fell back" if "saved before it" in log else "loaded unharmed"


def judged(
    trainer, parent: Path, whole: Path, server: ForkServer, count: int, seed: int = 0
) -> Iterator[tuple[Corruption, str, str]]:
    """``count`` corruptions of one trainer's run with their outcomes, and what was said."""
    judge = CorruptedRun(trainer, parent, whole, server)
    for corruption in corruptions(count, seed):
        yield corruption, *judge.outcome(corruption)
