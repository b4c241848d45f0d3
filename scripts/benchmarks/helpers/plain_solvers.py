"""The published solvers as first written: all buffers held, everything recomputed at each step.

Same mathematics, stopping and choice of the returned point as :mod:`lib.solvers`, hence the same
iterates up to rounding; only the work differs:

- Broyden keeps two vectors per update, in zero-filled buffers U (B, D, threshold) and V' (B,
  threshold, D) with H = -I + U V';
- Anderson keeps the points X and their images F (B, m, D), and forms G = F - X and the whole of
  G G' anew in every step;
- the best point is a copy, and each residual norm is fetched from the device on its own.

:func:`torchdeq_solver` wraps the solvers of the package torchdeq instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.measure import Counted
from lib.errors import InputError


class _Trace:
    """Residuals of the evaluated points, and a copy of the best point."""

    def __init__(self, eps: float, threshold: int, stop_mode: str):
        self.eps, self.threshold, self.stop_mode = eps, threshold, stop_mode
        self.traces: dict[str, list[float]] = {"abs": [], "rel": []}
        self.lowest, self.index, self.result = float("inf"), 0, None

    def add(self, x: Tensor, gx: Tensor, fx: Tensor) -> bool:
        """Record a point; whether the solve is done. Norms are over the whole batch."""
        absolute = gx.norm().item()
        self.traces["abs"].append(absolute)
        self.traces["rel"].append(absolute / (fx.norm().item() + 1e-30))
        current = self.traces[self.stop_mode][-1]
        if current < self.lowest:
            self.lowest, self.index = current, len(self.traces["abs"]) - 1
            self.result = x.clone().detach()
        return current < self.eps or current == 0.0

    def solution(self, shape: torch.Size) -> dict:
        return {
            "result": self.result.view(shape),
            "lowest": self.lowest,
            "nstep": self.index,
            "prot_break": False,
            "abs_trace": self.traces["abs"],
            "rel_trace": self.traces["rel"],
            "nfe": len(self.traces["abs"]),
            "eps": self.eps,
            "threshold": self.threshold,
        }


@torch.no_grad()
def broyden(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
) -> dict:
    """Full-memory "good" Broyden on g(z) = f(z) - z with H = -I + U V' per sample.

    H <- H + (dz - H dg) (H' dz)' / (dz' H dg), so update k stores u = (dz - H dg) / (v'dg) and
    v = H' dz. Arguments and result as for :func:`lib.solvers.broyden`.
    """
    shape, batch = x0.shape, len(x0)
    x = x0.reshape(batch, -1)  # (B, D)
    u_buffer = x.new_zeros(batch, x.shape[1], threshold)
    v_buffer = x.new_zeros(batch, threshold, x.shape[1])

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        fx = f(x.view(shape)).reshape(batch, -1)
        return fx - x, fx

    def times(k: int, y: Tensor) -> Tensor:  # H y
        vy = torch.einsum("bkd,bd->bk", v_buffer[:, :k], y)
        return torch.einsum("bdk,bk->bd", u_buffer[:, :, :k], vy) - y

    def transposed(k: int, y: Tensor) -> Tensor:  # H' y
        uy = torch.einsum("bd,bdk->bk", y, u_buffer[:, :, :k])
        return torch.einsum("bk,bkd->bd", uy, v_buffer[:, :k]) - y

    trace = _Trace(eps, threshold, stop_mode)
    gx, fx = residual(x)
    done = trace.add(x, gx, fx)
    for k in range(threshold):
        if done:
            break
        old_x, old_gx = x, gx
        x = x - times(k, gx)
        gx, fx = residual(x)
        done = trace.add(x, gx, fx)
        dx, dg = x - old_x, gx - old_gx
        v = transposed(k, dx)
        u = (dx - times(k, dg)) / torch.einsum("bd,bd->b", v, dg)[:, None]
        v_buffer[:, k], u_buffer[:, :, k] = v, u
    return trace.solution(shape)


@torch.no_grad()
def anderson(
    f: Callable[[Tensor], Tensor],
    x0: Tensor,
    m: int = 6,
    lam: float | None = None,
    threshold: int = 50,
    eps: float = 1e-3,
    stop_mode: str = "rel",
) -> dict:
    """Anderson mixing with buffers X, F (B, m, D), the Gram matrix of F - X whole in each step.

    Solves [[0, 1'], [1, G G' + R]] [nu; a] = [1; 0] with R = lam I (1e-4 as published), or by
    default the relative ridge of :func:`lib.solvers.anderson`, whose other arguments these are.
    """
    shape, batch = x0.shape, len(x0)
    size = x0[0].numel()
    points, images = x0.new_zeros(batch, m, size), x0.new_zeros(batch, m, size)
    trace = _Trace(eps, threshold, stop_mode)
    ulp = torch.finfo(x0.dtype).eps
    for k in range(threshold):
        n = min(k, m)
        if k == 0:
            x = x0.reshape(batch, -1)
        elif k == 1:
            x = images[:, 0]
        else:
            g = images[:, :n] - points[:, :n]  # (B, n, D)
            gram = torch.bmm(g, g.transpose(1, 2)).double()  # (B, n, n)
            ridge = torch.full_like(gram[:, 0], lam or 0.0)
            if lam is None:
                ridge = 10 * ulp * gram.diagonal(dim1=1, dim2=2)
            system = gram.new_zeros(batch, n + 1, n + 1)
            system[:, 0, 1:] = system[:, 1:, 0] = 1.0
            system[:, 1:, 1:] = gram + torch.diag_embed(ridge)
            right = system.new_zeros(batch, n + 1, 1)
            right[:, 0] = 1.0
            weights = torch.linalg.solve(system, right)[:, 1:, 0].to(x0.dtype)  # (B, n)
            x = torch.einsum("bn,bnd->bd", weights, images[:, :n])
        slot = k % m
        points[:, slot] = x
        images[:, slot] = f(points[:, slot].view(shape)).reshape(batch, -1)
        if trace.add(points[:, slot], images[:, slot] - points[:, slot], images[:, slot]):
            break
    return trace.solution(shape)


PLAIN = {"broyden": broyden, "anderson": anderson}


def torchdeq_solver(name: str) -> Callable[..., dict]:
    """The solver of that name of the package torchdeq, with this repository's signature.

    It stops once every sample is below eps, keeps each sample's best point, and never returns
    x0, so its iterates are those of :mod:`lib.solvers` but where it stops may differ.

    Raises:
        InputError: torchdeq is not installed.
    """
    try:
        from torchdeq import solver as package
    except ImportError as error:
        raise InputError(
            "--plain torchdeq needs the package torchdeq: pip install --no-deps torchdeq==0.1.0"
        ) from error
    method = {"broyden": package.broyden_solver, "anderson": package.anderson_solver}[name]

    @torch.no_grad()
    def solve(f, x0, threshold=50, eps=1e-3, stop_mode="rel") -> dict:
        counted = Counted(f)
        result, _, info = method(counted, x0, max_iter=threshold, tol=eps, stop_mode=stop_mode)
        # One entry: the residual of the returned point over the batch (the worst sample's, rel).
        return {
            "result": result,
            "lowest": info[f"{stop_mode}_lowest"].max().item(),
            "nstep": 0,
            "prot_break": False,
            "abs_trace": [info["abs_lowest"].norm().item()],
            "rel_trace": [info["rel_lowest"].max().item()],
            "nfe": counted.count,
            "eps": eps,
            "threshold": threshold,
        }

    return solve
