"""The picture of an equilibrium is drawn from solves that reach it."""

import pytest
import torch

import draw_equilibrium


def test_all_solvers_reach_the_same_fixed_point():
    for solver, *_ in draw_equilibrium.SOLVERS.values():
        points, residuals, solution = draw_equilibrium.solve(solver)
        assert len(points) == len(residuals)
        assert residuals[-1] < draw_equilibrium.EPS
        z = solution[None]
        # A residual of 1e-8 at a Jacobian of norm 0.95 leaves an error below 1e-8 / 0.05.
        assert torch.allclose(draw_equilibrium.layer(z), z, atol=1e-7)


def test_a_solve_that_fails_is_not_drawn():
    def cut_off(f, x0, **options):
        return draw_equilibrium.fixed_point_iteration(f, x0, **options | {"threshold": 3})

    with pytest.raises(RuntimeError, match="cut_off did not converge"):
        draw_equilibrium.solve(cut_off)


def test_the_picture_is_the_same_each_time(tmp_path):
    draw_equilibrium.draw(tmp_path / "a.svg")
    draw_equilibrium.draw(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size < 150_000
