"""The length of the strings in training, which grows with what the model has learnt."""

import math
from random import Random

from lib.errors import InputError

SHORTEST = 2
GROWTH = 1.3  # factor by which the longest length grows
_DECAY = 0.95  # of the running mean
_STEPS = 10  # at least so many steps with the longest strings before the next growth


class Curriculum:
    """Draws the length of each step's strings, and lets the longest length grow.

    Half of the steps take the longest length so far, the others a length drawn from 2 up to it. The
    longest length begins at 2. It grows when the running mean of the loss on strings of that length
    is below ``below``.

    Args:
        limit: the final longest length.
        below: loss in nats; 0 means that the longest length is ``limit`` from the start.
    """

    def __init__(self, limit: int, below: float):
        self.limit, self.below = limit, below
        self.longest = min(SHORTEST, limit) if below > 0 else limit
        self.loss, self.steps = math.inf, 0  # running mean and its steps, at the longest length

    def draw(self, rng: Random) -> int:
        """The length of the next step's strings."""
        shortest = min(SHORTEST, self.longest)
        return self.longest if rng.random() < 0.5 else rng.randint(shortest, self.longest)

    def observe(self, length: int, loss: float) -> None:
        """Take note of the loss of a step."""
        if length != self.longest or not math.isfinite(loss):
            return
        self.loss = loss if self.loss == math.inf else _DECAY * self.loss + (1 - _DECAY) * loss
        self.steps += 1
        if self.loss < self.below and self.steps >= _STEPS and self.longest < self.limit:
            self.longest = min(self.limit, max(self.longest + 1, int(GROWTH * self.longest)))
            self.steps = 0

    def state_dict(self) -> dict:
        return {"longest": self.longest, "loss": self.loss, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned; refuse a length that does not occur."""
        if not min(SHORTEST, self.limit) <= state["longest"] <= self.limit:
            raise InputError(
                f"strings of length {state['longest']}, and this run has at most {self.limit}: "
                "use another checkpoint"
            )
        self.longest, self.loss, self.steps = (state[k] for k in ("longest", "loss", "steps"))
