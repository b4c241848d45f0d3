"""compare_gradients.py on tiny models: its table, its figure, what it says of gradients."""

import json

import compare_gradients
import pytest
import torch
from helpers import comparison
from helpers.comparison import Plan, Variant, make_start, run_variant

from parameters import slow_but


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """In this process: a new one takes seconds to begin."""

    class Job:
        def __init__(self, value):
            self.value = value

        def get(self):
            return self.value

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def apply(self, function, arguments):
            return function(*arguments)

        def apply_async(self, function, arguments):
            return Job(function(*arguments))

        def close(self):
            pass

        join = close

    class Context:
        def Pool(self, *_, **__):
            return Pool()

    monkeypatch.setattr(compare_gradients.multiprocessing, "get_context", lambda _: Context())
    monkeypatch.setattr(comparison.torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize("task", slow_but(["words"], ["words", "digits"]))
def test_the_command(tmp_path, capsys, task):
    argv = ["--tasks", task]
    argv += [
        "--tiny",
        "--steps",
        "4",
        "--stacked",
        "2",
        "--seconds",
        "0.01",
        "--out",
        str(tmp_path),
    ]
    only = ["--only", "ift, anderson 6 / broyden", "phantom:steps=3,damping=0.8, "]
    assert compare_gradients.main([*argv, *only]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "gradients.json").read_text())
    outcomes = found[task]["outcomes"]
    assert [o["name"][:4] for o in outcomes] == ["ift,", "phan"] * 2
    assert [o["regularised"] for o in outcomes] == [False, False, True, True]
    for outcome in outcomes:
        assert outcome["name"] in printed
        assert outcome["skipped"] == 0
        assert outcome["at_steps"]["loss"] > 0
        assert outcome["at_seconds"]["steps"] >= 1
        assert outcome["forward_nfe"] > 0
        assert (outcome["backward_nfe"] > 0) == outcome["name"].startswith("ift")
        assert all(-1.01 <= p["cosine"] <= 1.01 for p in outcome["probes"])
        assert all(p["exact_backward_residual"] < 1e-4 for p in outcome["probes"])
    # All begin at the same point.
    firsts = [o["probes"][0] for o in outcomes]
    assert len({round(p["spectral_radius"], 4) for p in firsts}) == 1
    for name in ("gradients.svg", "gradients-curves.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "gradients.md").read_text().strip() in printed


@pytest.mark.parametrize("task", ["words", "digits"])
def test_a_probe_changes_nothing(task, tmp_path, monkeypatch):
    """Training is the same whether its gradients are looked at or not."""
    plan = Plan(task, 2, 4, 1e-6, (0.002, 0.001), 0.3, probes=2, tiny=True)
    path = tmp_path / "start.pt"
    make_start(plan, path)
    probed = run_variant(plan, Variant("ift"), True, path)
    monkeypatch.setattr(comparison, "_probe", lambda *_: {})
    alone = run_variant(plan, Variant("ift"), True, path)
    assert probed["at_steps"]["loss"] == alone["at_steps"]["loss"]
    assert [c["loss"] for c in probed["curve"]] == [c["loss"] for c in alone["curve"]]


def test_memory_is_of_a_step_with_the_jacobian_loss(tmp_path, monkeypatch):
    """Three steps of ten compute it: which of them is measured must not be left to chance."""
    monkeypatch.setattr(comparison, "_probe", lambda *_: {})
    path = tmp_path / "start.pt"
    peaks = {}
    for steps in (1, 2, 3, 4):
        plan = Plan("digits", 2, steps, 1e-6, (0.002, 0.001), 0.3, tiny=True)
        make_start(plan, path)
        for regularised in (False, True):
            found = run_variant(plan, Variant("jfb"), regularised, path)
            peaks.setdefault(regularised, []).append(found["peak_mib"])
    assert min(peaks[True]) > 1.05 * max(peaks[False])


def test_a_probe_of_the_exact_gradient_is_exact(tmp_path):
    plan = Plan("words", 2, 1, 1e-6, (0.002, 0.001), 0.3, probes=1, tiny=True)
    path = tmp_path / "start.pt"
    make_start(plan, path)
    tight = Variant("ift", "broyden:eps=1e-6", "gmres:eps=1e-6", 150, 150)
    for probe in run_variant(plan, tight, False, path)["probes"]:
        assert probe["cosine"] == pytest.approx(1, abs=1e-5)
        assert probe["length"] == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--only", "adjoint"], "no variant begins so"),
        (["--steps", "0"], "--steps is 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--tasks", "scenes"], "scenes"),
    ],
)
def test_bad_arguments(argv, named, capsys):
    assert compare_gradients.main(argv) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
