"""scripts/benchmarks/bench_gradients.py: its problems are what it says, and its figures hold up."""

import json
import math
from functools import cache

import bench_gradients
import pytest
import torch
from helpers.equilibria import LAYERS, dense_jacobian, equilibrium
from helpers.measure import held_bytes


@pytest.fixture(autouse=True)
def same_threads(monkeypatch):
    """What is for a process of its own does not reach the tests that follow."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@cache  # most of the time is spent on dense Jacobians
def problem_of(layer, radius):
    return equilibrium(layer, radius)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("radius", [0.5, 0.99])
def test_a_layer_has_its_fixed_point_and_radius(layer, radius):
    problem = problem_of(layer, radius)
    assert (problem.f(problem.z_star) - problem.z_star).norm() < 1e-12
    jacobian = dense_jacobian(problem.f, problem.z_star)
    assert torch.linalg.eigvals(jacobian).abs().max().item() == pytest.approx(radius, rel=1e-9)


def test_the_exact_gradient_is_that_of_many_steps():
    problem = problem_of("toy", 0.5)
    z = problem.z_star
    for _ in range(80):
        z = problem.f(z)
    exact = problem.exact()
    assert (problem.gradient(z) - exact).norm() < 1e-10 * exact.norm()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("radius", bench_gradients.RADII)
def test_implicit_by_gmres_is_exact(layer, radius):
    problem = problem_of(layer, radius)
    found = bench_gradients.gradient_by(problem, *bench_gradients.GRADIENTS["ift, gmres to 1e-12"])
    assert bench_gradients.compared(found, problem.exact())[1] <= 1e-8


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("radius", [0.5, 0.9])
def test_what_is_to_be_equal(layer, radius):
    same = bench_gradients.identities(problem_of(layer, radius))
    assert all(difference <= 1e-8 for difference in same.values()), same


@pytest.mark.parametrize("name", bench_gradients.SYSTEMS)
def test_systems(name):
    matrix = bench_gradients.system(name, seed=1)
    radius = torch.linalg.eigvals(matrix).abs().max().item()
    assert radius == pytest.approx(float(name.split()[1]), rel=1e-6)
    assert torch.allclose(matrix, matrix.T) == name.startswith("symmetric")


def test_products_of_krylov_and_broyden(monkeypatch):
    monkeypatch.setattr(bench_gradients, "SIZE", 100)
    ratios = []
    for name in bench_gradients.SYSTEMS:
        matrix = bench_gradients.system(name, 0)
        gmres, broyden = (
            bench_gradients.products_needed(solver, matrix, 0) for solver in ("gmres", "broyden")
        )
        ratios.append(math.log(gmres / broyden))
    assert math.exp(sum(ratios) / len(ratios)) <= 0.85


def test_a_solve_that_does_not_arrive():
    matrix = bench_gradients.system("complex 1.3", 0)
    assert bench_gradients.products_needed("fixed_point_iteration", matrix, 0) is None


def test_samples(capsys):
    rows = bench_gradients.samples_section(None)
    for row in rows:
        assert row["sample"]["rows"] < 0.8 * row["batch"]["rows"]
        assert row["sample"]["worst"] < 1e-8 < row["batch"]["worst"]
        assert row["difference"] <= 1e-10
    assert "16 samples" in capsys.readouterr().out


def test_held_bytes():
    assert held_bytes(lambda: torch.zeros(1000)) == 4000

    def action():
        kept = torch.zeros(1000)
        return kept + torch.ones(1000), kept  # the ones are gone

    assert held_bytes(action) == 8000


def test_held_after_forward():
    vector = 4 * 4 * 250_000
    sizes = {
        grad: [bench_gradients.held_after_forward(grad, "broyden", n) for n in (4, 8)]
        for grad in ("ift", "reversible", "unroll")
    }
    # But for a few numbers that a longer trace holds.
    assert sizes["ift"][1] == pytest.approx(sizes["ift"][0], abs=1000)
    assert sizes["reversible"][1] == pytest.approx(sizes["reversible"][0], abs=1000)
    # f(z*), the point, what f and the loss keep, and the state of the user's own.
    assert sizes["ift"][1] < 4.5 * vector
    assert sizes["unroll"][1] - sizes["unroll"][0] > 4 * vector


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_gradients, "LAYERS", ("toy",))
    monkeypatch.setattr(bench_gradients, "RADII", (0.5,))
    monkeypatch.setattr(bench_gradients, "SIZE", 40)
    path = tmp_path / "figures.json"
    argv = ["--only", "accuracy", "products", "--seeds", "1", "--json", str(path)]
    assert bench_gradients.main(argv) == 0
    printed = capsys.readouterr().out
    assert all(f"| {label} " in printed for label in bench_gradients.GRADIENTS)
    assert all(f"| {label} " in printed for label in bench_gradients.ADJOINT_SOLVERS)
    figures = json.loads(path.read_text())
    assert figures["accuracy"][0]["jfb"][1] > figures["accuracy"][0]["ift, gmres to 1e-12"][1]
    assert bench_gradients.main(["--only", "speed"]) == 2
