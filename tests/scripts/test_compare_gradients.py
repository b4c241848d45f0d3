"""compare_gradients.py on tiny models: its table, its figure, what it says of gradients."""

import json
import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import compare_gradients
import pytest
from helpers import comparison
from helpers.comparison import Plan, Variant, make_start, run_variant

from deq_sequence.text.corpus import get_lm_corpus
from parameters import slow_but


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few words instead of the embedded text, on whose softmax a tiny model would spend all."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    for split in ("train", "valid", "test"):
        words = rng.choices([f"w{i}" for i in range(20)], k=400)
        (folder / f"{split}.txt").write_text(" ".join(["<unk>", *words]))
    return get_lm_corpus(folder, "ptb")


@pytest.fixture(autouse=True)
def one_process(monkeypatch, text):
    """All in this process, as a new one takes seconds to begin."""
    pool = SimpleNamespace(
        apply=lambda function, arguments: function(*arguments),
        apply_async=lambda function, arguments: SimpleNamespace(get=lambda: function(*arguments)),
        close=lambda: None,
        join=lambda: None,
    )
    context = SimpleNamespace(Pool=lambda *_, **__: nullcontext(pool))
    monkeypatch.setattr(compare_gradients.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(comparison.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(comparison, "get_lm_corpus", lambda *_: text)


@pytest.mark.parametrize("task", slow_but(["words"], ["words", "digits"]))
def test_the_command(tmp_path, capsys, task):
    argv = ["--tasks", task, "--tiny", "--steps", "4", "--stacked", "2", "--seconds", "0.01"]
    argv += ["--out", str(tmp_path)]
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
    monkeypatch.setattr(comparison, "_EXACT_THRESHOLD", 5)
    monkeypatch.setattr(comparison, "_RADIUS_PRODUCTS", 2)
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
    plan = Plan("digits", 2, 4, 1e-6, (0.002, 0.001), 0.3, tiny=True)
    make_start(plan, path)

    def peak(steps, regularised):
        found = run_variant(replace(plan, steps=steps), Variant("jfb"), regularised, path)
        return found["peak_mib"]

    assert min(peak(steps, True) for steps in (1, 2, 3)) > 1.05 * peak(1, False)


def test_a_probe_of_the_exact_gradient_is_exact(tmp_path):
    plan = Plan("words", 2, 1, 1e-6, (0.002, 0.001), 0.3, probes=1, tiny=True)
    path = tmp_path / "start.pt"
    make_start(plan, path)
    tight = Variant("ift", "broyden:eps=1e-6", "gmres:eps=1e-6", 150, 150)
    for probe in run_variant(plan, tight, False, path)["probes"]:
        assert probe["cosine"] == pytest.approx(1, abs=1e-5)
        assert probe["length"] == pytest.approx(1, abs=1e-5)


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
