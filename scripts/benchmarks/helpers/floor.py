"""How fast a step could be at best: its arithmetic at the measured matrix rate, and the traffic
of its solvers at the measured bandwidth."""

import torch

from deq_sequence.linear import linear
from helpers.measure import seconds

_COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # beyond the caches
_REPEATS = 7


def matrix_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Best measured FLOP/s of (M, K) @ (K, N) for ``shape`` (M, K, N), float32 without TF32;
    on a CPU by the faster library, see deq_sequence.linear."""
    m, k, n = shape
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)
    # Often enough that one measurement is not all overhead.
    times = min(max(1, int(1e9 / (m * k * n))), 1000)

    def products() -> None:
        for _ in range(times):
            linear(a, b)

    products()
    return times * 2 * m * k * n / min(seconds(products, device) for _ in range(_REPEATS))


def bandwidth(device: torch.device) -> float:
    """Best measured bytes/s of a copy, reads and writes counted."""
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(_REPEATS))
    return 2 * source.nbytes / best
