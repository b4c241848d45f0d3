"""A DEQ under fully_shard (FSDP2), whose processes need different numbers of evaluations."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groups import work
from lib.deq import DEQ
from lib.runs.processes import Processes


class Layer(nn.Module):
    """tanh(W z + x) in float64; counts its evaluations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(z) + x)


def sharded(processes: Processes, f_solver: str, b_solver: str, grad: str) -> dict:
    """z* and the gradients of a step on two samples of this process; what the solves took."""
    from torch.distributed.fsdp import fully_shard

    layer = Layer()
    with torch.no_grad():
        layer.linear.weight.mul_(1.5)
    several = processes.world_size > 1
    if several:
        fully_shard(layer)
    deq = DEQ(f_solver, b_solver, grad=grad, group=dist.group.WORLD if several else None)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    x[2:] *= 30  # saturated: few evaluations
    x = x[processes.part(4)]
    z = deq(lambda z: layer(z, x), torch.zeros_like(x), f_thres=60, b_thres=60).z
    z.square().sum().backward()
    gradient = layer.linear.weight.grad
    if several:
        gradient = gradient.full_tensor() * processes.world_size  # it was averaged
    return {
        "z": z.detach(),
        "gradient": gradient,
        "forward": deq.stats.forward.nfe,
        "backward": deq.stats.backward.nfe,
        "calls": layer.calls,
    }


if __name__ == "__main__":
    work(sharded, sys.argv[1:])
