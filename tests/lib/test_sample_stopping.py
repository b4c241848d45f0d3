"""stop='sample': what a sample gets, and costs, does not depend on its batch mates."""

import math
from functools import partial
from importlib import import_module
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.solvers import anderson, bicgstab, broyden, fixed_point_iteration, gmres, newton_krylov
from lib.solvers.maps import Affine
from parameters import slow_but
from problems import SHAPES
from sample_maps import Batch, Diverging, Failing, Sample

# The functions of the same names hide the modules as attributes of lib.solvers.
anderson_py = import_module("lib.solvers.anderson")
broyden_py = import_module("lib.solvers.broyden")

SHRINKING = {  # they go on with the samples that are left
    "plain": fixed_point_iteration,
    "damped": partial(fixed_point_iteration, damping=0.8),
    "anderson": anderson,
    "anderson with a ridge": partial(anderson, lam=1e-4, m=3, beta=0.9),
    "anderson anew": partial(anderson, restart=True, m=3),
    "broyden": broyden,
    "broyden of few": partial(broyden, memory=3),
    "damped broyden": partial(broyden, damping=0.8),
}
KRYLOV = {"gmres": gmres, "gmres anew": partial(gmres, restart=3), "bicgstab": bicgstab}
NEWTON = {"newton": newton_krylov, "damped newton": partial(newton_krylov, damping=0.9)}
ALL = SHRINKING | NEWTON | KRYLOV

by_solver = pytest.mark.parametrize("solver", ALL)
by_mode = pytest.mark.parametrize("stop_mode", ["abs", "rel"])
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
# Two digits above what rounding allows each dtype (see test_solver_contract).
EPS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def whole(samples):
    """The same without ``select``."""
    batch = Batch(samples)
    return (lambda z: batch(z)), batch.log


def hard_and_easy(solver):
    """Four samples of other difficulty and scale."""
    sizes = [(1, 0.5, 1.0), (2, 0.85, 1e6), (3, 0.05, 1.0), (4, 0.7, 1e-5)]
    return [Sample(*size, linear=solver in KRYLOV) for size in sizes]


def solve(solver, samples, select=True, x0=None, **options):
    """Alone or together: samples in a batch, from zero. Returns the solution and the log."""
    if select:
        f = Batch(samples)
        log = f.log
    else:
        f, log = whole(samples)
    x0 = torch.zeros(len(samples), 12, dtype=torch.float64) if x0 is None else x0
    before, options = x0.clone(), {"threshold": 400, "eps": 1e-8} | options
    solution = ALL[solver](f, x0, stop="sample", **options)
    assert torch.equal(x0, before)
    return solution, log


# --- A sample is what it is alone ---------------------------------------------------------------


MATES = {
    "of other difficulty": lambda linear: [Sample(7, 0.9, linear=linear), Sample(8, 0.0)],
    "of another scale": lambda linear: [Sample(7, 0.6, 1e8, linear), Sample(8, 0.3, 1e-8, linear)],
    "diverging": lambda linear: [Diverging(), Sample(8, 0.6, linear=linear)],
    "not finite at first": lambda linear: [Failing(Sample(7, linear=linear), 0), Sample(8, 0.0)],
    "not finite later": lambda linear: [
        Failing(Sample(7, linear=linear), 2),
        Failing(Sample(8, linear=linear), 4),
    ],
}


# A batch without ``select`` differs in who is evaluated, whatever the mode.
@by_solver
@pytest.mark.parametrize(
    ("stop_mode", "select"),
    slow_but([("abs", True), ("rel", False)], product(("abs", "rel"), (True, False))),
)
def test_a_sample_does_not_depend_on_its_mates(solver, stop_mode, select):
    alone = [solve(solver, [s], stop_mode=stop_mode)[0] for s in hard_and_easy(solver)]
    for name, mates in MATES.items():
        before, after = mates(solver in KRYLOV)
        samples = [before, *hard_and_easy(solver), after]
        together, _ = solve(solver, samples, select, stop_mode=stop_mode)
        for i, own in enumerate(alone, start=1):
            scale = own["result"].norm()
            assert (together["result"][i] - own["result"][0]).norm() <= 1e-10 * scale, name
            for key in ("sample_nfe", "converged", "finite"):
                assert together[key][i] == own[key][0], (name, key)
            # Equal to rounding, relative to the values that the residual is a difference of.
            size = 1.0 if stop_mode == "rel" else scale.item()
            difference = abs((together["residual"][i] - own["residual"][0]).item())
            assert difference <= 1e-10 * size, name


@by_solver
@pytest.mark.parametrize("kind", ["diverging", "lost at 0", "lost at 3"])
@pytest.mark.parametrize("select", [True, False])
def test_a_failing_sample_is_what_it_is_alone(solver, kind, select):
    linear = solver in KRYLOV

    def make():
        if kind == "diverging":
            return Diverging()
        return Failing(Sample(5, 0.9, linear=linear), int(kind[-1]))

    alone, _ = solve(solver, [make()])
    mates = [Sample(1, 0.5, linear=linear), Sample(2, 0.85, 1e8, linear=linear)]
    together, _ = solve(solver, [mates[0], make(), mates[1]], select)
    torch.testing.assert_close(together["result"][1], alone["result"][0], rtol=1e-10, atol=1e-10)
    for name in ("sample_nfe", "converged", "finite"):
        assert together[name][1] == alone[name][0], name
    torch.testing.assert_close(together["residual"][1], alone["residual"][0], rtol=1e-8, atol=0)
    assert together["converged"].tolist() == [True, False, True]


@pytest.mark.parametrize("solver", [*SHRINKING, "newton"])
@by_mode
def test_evaluations_are_saved(solver, stop_mode):
    """In all, fewer than by the batch: there all go on until the hardest is solved."""
    samples = [Sample(i, radius) for i, radius in enumerate([0.05, 0.1, 0.2, 0.3, 0.5, 0.95])]
    options = {"threshold": 400, "eps": 1e-8, "stop_mode": stop_mode}
    batch = ALL[solver](Batch(samples), torch.zeros(6, 12, dtype=torch.float64), **options)
    own, log = solve(solver, samples, **options)
    assert own["converged"].all()
    if solver == "newton":
        assert own["sample_nfe"].sum() < own["nfe"] * 6
        assert own["sample_nfe"].sum() <= batch["nfe"] * 6
    else:
        assert own["sample_nfe"].sum() < 0.8 * batch["nfe"] * 6
        assert own["sample_nfe"].sum() == sum(len(rows) for rows, _, _ in log)


# --- What has converged costs nothing more ------------------------------------------------------


@pytest.mark.parametrize("solver", SHRINKING)
def test_f_sees_the_live_samples_alone(solver):
    samples = [*hard_and_easy(solver), Failing(Sample(6), 3), Diverging()]
    solution, log = solve(solver, samples)
    for sample, nfe in enumerate(solution["sample_nfe"].tolist()):
        calls = [k for k, (rows, _, _) in enumerate(log) if sample in rows]
        assert calls == list(range(nfe))
    assert len({len(rows) for rows, _, _ in log}) >= 4  # they do not end together
    assert len(log) == solution["nfe"] == solution["sample_nfe"].max()


@pytest.mark.parametrize("solver", SHRINKING)
def test_without_select_finished_samples_rest_at_their_best_point(solver):
    samples = [*hard_and_easy(solver), Failing(Sample(6), 3), Diverging()]
    solution, log = solve(solver, samples, select=False)
    assert solution["sample_nfe"].min() < solution["nfe"]
    for sample, nfe in enumerate(solution["sample_nfe"].tolist()):
        for rows, points, _ in log[nfe:]:
            assert rows == list(range(len(samples)))
            assert torch.equal(points[sample], solution["result"][sample])


@pytest.mark.parametrize("solver", [*NEWTON, *KRYLOV])
@pytest.mark.parametrize("known", [True, False], ids=["products", "any f"])
def test_finished_samples_rest_where_the_whole_batch_is_multiplied(solver, known):
    """Sample 0 is solved from the start, sample 2 lost: f is asked nothing new of them."""
    linear = solver in KRYLOV
    samples = [Sample(0, 0.0), Sample(1, 0.8, linear=linear), Failing(Sample(2, linear=True), 0)]
    x0 = torch.zeros(3, 12, dtype=torch.float64)
    x0[0] = samples[0].shift
    f, vectors = Batch(samples), []

    class Known(Affine):
        def __call__(self, z):
            return f(z)

    def product(v):
        vectors.append(v.clone())
        still = [sample if isinstance(sample, Sample) else sample.sample for sample in samples]
        return Batch(still)(v) - Batch(still)(torch.zeros_like(v))

    map_ = Known(product, x0) if known and linear else f
    solution = ALL[solver](map_, x0, threshold=60, eps=1e-9, stop="sample")
    assert solution["converged"].tolist() == [True, True, False]
    assert solution["sample_nfe"].tolist() == [1, solution["nfe"], 1]
    assert len(f.log) + len(vectors) == solution["nfe"] + linear * solution["products"]
    assert all(torch.equal(points[[0, 2]], x0[[0, 2]]) for _, points, _ in f.log)
    assert all(not v[[0, 2]].any() for v in vectors)


@pytest.mark.parametrize("solver", [name for name in SHRINKING if name not in ("plain", "damped")])
def test_inner_products_are_of_live_samples(solver, monkeypatch):
    """Between two calls of f they have the rows of the second; there are none after the last."""
    f, sizes = Batch(hard_and_easy(solver)), []

    def spy(original):
        def products(vectors, rows, wide=False):
            assert vectors.shape[1] == rows.shape[1]
            sizes.append((len(f.log), rows.shape[1]))  # calls so far
            return original(vectors, rows, wide)

        return products

    for module in (anderson_py, broyden_py):
        monkeypatch.setattr(module, "products", spy(module.products))
    x0 = torch.zeros(4, 12, dtype=torch.float64)
    SHRINKING[solver](f, x0, threshold=400, eps=1e-8, stop="sample")
    assert all(size == len(f.log[call][0]) for call, size in sizes)
    assert len({size for _, size in sizes}) >= 3


class Rows:
    """z -> function(data, z) for data (B, ...), by sample."""

    def __init__(self, function, data):
        self.function, self.data = function, data

    def __call__(self, z):
        return self.function(self.data, z)

    def select(self, rows):
        return Rows(self.function, self.data[rows])


class LargeOperations(TorchDispatchMode):
    """Operations that gave ``least`` numbers or more while ``watching``."""

    def __init__(self, least):
        super().__init__()
        self.least, self.watching, self.seen = least, False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # The best points are written to in place, a row at a time.
        copied = "index_copy_" in str(func)
        if self.watching and isinstance(out, torch.Tensor) and not copied:
            self.seen += [str(func)] * (out.numel() >= self.least)
        return out


@pytest.mark.parametrize(
    "solver", ["plain", "damped", "anderson", "anderson anew", "broyden", "broyden of few"]
)
def test_no_work_of_frozen_samples(solver):
    """15 of 16 samples are solved at once; later no operation is of 16 samples' size.

    But one: the best points of all, a reference until then, are copied once.
    """
    batch, size = 16, 20_011  # large, so that a block of Broyden's has eight rows
    weight = torch.linspace(-0.9, 0.9, size, dtype=torch.float64)
    slope = torch.zeros(batch, 1, dtype=torch.float64)
    slope[3] = 1.0
    large = LargeOperations(batch * size)

    def function(slope, z):
        large.watching = len(slope) == 1
        return slope * weight * z + 1

    x0, f = torch.zeros(batch, size, dtype=torch.float64), Rows(function, slope)
    with large:
        solution = SHRINKING[solver](f, x0, threshold=9, eps=1e-12, stop="sample")
        large.watching = False
    nfe = solution["sample_nfe"].sort(descending=True).values
    assert nfe[0] >= 9
    if solver != "damped":  # which halves what is left of them, all the same
        assert nfe[1] <= 3
    # At the end the result is made of them, by views alone.
    assert [op for op in large.seen if "view" not in op] in ([], ["aten.clone.default"])


# --- What the dict says -------------------------------------------------------------------------


def check(solution, log, x0, eps, stop_mode, floor=0.0):
    """Everything in the dict, found again from the calls of f alone."""
    batch, step_dtype = len(x0), torch.promote_types(x0.dtype, torch.float32)
    best = [(math.inf, x0[i].double().flatten(), math.inf, math.inf, 0) for i in range(batch)]
    last = [None] * batch
    highs, highest, far = [0] * batch, [0.0] * batch, [False] * batch
    first, done, lost, diverged = {}, set(), set(), set()
    nfe, abs_trace, rel_trace = [0] * batch, [], []
    assert len(log) == solution["nfe"]
    for k, (rows, points, values) in enumerate(log):
        assert rows == [i for i in range(batch) if i not in done]
        for place, i in enumerate(rows):
            nfe[i] += 1
            z, fz = points[place].double().flatten(), values[place].double().flatten()
            g, f = (fz - z).norm().item(), fz.norm().item()
            own = g if stop_mode == "abs" else g / (f + 1e-30)
            if not math.isfinite(own):
                done.add(i)
                lost.add(i)
                continue
            last[i] = (g, f)
            if k == 0:
                first[i] = 1e6 * max(g, math.sqrt(torch.finfo(step_dtype).eps) * f)
            if g <= first[i]:
                highs[i] = 0
            elif g > highest[i]:
                highs[i] += 1
                highest[i] = g
            far[i] = g > first[i]
            if own < best[i][0]:
                best[i] = (own, z, g, f, k)
            if own < eps or own == 0 or g / (f + 1e-30) < floor:
                done.add(i)
            elif highs[i] == 5:
                done.add(i)
                diverged.add(i)
        now = [best[i][2:4] if i in done else last[i] for i in range(batch)]
        now = [n for n in now if math.isfinite(n[0])]
        total_g = math.sqrt(sum(g * g for g, _ in now)) if now else math.inf
        total_f = math.sqrt(sum(f * f for _, f in now)) if now else 0.0
        abs_trace.append(total_g)
        rel_trace.append(total_g / (total_f + 1e-30))

    close = partial(pytest.approx, rel=1e-5)  # norms in float32
    assert solution["sample_nfe"].tolist() == nfe
    assert [i not in lost for i in range(batch)] == solution["finite"].tolist()
    assert (solution["result"].shape, solution["result"].dtype) == (x0.shape, x0.dtype)
    for i in range(batch):
        assert torch.equal(solution["result"][i].double().flatten(), best[i][1])
        assert solution["residual"][i].item() == close(best[i][0])
    residual = solution["residual"]
    assert torch.equal(solution["converged"], (residual < eps) | (residual == 0))
    assert solution["abs_trace"] == close(abs_trace)
    assert solution["rel_trace"] == close(rel_trace)
    assert all(type(value) is float for value in solution["abs_trace"] + solution["rel_trace"])
    found = [b[2:4] for b in best if math.isfinite(b[0])]
    if found:
        total_g, total_f = (math.sqrt(sum(n[j] ** 2 for n in found)) for j in (0, 1))
        assert solution["abs_lowest"] == close(total_g)
        assert solution["rel_lowest"] == close(total_g / (total_f + 1e-30))
    else:
        assert solution["abs_lowest"] == solution["rel_lowest"] == math.inf
    assert solution["lowest"] == solution[f"{stop_mode}_lowest"]
    assert solution["nstep"] == max(b[4] for b in best)
    ends_far = any(far[i] for i in range(batch) if i not in done)
    assert solution["prot_break"] is bool(diverged or ends_far or len(lost) == batch)
    if len(done) < batch:
        assert solution["reason"] == "threshold"
    elif diverged or len(lost) == batch:
        assert solution["reason"] == "diverged"
    else:
        reached = all(solution["converged"][i] for i in range(batch) if i not in lost)
        assert solution["reason"] == ("eps" if reached else "floor")


CASES = {
    "all converge": lambda: [Sample(i, r) for i, r in enumerate((0.05, 0.5, 0.7))],
    "one diverges": lambda: [Sample(1), Diverging(), Sample(2, 0.6)],
    "one is lost": lambda: [Sample(1), Failing(Sample(2), 2), Sample(3)],
    "one is never finite": lambda: [Failing(Sample(2), 0), Sample(1), Sample(3, 0.0)],
    "all are lost": lambda: [Failing(Sample(i), i) for i in range(3)],
    "one is solved": lambda: [Sample(2, 0.4), lambda z: z * 1.0, Sample(3)],
}


# Any two of dtype, mode, case and rank meet by default, with every solver. All ways are slow.
DICTS = {
    (dtype, mode, case): list(SHAPES)[(i + k) % len(SHAPES)]
    for i, dtype in enumerate(EPS)
    for j, mode in enumerate(("abs", "rel"))
    for k, case in enumerate(CASES)
    if (i + j + k) % 2 == 0
}


@pytest.mark.parametrize("solver", SHRINKING)
@pytest.mark.parametrize(("dtype", "stop_mode", "case"), DICTS)
def test_the_dict(solver, dtype, stop_mode, case):
    check_the_dict(solver, dtype, stop_mode, case, DICTS[dtype, stop_mode, case])


@pytest.mark.slow
@pytest.mark.parametrize("solver", SHRINKING)
@by_dtype
@by_mode
@pytest.mark.parametrize("case", CASES)
def test_the_dict_in_every_way(solver, dtype, stop_mode, case):
    for rank in SHAPES:
        check_the_dict(solver, dtype, stop_mode, case, rank)


def check_the_dict(solver, dtype, stop_mode, case, rank):
    x0 = 0.1 * torch.randn(SHAPES[rank], generator=torch.Generator().manual_seed(rank)).to(dtype)
    options = {"eps": EPS[dtype], "stop_mode": stop_mode}
    solution, log = solve(solver, CASES[case](), x0=x0, threshold=60, **options)
    check(solution, log, x0, **options)
    if case == "all converge" and dtype != torch.bfloat16:
        assert solution["converged"].all()


@pytest.mark.parametrize("solver", [*SHRINKING, *NEWTON])
@pytest.mark.parametrize("case", ["all converge", "one is lost", "one diverges"])
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_small_thresholds(solver, case, threshold):
    x0 = torch.zeros(3, 12, dtype=torch.float64)
    solution, log = solve(solver, CASES[case](), threshold=threshold, eps=0.0)
    if solver in SHRINKING:
        check(solution, log, x0, 0.0, "rel")
        assert solution["nfe"] == threshold + ("broyden" in solver)  # which counts updates
    assert solution["nfe"] + solution["products"] <= threshold + ("broyden" in solver)
    assert torch.isfinite(solution["result"]).all()


@pytest.mark.parametrize("solver", SHRINKING)
@by_mode
def test_floor(solver, stop_mode):
    """Each sample ends at its own floor, in either mode."""
    x0 = torch.zeros(3, 12, dtype=torch.float64)
    options = {"eps": 1e-12, "stop_mode": stop_mode, "floor": 1e-3}
    solution, log = solve(solver, CASES["all converge"](), **options)
    check(solution, log, x0, **options)
    assert solution["reason"] == "floor"
    assert not solution["converged"].any()
    assert not solution["prot_break"]


@by_dtype
@by_mode
@pytest.mark.parametrize("solver", [*NEWTON, *KRYLOV])
def test_the_dict_of_methods_with_products(solver, dtype, stop_mode):
    """Residuals and counts, from the result alone."""
    linear = solver in KRYLOV
    eps = EPS[dtype] * (4 if stop_mode == "abs" else 1)  # the states have norms of 4 and more
    for shape in SHAPES.values():
        samples = [Sample(i, r, linear=linear) for i, r in enumerate((0.05, 0.5, 0.7))]
        x0 = torch.zeros(shape, dtype=dtype)
        solution, _ = solve(solver, samples, x0=x0, threshold=100, eps=eps, stop_mode=stop_mode)
        assert (solution["result"].shape, solution["result"].dtype) == (x0.shape, dtype)
        value = Batch(samples)(solution["result"]).double().flatten(1)
        own = (value - solution["result"].double().flatten(1)).norm(dim=1)
        residual = own if stop_mode == "abs" else own / value.norm(dim=1)
        torch.testing.assert_close(solution["residual"], residual, rtol=1e-5, atol=0)
        assert torch.equal(solution["converged"], residual < eps)
        assert solution["converged"].all() or dtype == torch.bfloat16
        assert solution["abs_lowest"] == pytest.approx(own.norm().item(), rel=1e-5)
        assert len(solution["abs_trace"]) == solution["nfe"] == solution["sample_nfe"].max()
        assert not solution["prot_break"]


@pytest.mark.parametrize("solver", SHRINKING)
def test_autocast_is_for_f_alone(solver):
    """f runs in bfloat16 on the samples that are left; states and inner products in float32."""
    weight = torch.stack([0.02 * torch.eye(6), torch.diag(torch.linspace(-0.9, 0.9, 6))])
    seen = []

    def layer(weight, z):
        out = torch.bmm(weight, z[:, :, None])[:, :, 0]
        seen.append((len(z), z.dtype, out.dtype))
        return out + 1

    options = {"eps": 2e-2, "stop": "sample", "threshold": 80}
    with torch.autocast("cpu", torch.bfloat16):
        solution = SHRINKING[solver](Rows(layer, weight), torch.zeros(2, 6), **options)
    assert {(given, found) for _, given, found in seen} == {(torch.float32, torch.bfloat16)}
    assert solution["result"].dtype == torch.float32
    assert solution["converged"].all()
    assert sum(rows for rows, _, _ in seen) == solution["sample_nfe"].sum()
    assert solution["sample_nfe"][0] < solution["sample_nfe"][1]


def test_one_sample_is_the_batch():
    """With a batch of one, both ways of stopping are the same to the last bit."""
    for solver, method in ALL.items():
        f = Batch([Sample(3, 0.8, linear=solver in KRYLOV)])
        x0 = torch.zeros(1, 12, dtype=torch.float64)
        options = {"threshold": 200, "eps": 1e-8}
        batch, own = method(f, x0, **options), method(f, x0, stop="sample", **options)
        assert torch.equal(own["result"], batch["result"])
        for name in ("abs_trace", "nfe", "products", "nstep", "lowest", "reason"):
            assert own[name] == batch[name], (solver, name)
