"""A trainer of twenty lines on numbers, to see the loop itself at work."""

from typing import ClassVar

import torch
from torch import nn

from lib.deq import DEQ
from lib.runs.evaluation_loop import EvaluationStopped
from lib.runs.interrupts import Stopping
from lib.runs.processes import Processes
from lib.runs.task import Care, Choices, Summands
from lib.runs.trainer import Trainer

CPU = torch.device("cpu")


class Model(nn.Module):
    """Batch norm, then the equilibrium of a layer with three weights."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.weight = nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))
        self.deq = DEQ("broyden")

    def forward(self, x):
        x = self.norm(x)
        return self.deq(lambda z: torch.tanh(self.weight * z + x), torch.zeros_like(x)).z


class ToyTrainer(Trainer):
    """Brings the mean square of a layer's equilibrium down.

    ``spoil`` maps a step to what its loss is multiplied by; ``on_step`` is called with each step.
    """

    extra_parts: ClassVar = {"place": 0}
    extra_sums = ("numbers",)
    pretrain_steps, every, saves, last_step = 4, 4, (), 8

    def __init__(self, *, keep=2, max_skipped=3, clip=0.0, max_minutes=0.0):
        torch.manual_seed(0)
        model = Model()
        super().__init__(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            CPU,
            Processes(),
            seed=1,
            care=Care(keep, max_skipped, clip, "--again", "lower the rate"),
            stopping=Stopping(max_minutes),
        )
        self.place, self.spoil, self.on_step = 0, {}, lambda step: None
        self.scores = iter(range(100))
        self.stop_validation_at = None

    def batches(self):
        while self.step < self.last_step:
            yield torch.randn(6, 3)

    def draw(self):
        return Choices(int(10 * self.rng.random()))

    def split(self, batch):
        return batch.chunk(2)

    def part(self, index, part, choices):
        self.on_step(self.step)
        loss = self.model(part).square().mean() / 2 * self.spoil.get(self.step, 1.0)
        return Summands(loss, loss.new_zeros(()), [torch.tensor(part.numel())])

    def set_learning_rate(self):
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + self.step)

    def advance(self, batch, loss):
        self.place += len(batch)

    def due(self):
        return True, self.step % self.every == 0, self.step in self.saves

    def validate(self):
        torch.randn(1)  # a validation may draw, and must not change what follows if it is repeated
        if self.stop_validation_at == self.step:
            self.stop_validation_at = None
            self.stopping.time_is_up = True
            raise EvaluationStopped
        score = next(self.scores)
        return None, {"text": f"score {score}", "score": score}, "score", score

    def figures(self, loss, elapsed):
        return {"loss": loss, "numbers": self._window["numbers"]}, f"step {self.step} | {loss:.4f}"

    def jac_weight_of(self, step):
        return 0.0

    def extra_state(self):
        return {"place": self.place}

    def load_extra(self, state):
        self.place = state["place"]

    def fixed(self):
        return {"--border": self.pretrain_steps}
