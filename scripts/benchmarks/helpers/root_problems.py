"""Classical systems of equations F(z) = 0 as fixed points of z + F(z) and of z - F(z).

By number, those of More, Garbow and Hillstrom, "Testing unconstrained optimization software" (ACM
Transactions on Mathematical Software 7, 1981), with their standard starts. Others say where they
are from. All are of batch one, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class RootProblem:
    """z = f(z) from x0 (1, n); ``residual`` is F itself, without the rounding of z + F - z."""

    name: str
    f: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor], Tensor]
    x0: Tensor
    affine: bool = False


def _columns(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1)


def rosenbrock(z):  # 21, extended
    odd, even = z[:, 0::2], z[:, 1::2]
    return torch.stack([10 * (even - odd**2), 1 - odd], 2).flatten(1)


def powell_singular(z):  # 13; the Jacobian is singular at the solution
    a, b, c, d = z.unbind(1)
    return _columns(a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2)


def powell_badly_scaled(z):  # 3
    a, b = z.unbind(1)
    return _columns(1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001)


def wood(z):  # 14, its gradient over two, as the systems' collection has it
    a, b, c, d = z.unbind(1)
    return _columns(
        -200 * a * (b - a**2) - (1 - a),
        200 * (b - a**2) + 20.2 * (b - 1) + 19.8 * (d - 1),
        -180 * c * (d - c**2) - (1 - c),
        180 * (d - c**2) + 20.2 * (d - 1) + 19.8 * (b - 1),
    )


def helical_valley(z):  # 7
    a, b, c = z.unbind(1)
    angle = torch.atan2(b, a) / (2 * math.pi)
    return _columns(10 * (c - 10 * angle), 10 * (torch.hypot(a, b) - 1), c)


def chebyquad(z):  # 35
    n = z.shape[1]
    x = 2 * z - 1
    before, now, rows = torch.ones_like(x), x, []
    for i in range(1, n + 1):
        integral = -1 / (i * i - 1) if i % 2 == 0 else 0.0
        rows.append(now.mean(1) - integral)
        before, now = now, 2 * x * now - before
    return _columns(*rows)


def brown_almost_linear(z):  # 27
    out = z + z.sum(1, keepdim=True) - (z.shape[1] + 1)
    return torch.cat([out[:, :-1], z.prod(1, keepdim=True) - 1], 1)


def _grid(n):
    return torch.arange(1, n + 1, dtype=F64) / (n + 1)


def discrete_boundary(z):  # 28
    n = z.shape[1]
    h, t = 1 / (n + 1), _grid(n)
    padded = torch.nn.functional.pad(z, (1, 1))
    return 2 * z - padded[:, :-2] - padded[:, 2:] + h**2 * (z + t + 1) ** 3 / 2


def discrete_integral(z):  # 29
    n = z.shape[1]
    h, t = 1 / (n + 1), _grid(n)
    cubes = (z + t + 1) ** 3
    left = torch.cumsum(t * cubes, 1)
    right = ((1 - t) * cubes).flip(1).cumsum(1).flip(1) - (1 - t) * cubes
    return z + h * ((1 - t) * left + t * right) / 2


def trigonometric(z):  # 26
    n = z.shape[1]
    i, cos = torch.arange(1, n + 1, dtype=F64), torch.cos(z)
    return n - cos.sum(1, keepdim=True) + i * (1 - cos) - torch.sin(z)


def variably_dimensioned(z):  # 25, its gradient over two
    i = torch.arange(1, z.shape[1] + 1, dtype=F64)
    total = (i * (z - 1)).sum(1, keepdim=True)
    return z - 1 + i * total * (1 + 2 * total**2)


def broyden_tridiagonal(z):  # 30
    padded = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:, :-2] - 2 * padded[:, 2:] + 1


def broyden_banded(z):  # 31
    n = z.shape[1]
    i = torch.arange(n)
    offset = i[None, :] - i[:, None]
    band = ((offset >= -5) & (offset <= 1) & (offset != 0)).to(F64)
    return z * (2 + 5 * z**2) + 1 - (z * (1 + z)) @ band.T


def freudenstein_roth(z):  # 2
    a, b = z.unbind(1)
    return _columns(-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b)


def three_equations(z):  # Burden and Faires, Numerical Analysis, section 10.2
    a, b, c = z.unbind(1)
    return _columns(
        3 * a - torch.cos(b * c) - 0.5,
        a**2 - 81 * (b + 0.1) ** 2 + torch.sin(c) + 1.06,
        torch.exp(-a * b) + 20 * c + (10 * math.pi - 3) / 3,
    )


def bratu(z):  # u'' + e^u = 0, u(0) = u(1) = 0
    padded = torch.nn.functional.pad(z, (1, 1))
    return padded[:, :-2] - 2 * z + padded[:, 2:] + torch.exp(z) / (z.shape[1] + 1) ** 2


def h_equation(c: float) -> Callable[[Tensor], Tensor]:
    """Chandrasekhar's, by the midpoint rule (Kelley 1995, section 5.6): z -> 1 / (1 - A z)."""

    def f(z):
        n = z.shape[1]
        mu = (torch.arange(n, dtype=F64) + 0.5) / n
        matrix = c / (2 * n) * mu[:, None] / (mu[:, None] + mu[None, :])
        return 1 / (1 - z @ matrix.T)

    return f


def _normalised_layer(z):
    """Begins with a layer normalisation, whose derivative at zero is 300."""
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=F64) / 16
    return torch.nn.functional.layer_norm(z, (16,)) @ mixing + torch.arange(16, dtype=F64) / 16


def _steep_layer(z):
    """tanh(A z + b) with eigenvalues of A up to 3 in size."""
    generator = torch.Generator().manual_seed(4)
    matrix = 3 * torch.randn(20, 20, generator=generator, dtype=F64) / 20**0.5
    shift = torch.randn(1, 20, generator=generator, dtype=F64)
    return torch.tanh(z @ matrix.T + shift)


def _ginibre(radius: float, n: int = 20) -> Callable[[Tensor], Tensor]:
    """An adjoint whose eigenvalues fill the disc of that radius (Ginibre 1965)."""
    generator = torch.Generator().manual_seed(0)
    matrix = radius * torch.randn(n, n, generator=generator, dtype=F64) / n**0.5
    shift = torch.randn(1, n, generator=generator, dtype=F64)
    return lambda z: z @ matrix + shift


def _pairs(radius: float, n: int = 10) -> Callable[[Tensor], Tensor]:
    """Complex pairs radius e^(+-i a) of n / 2 different angles."""
    angles = torch.linspace(0.3, 3.0, n // 2, dtype=F64)
    cos, sin = radius * torch.cos(angles), radius * torch.sin(angles)

    def f(z):
        a, b = z[:, 0::2], z[:, 1::2]
        return torch.stack([cos * a - sin * b, sin * a + cos * b], 2).flatten(1) + 1

    return f


def _full(n: int, value: float) -> Tensor:
    return torch.full((1, n), value, dtype=F64)


def _row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


_SYSTEMS = {
    "Rosenbrock": (rosenbrock, _row(*[-1.2, 1.0] * 5)),
    "Powell singular": (powell_singular, _row(3, -1, 0, 1)),
    "Powell badly scaled": (powell_badly_scaled, _row(0, 1)),
    "Wood": (wood, _row(-3, -1, -3, -1)),
    "helical valley": (helical_valley, _row(-1, 0, 0)),
    "Chebyquad 5": (chebyquad, _grid(5)[None]),
    "Brown almost linear": (brown_almost_linear, _full(10, 0.5)),
    "discrete boundary value": (discrete_boundary, (_grid(10) * (_grid(10) - 1))[None]),
    "discrete integral": (discrete_integral, (_grid(10) * (_grid(10) - 1))[None]),
    "trigonometric": (trigonometric, _full(10, 0.1)),
    "variably dimensioned": (
        variably_dimensioned,
        1 - torch.arange(1, 11, dtype=F64)[None] / 10,
    ),
    "Broyden tridiagonal": (broyden_tridiagonal, _full(10, -1.0)),
    "Broyden banded": (broyden_banded, _full(10, -1.0)),
    "Freudenstein and Roth": (freudenstein_roth, _row(6, 3)),
    "three equations": (three_equations, _row(0.1, 0.1, -0.1)),
    "Bratu": (bratu, _full(10, 0.0)),
    "square root of 2": (lambda z: z**2 - 2, _row(1.0)),
    "cubic from 20": (lambda z: 1 - z**3, _row(20.0)),
    "quintic from 3": (lambda z: 1 - z**5, _row(3.0)),
    "arc tangent from 4": (lambda z: 3 * torch.atan(2 - z), _row(4.0)),
}
_MAPS = {
    "cosine": (torch.cos, _row(0.0, 1.0, 3.0)),
    "H-equation, c = 0.9": (h_equation(0.9), _full(20, 1.0)),
    "H-equation, c = 0.9999": (h_equation(0.9999), _full(20, 1.0)),
    "layer normalisation from 0": (_normalised_layer, _full(16, 0.0)),
    "steep layer": (_steep_layer, _full(20, 0.0)),
}
_AFFINE = {
    **{f"Ginibre, radius {r:g}": _ginibre(r) for r in (0.9, 1.3, 1.6, 1.9, 3.0, 8.0)},
    "pairs, radius 0.99": _pairs(0.99),
    "pairs, radius 1.5": _pairs(1.5),
}


def _plus(system):
    return lambda z: z + system(z)


def _minus(system):
    return lambda z: z - system(z)


def _difference(f):
    return lambda z: f(z) - z


PROBLEMS: list[RootProblem] = [
    *(
        RootProblem(f"{name}, {sign}", change(system), system, x0)
        for name, (system, x0) in _SYSTEMS.items()
        for sign, change in (("z + F", _plus), ("z - F", _minus))
    ),
    *(RootProblem(name, f, _difference(f), x0) for name, (f, x0) in _MAPS.items()),
    *(
        RootProblem(name, f, _difference(f), _full(10 if "pairs" in name else 20, 0.0), affine=True)
        for name, f in _AFFINE.items()
    ),
]
