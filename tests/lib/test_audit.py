"""The audit of an equilibrium: each verdict by a map made for it, figures with known values."""

import json
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from lib import DEQ, InputError, anderson, audit, fixed_point_iteration
from lib.auditing import findings
from lib.auditing.findings import ADVICE, OWN, Rules, compare, correctness, effort, rank_correlation

PICARD = "fixed_point_iteration"


def samples(n=64):
    """Inputs (n, 2) away from 0, and whether their first number is positive."""
    x = torch.linspace(-1, 1, n)
    x = x + 0.2 * x.sign()
    return torch.stack([x, x.flip(0)], dim=1), x > 0


def positive(z, target):
    return (z[:, 0] > 0) == target


class Model(nn.Module):
    """The fixed point of a map f(z, x)."""

    def __init__(self, f, solver=PICARD, thres=30, start=torch.zeros_like, **options):
        super().__init__()
        self.f, self.thres, self.start = f, thres, start
        self.deq = DEQ(solver, **options)

    def forward(self, x):
        return self.deq(lambda z: self.f(z, x), self.start(x), f_thres=self.thres).z


def contraction(z, x):
    return 0.5 * z + x


def two_points(z, x):
    return torch.tanh(3 * z + 0.1 * x)


def rotation(z, x):
    """Turns z by a right angle around a point, forever."""
    return torch.stack([-z[:, 1], z[:, 0]], dim=1) + x


def soon_wrong(z, x):
    """The first number turns positive with x at once, and after some steps negative."""
    slow = 0.9 * z[:, 1] - 0.2 * x[:, 0]
    return torch.stack([x[:, 0] + slow, slow], dim=1)


def cubic(z, x):
    """Comes back from near 0 only."""
    return z**3 + 0.2 * x


MADE_FOR = {
    "equilibrium": Model(contraction),
    "cut short": Model(lambda z, x: 0.9 * z + x, thres=8),
    "idle solver": Model(contraction, start=torch.clone),
    "truncated iteration": Model(soon_wrong, thres=6),
    "no fixed point": Model(rotation),
    "several fixed points": Model(two_points),
    "local equilibrium": Model(cubic),
    "unstable equilibrium": Model(lambda z, x: x - 2 * z, "broyden"),
    "undecided": Model(contraction),
}


@pytest.mark.parametrize("verdict", ADVICE)
def test_each_verdict(verdict):
    report = audit(MADE_FOR[verdict], [samples(12 if verdict == "undecided" else 64)], positive)
    assert (report.verdict, report.samples) == (verdict, 12 if verdict == "undecided" else 64)
    assert ADVICE[verdict] in str(report)


def test_an_answer_that_does_not_stay():
    """Every sample settles, but at the wrong answer."""
    report = audit(MADE_FOR["truncated iteration"], [samples()], positive)
    assert report.patient == 1
    measures = {cut["name"]: cut["measure"] for cut in report.cuts}
    assert (measures["own threshold"], measures["4 x threshold"]) == (1, 0)


def test_an_answer_that_comes_late_without_a_fixed_point():
    """The first number drifts towards the right answer for as long as f is iterated."""

    def drifts(z, x):
        drift = 0.02 * x[:, 0].sign() * (1 - z[:, 1])
        return torch.stack([z[:, 0] + drift, -z[:, 1]], dim=1)

    start = {"start": lambda x: -0.3 * x, "thres": 12}
    report = audit(Model(drifts, f"{PICARD}:best=sample", **start), [samples()], positive)
    assert report.verdict == "truncated iteration"
    assert report.cuts[-1]["measure"] > report.cuts[-3]["measure"] > report.cuts[0]["measure"]


def test_cuts_of_plain_iteration():
    """Evaluation n is at z = 2 x (1 - 0.5^(n - 1)), whose relative residual is known."""
    report = audit(Model(contraction, thres=9), [samples()], positive)
    found = {cut["name"]: cut for cut in report.cuts}
    assert [*found] == ["skipped", "2", "4", "8", *("own threshold", "2 x threshold"),
                        "4 x threshold"]  # fmt: skip
    for name, k in {"skipped": 0, "2": 1, "4": 3, "8": 7, "own threshold": 8}.items():
        assert found[name]["residual"] == pytest.approx(0.5**k / (2 - 0.5**k), rel=1e-3)
        assert found[name]["evaluations"] == {0: 0, 8: 9}.get(k, k + 1)
    assert found["skipped"]["measure"] == 0.5
    assert found["2"]["measure"] == 1.0
    assert report.enough == "2"


def test_two_fixed_points():
    """They lie at about plus and minus one: at twice the norm from each other."""
    states = [torch.full((64, 2), 0.2), torch.full((64, 2), -0.2)]
    for start in states:
        model = Model(two_points, start=lambda x, start=start: start)
        report = audit(model, [samples()], positive, scales=[1.0], seeds=[0, 1, 2])
        assert [s["kind"] for s in report.starts] == ["displaced"] * 3 + ["drawn"] * 3
        assert all(s["settled"] == 1 and s["elsewhere"] > 0 for s in report.starts[3:])
        assert report.radius["largest"] < 0.1


def test_radius_at_the_solution():
    x, target = samples()
    report = audit(Model(lambda z, x: torch.tanh(0.5 * z + x)), [(x, target)], positive)
    z = Model(lambda z, x: torch.tanh(0.5 * z + x), "anderson:eps=1e-6")(x)
    exact = (0.5 * (1 - z**2)).amax(dim=1)  # the Jacobian is diagonal
    assert report.radius["mean"] == pytest.approx(exact.mean().item(), rel=1e-2)
    assert report.radius["largest"] == pytest.approx(exact.max().item(), rel=1e-2)


def test_harder_samples_take_more_evaluations():
    """Rates of contraction from 0.1 to 0.8: evaluations grow with the rate, sample by sample."""
    rate = torch.linspace(0.1, 0.8, 64)[:, None]
    model = Model(lambda z, x: rate * z + x)
    report = audit(model, [samples()], positive, difficulty=lambda z, y: rate[:, 0])
    assert report.effort["correlation"] > 0.95
    assert report.effort["said"].startswith("harder samples take more")
    assert report.effort["high"] > 2 * report.effort["low"]


def test_wrong_samples_that_do_not_settle():
    x, target = samples()
    turns = (torch.arange(64) % 4 == 0)[:, None]
    model = Model(lambda z, x: torch.where(turns, rotation(z, -x), contraction(z, x)))
    found = audit(model, [(x, target)], positive).correctness
    assert found["said"].startswith("wrong samples have the larger residual")
    assert found["auc"] > 0.9
    assert found["high"] > 0.1 > found["low"]


@pytest.mark.parametrize(
    "options",
    [
        {"grad": "phantom:steps=3,damping=0.5"},
        {"grad": "unroll"},
        {"grad": "reversible:damping=0.7"},
        {"grad": "shine", "solver": "broyden"},
        {"solver": "newton_krylov"},
        {"solver": "anderson:check_every=4,max_nfe=25"},
        {"solver": "anderson:best=sample", "stop_mode": "abs"},
        {"solver": partial(fixed_point_iteration, eps=0.0)},
        {"solver": lambda f, x0, threshold, stop_mode: anderson(f, x0, threshold)},
    ],
    # A function's own text has its address, and xdist wants the same names in all processes.
    ids=lambda options: ",".join(v if isinstance(v, str) else "function" for v in options.values()),
)
def test_any_solver_and_gradient(options):
    """What the model gives in the audit's own pass is what it gives outside, and is put back."""
    x, target = samples()
    model = Model(contraction, **options)
    model.frozen = nn.Dropout().eval()
    outputs = []

    def correct(z, target):
        outputs.append(z)
        return positive(z, target)

    before = model.deq.f_solver, model.deq.grad, model.deq.stats
    report = audit(model, [(x, target)], correct)
    assert (model.deq.f_solver, model.deq.grad, model.deq.stats) == before
    assert [m.training for m in model.modules()] == [True, False]
    assert model.deq.stats.forward.solves == 0
    assert report.verdict == "equilibrium"
    with torch.no_grad():
        exact = "reversible" not in options.get("grad", "")  # which counts as plain iteration
        torch.testing.assert_close(outputs[0], model.eval()(x), rtol=0 if exact else 1e-3, atol=0)
    assert torch.equal(outputs[1], torch.zeros_like(x))  # skipped: the start itself


def test_a_solver_that_does_not_count_per_sample():
    own = Model(contraction, lambda f, x0, threshold, stop_mode: anderson(f, x0, threshold))
    report = audit(own, [samples()], positive, difficulty=lambda z, y: z[:, 0])
    assert report.effort["said"] == "unknown: the solver does not count evaluations per sample"


class Two(nn.Module):
    """Two equilibria in a row; the second state is a list. The start is random."""

    def __init__(self):
        super().__init__()
        self.first, self.second = DEQ(PICARD), DEQ("anderson")

    def forward(self, x):
        z = self.first(lambda z: contraction(z, x), torch.randn_like(x)).z
        parts = [torch.randn_like(z), torch.randn(len(z), 3)]
        return self.second(lambda s: [contraction(s[0], z), 0.9 * s[1]], parts).z[0]


def test_several_solves_and_batches():
    """The figures of a sample are the worst of its solves; batches may differ in size."""
    state = torch.random.get_rng_state()
    x, target = samples()
    parts = [(x[:40], target[:40]), (x[40:], target[40:])]
    report = audit(Two(), parts, positive, seeds=[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (report.verdict, report.samples) == ("equilibrium", 64)
    assert report.radius["largest"] == pytest.approx(0.9, rel=1e-3)


def test_a_deq_of_a_function():
    deq = DEQ()
    x, target = samples()

    def forward(x):
        return deq(lambda z: contraction(z, x), torch.zeros_like(x)).z

    assert audit(deq, [(x, target)], positive, forward=forward).verdict == "equilibrium"


@pytest.mark.parametrize(("mode", "settled"), [("rel", False), ("abs", True)])
def test_a_solve_that_stops_by_the_batch(mode, settled):
    """It is solved, though samples that contract slowly are above the tolerance by themselves.

    With 'abs', no sample has a larger residual than the batch.
    """
    rate = torch.where(torch.arange(64) % 8 == 0, 0.8, 0.3)[:, None]
    model = Model(lambda z, x: rate * z + (1 - rate) * x, stop_mode=mode)
    report = audit(model, [samples()], positive)
    own = next(cut for cut in report.cuts if cut["name"] == OWN)
    assert own["met"]
    assert (own["settled"] > 0.95) == settled
    assert report.verdict == "equilibrium"


def test_an_f_that_is_never_finite():
    report = audit(Model(lambda z, x: z / 0), [samples()], positive)
    assert (report.patient, report.radius["samples"]) == (0, 0)
    json.dumps(report.as_dict(), allow_nan=False)


def test_report_as_json():
    report = audit(MADE_FOR["no fixed point"], [samples()], positive, measure="sign right")
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["verdict"] == "no fixed point"
    assert found["radius"]["mean"] is None
    assert found["advice"] == ADVICE["no fixed point"]
    assert [len(found[name]) for name in ("cuts", "starts")] == [8, 6]
    text = str(report)
    for part in (
        "sign right",
        "no sample settled",
        "64 of 64 samples are right, 0 wrong",
    ):
        assert part in text
    assert max(map(len, text.splitlines()[4:])) <= 100


def test_a_log_likelihood_as_the_measure():
    def score(z, target):
        return -nn.functional.softplus(-z[:, 0] * (2.0 * target - 1))

    report = audit(Model(contraction), [samples()], score, measure="log-likelihood")
    assert report.verdict == "equilibrium"
    assert report.correctness["auc"] is None


def constant_rows(z, target):
    return torch.ones(len(z) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "Linear has no lib.DEQ as an attribute"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.ones(3, 2)]}, "a batch is 'Tensor', but must be a pair"),
        ({"correct": lambda z, y: 1.0}, "what correct returns is 'float'"),
        ({"correct": lambda z, y: z}, r"what correct returns is \(64, 2\)"),
        ({"correct": constant_rows}, "a state has 64 rows, but there are 65 scores"),
        ({"difficulty": lambda z, y: None}, "what difficulty returns is 'NoneType'"),
        ({"forward": lambda x: x}, "the model called no DEQ"),
        ({"eps": 0}, "eps is 0"),
        ({"scales": []}, "scales and seeds"),
        ({"scales": [-1.0]}, "a number in scales is -1.0"),
        ({"seeds": [0.5]}, "a number in seeds is 0.5"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments(change, message):
    model = Model(contraction)
    arguments = {"model": model, "batches": [samples()], "correct": positive} | change
    before = model.deq.f_solver, model.deq.grad
    with pytest.raises(InputError, match=message):
        audit(**arguments)
    assert (model.deq.f_solver, model.deq.grad) == before


def test_solves_that_differ_between_calls():
    class Growing(Model):
        def forward(self, x):
            self.start = lambda x: torch.cat([self.z, self.z])[: len(x)]
            self.z = torch.zeros(64, self.z.shape[1] + 1)
            return self.deq(lambda z: 0.5 * z, torch.ones_like(self.z)).z

    model = Growing(contraction)
    model.z = torch.zeros(64, 1)
    with pytest.raises(InputError, match="the model's solves differ between two calls"):
        audit(model, [samples()], positive)


# ---- the figures behind the findings -----------------------------------------------------------


def test_rank_correlation_as_in_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert rank_correlation(a, np.ones(50)) is None


def test_auc_as_in_scipy():
    rng = np.random.default_rng(1)
    residual, score = rng.exponential(size=60).round(1), (rng.random(60) < 0.6).astype(float)
    found = correctness(residual, score, Rules())
    u = scipy.stats.mannwhitneyu(residual[score == 0], residual[score == 1]).statistic
    assert found["auc"] == pytest.approx(u / ((score == 0).sum() * (score == 1).sum()))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (np.ones(40), "same"),
        (np.r_[0.0, np.ones(39)], "unclear"),  # one sample of forty
        (np.zeros(40), "lower"),
        (np.full(40, 1.2), "higher"),
    ],
)
def test_paired_means(after, said):
    assert compare(np.ones(40), after, 0.01) == said


def test_unclear_whether_the_solve_matters():
    """A gain of one sample of forty may be chance."""
    right = torch.ones(40, dtype=torch.bool)
    right[0] = False
    model = Model(contraction)

    def correct(z, target):
        return right if not z.any() else torch.ones_like(right)

    report = audit(model, [(samples(40)[0], None)], correct)
    assert report.verdict == "undecided"
    assert report.reason.startswith("40 samples; the measure is 1.000, and 0.975 without")


@pytest.mark.parametrize(
    ("evaluations", "difficulty", "said"),
    [
        (np.arange(30.0), None, "unknown: no difficulty"),
        (np.arange(9.0), np.arange(9.0), "cannot be told from 9 samples"),
        (np.ones(30), np.arange(30.0), "cannot be told from figures that are all the same"),
        (np.arange(30.0), np.ones(30), "cannot be told from figures that are all the same"),
        (np.arange(30.0), np.arange(30.0), "harder samples take more"),
        (-np.arange(30.0), np.arange(30.0), "harder samples take fewer"),
        (np.arange(30.0), np.arange(30.0) % 5, "no relation"),
    ],
)
def test_effort_in_words(evaluations, difficulty, said):
    settled = np.ones(len(evaluations), dtype=bool)
    assert effort(evaluations, difficulty, settled, Rules())["said"].startswith(said)


def test_effort_of_samples_that_do_not_settle():
    """They have spent their budget. A few of them are left out."""
    evaluations, settled = np.r_[np.arange(39.0), 1000], np.arange(40) < 39
    assert effort(evaluations, np.arange(40.0)[::-1], settled, Rules())["correlation"] == -1
    found = effort(evaluations, np.arange(40.0), settled[::-1] & (evaluations > 9), Rules())
    assert found["said"] == "cannot be told: 75% of the samples settle"
    assert found["correlation"] is None


@pytest.mark.parametrize(
    ("residual", "score", "said"),
    [
        (
            np.arange(30.0),
            np.r_[np.ones(28), 0, 0],
            "cannot be told: 28 of 30",
        ),
        (np.arange(30.0), np.r_[np.ones(20), np.zeros(10)], "wrong samples have the larger"),
        (np.arange(30.0), np.r_[np.zeros(20), np.ones(10)], "right samples have the larger"),
        (np.arange(30.0), np.arange(30) % 2, "no relation"),
        (np.arange(30.0), -np.arange(30.0) / 2, "a smaller residual goes with a higher score"),
        (np.arange(30.0), np.arange(30.0) / 2, "a larger residual goes with a higher score"),
        (np.arange(30.0), np.arange(30) % 5 / 5, "no relation"),
        (np.arange(9.0), np.arange(9) / 9, "cannot be told from 9 samples"),
    ],
)
def test_correctness_in_words(residual, score, said):
    assert correctness(residual, score.astype(float), Rules())["said"].startswith(said)


def test_rules_are_stated_in_order():
    """The docstring of the rules names each verdict, in the order in which they are tried."""
    text = findings.judge.__doc__
    places = [text.index(f". {verdict}: ") for verdict in (
        "undecided", "idle solver", "truncated iteration", "no fixed point", "cut short",
        "several fixed points", "local equilibrium", "unstable equilibrium", "equilibrium",
    )]  # fmt: skip
    assert len(places) == len(ADVICE)
    assert places == sorted(places)
