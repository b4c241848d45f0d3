"""The loop of all trainers: steps that are skipped, solves that diverge, stops, checkpoints."""

import dataclasses
import math
import os
import re
import signal

import pytest
import torch

from harness import differences, records
from lib.errors import InputError
from lib.runs.checkpoint import load
from lib.runs.evaluation_loop import EvaluationStopped
from lib.runs.interrupts import Stopped, TrainingError
from lib.runs.retention import versions
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS, Run, own, read_metrics
from lib.runs.trainer import FORMAT
from toy_trainer import ToyTrainer

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


@pytest.fixture
def start(tmp_path):
    """``start(trainer, name)`` trains in a folder of that name; the folder."""

    def train(trainer, name="run"):
        folder = tmp_path / name
        run = Run(folder, ("settings.json", "{}"), trainer.step or None)
        try:
            trainer.train(run)
            trainer.summarise()
        finally:
            run.close()
        return folder

    return train


def of_kind(folder, kind):
    return [r for r in read_metrics(folder) if r["kind"] == kind]


def state_of(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def resumed(folder, **options):
    trainer = ToyTrainer(**options)
    trainer.load_state_dict(load(folder / CHECKPOINT), folder / CHECKPOINT)
    return trainer


# ---- steps that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_step_that_is_not_finite_changes_nothing(start, factor, clip):
    trainer, seen = ToyTrainer(clip=clip), {}
    trainer.spoil = {2: factor}
    trainer.on_step = lambda step: seen.setdefault(step, state_of(trainer))
    momentum = []
    trainer.set_learning_rate = lambda: momentum.append(
        trainer.optimizer.state_dict()["state"].get(0, {}).get("momentum_buffer", torch.zeros(3))
        + 0
    )
    folder = start(trainer)
    assert_same(seen[2], seen[3])  # weights, and the statistics of batch norm
    assert torch.equal(momentum[2], momentum[3])
    assert not torch.equal(seen[3]["weight"], seen[4]["weight"])
    (record,) = of_kind(folder, "skipped")
    assert record["step"] == 3
    assert not math.isfinite(record["loss"])
    (summary,) = of_kind(folder, "summary")
    assert summary["skipped"] == 1
    assert summary["finished"]
    assert "step 3 | skipped: the loss is " in (folder / LOG).read_text()
    assert [r["loss"] for r in of_kind(folder, "train") if math.isfinite(r["loss"])] != []


def test_a_gradient_that_is_not_finite_although_the_loss_is():
    trainer = ToyTrainer()
    before = state_of(trainer)
    trainer.model.weight.register_hook(lambda grad: grad * math.inf)
    trainer.update(torch.randn(6, 3))
    assert trainer.counts["skipped"] == 1
    assert_same(state_of(trainer), before)
    assert trainer.step == 1


@pytest.mark.parametrize("kept", [("weight",), ("norm.weight", "norm.bias"), ()])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_gradient_norm_counts_every_parameter_once(start, kept, clip):
    """Whether clipped or left out; it is recorded with a step that is skipped for its loss."""
    found = {}
    for name, rate in (("clipped", clip), ("free", 0.0)):
        trainer = ToyTrainer(clip=rate)
        named = dict(trainer.model.named_parameters())
        trainer.clipped = [p for key, p in named.items() if key not in kept]
        grads = {}
        for key, p in named.items():
            p.register_post_accumulate_grad_hook(
                lambda p, key=key, grads=grads: grads.update({key: p.grad.clone()})
            )
        compute = trainer.part
        trainer.part = (
            lambda *arguments, compute=compute: (
                compute(*arguments)[0] + math.inf,  # whose gradient is that of the loss
                *compute(*arguments)[1:],
            )
        )
        trainer.last_step = 1
        (record,) = of_kind(start(trainer, name), "skipped")
        found[name] = record["gradient_norm"]
        exact = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        assert record["gradient_norm"] == pytest.approx(exact, rel=1e-5)
        # The optimiser's gradients: those of ``clipped`` have the norm that is asked for at most.
        part = torch.stack([grads[k].norm() for k in named if k not in kept]).norm().item()
        scale = min(1.0, rate / part) if rate else 1.0
        for key, p in named.items():
            expected = grads[key] * (1 if key in kept else scale)
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-9)
    assert found["clipped"] == pytest.approx(found["free"], rel=1e-5)


def test_too_many_in_a_row(start):
    trainer = ToyTrainer(max_skipped=3)
    trainer.saves = (1,)
    trainer.spoil = dict.fromkeys((1, 3, 4, 5), math.nan)
    words = r"^3 steps in a row were not finite, the last one at step 6: lower the rate; .*run/chec"
    with pytest.raises(TrainingError, match=words):
        start(trainer)
    assert trainer.counts["skipped"] == 4


def test_the_count_in_a_row_survives_a_resume(start, tmp_path):
    trainer = ToyTrainer(max_skipped=3)
    trainer.saves = (2,)
    trainer.spoil = dict.fromkeys(range(9), math.nan)
    with pytest.raises(TrainingError):
        start(trainer)
    trainer = resumed(tmp_path / "run", max_skipped=3)
    trainer.spoil = {2: math.nan}
    with pytest.raises(TrainingError, match="3 steps in a row were not finite, the last one at st"):
        start(trainer)


# ---- solves that diverge ------------------------------------------------------------------------


def test_a_solve_that_diverges_is_reported_with_residual_and_step(start):
    trainer = ToyTrainer()

    def diverging(f, x0, **options):
        solution = solver(f, x0, **options)
        return solution | {"prot_break": trainer.step == 2}

    solver = trainer.model.deq.f_solver
    trainer.model.deq.f_solver = diverging
    folder = start(trainer)
    found = of_kind(folder, "diverged")
    # Two parts of a batch, two solves; the backward solver is the forward one here.
    assert [(r["step"], r["pass"]) for r in found] == [(3, "forward")] * 2 + [(3, "backward")] * 2
    assert all(0 <= r["rel_residual"] < 1e-3 for r in found)
    log = (folder / LOG).read_text()
    assert log.count("step 3 | the forward solver diverged: relative residual ") == 2
    (summary,) = of_kind(folder, "summary")
    assert (summary["diverged_forward"], summary["diverged_backward"]) == (2, 2)


def test_many_of_them_do_not_fill_the_log(start):
    trainer = ToyTrainer()
    solver = trainer.model.deq.f_solver
    trainer.model.deq.f_solver = lambda f, x0, **o: solver(f, x0, **o) | {"prot_break": True}
    folder = start(trainer)
    assert len(of_kind(folder, "diverged")) == 8 * 4
    assert (folder / LOG).read_text().count("solver diverged") == 20


# ---- stopping -----------------------------------------------------------------------------------


@pytest.fixture
def whole(start):
    """An uninterrupted run."""
    folder = start(ToyTrainer(), "whole")
    return folder, load(folder / CHECKPOINT)


def assert_whole(folder, whole):
    other, state = whole
    assert records(folder) == records(other)
    assert list(differences(load(folder / CHECKPOINT), state)) == []


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 5)],
)
def test_a_signal_saves_and_stops(start, whole, number, code, step):
    """After the step; at 3 a validation is due as well, which the resumed run makes up for."""
    trainer = ToyTrainer()
    trainer.on_step = lambda at: at == step and os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {number.name} at step {step + 1}") as caught:
        start(trainer)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    folder = whole[0].parent / "run"
    assert load(folder / CHECKPOINT)["step"] == step + 1
    assert not of_kind(folder, "summary")[-1]["finished"]
    trainer = resumed(folder)
    trainer.scores = iter(range(0 if step < 4 else 1, 9))
    assert_whole(start(trainer), whole)


def test_a_validation_that_is_broken_off_comes_again(start, whole):
    trainer = ToyTrainer()
    trainer.stop_validation_at = 4
    with pytest.raises(Stopped, match="stopped by the time limit at step 4"):
        start(trainer)
    folder = whole[0].parent / "run"
    assert load(folder / CHECKPOINT)["unfinished"]
    assert of_kind(folder, "valid") == []
    assert_whole(start(resumed(folder)), whole)


def test_a_time_limit_stops_in_time(start, tmp_path):
    trainer = ToyTrainer(max_minutes=1e-9)
    with pytest.raises(Stopped, match="the time limit") as caught:
        start(trainer)
    assert caught.value.code == 0
    assert load(tmp_path / "run" / CHECKPOINT)["step"] == 1


# ---- errors -------------------------------------------------------------------------------------


def failing(trainer, where, at, error):
    """Let ``trainer`` raise ``error`` once, at step ``at``."""
    armed = [True]

    def fail(step):
        if step == at and armed:
            armed.clear()
            raise error

    if where == "data":
        batches = trainer.batches

        def broken():
            for batch in batches():
                fail(trainer.step)
                yield batch

        trainer.batches = broken
    elif where == "step":
        part = trainer.part

        def broken_part(index, *arguments):
            found = part(index, *arguments)  # it has changed batch norm's statistics by then
            if index == 1:
                fail(trainer.step)
            return found

        trainer.part = broken_part
    else:
        validate = trainer.validate

        def broken_validation():
            found = validate()
            fail(trainer.step)
            return found

        trainer.validate = broken_validation


@pytest.mark.parametrize(
    ("where", "at"), [("data", 0), ("data", 6), ("step", 2), ("step", 6), ("validation", 4)]
)
@pytest.mark.parametrize("kind", [InputError, ZeroDivisionError])
def test_an_error_saves_first(start, whole, where, at, kind):
    """Whatever it is, and though nothing is saved in between as a rule."""
    trainer = ToyTrainer()
    failing(trainer, where, at, kind("a corrupt picture"))
    with pytest.raises(kind, match="a corrupt picture"):
        start(trainer)
    folder = whole[0].parent / "run"
    assert load(folder / CHECKPOINT)["step"] == at
    assert f"an error ends the run after step {at}: all is saved" in (folder / LOG).read_text()
    trainer = resumed(folder)
    trainer.scores = iter(range(0 if at <= 4 else 1, 9))
    assert_whole(start(trainer), whole)


def test_too_little_memory_for_a_step(start, tmp_path):
    trainer = ToyTrainer()
    error = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    failing(trainer, "step", 5, torch.cuda.OutOfMemoryError(*error.args))
    trainer.care = dataclasses.replace(trainer.care, memory_of_step="raise --parts")
    words = r"^out of memory \(20.00 MiB more were needed\): raise --parts$"
    with pytest.raises(InputError, match=words):
        start(trainer)
    assert load(tmp_path / "run" / CHECKPOINT)["step"] == 5


def test_an_update_that_is_half_done_is_not_saved(start, tmp_path):
    trainer = ToyTrainer()
    trainer.advance = lambda *arguments: 1 / (trainer.step < 6)
    with pytest.raises(ZeroDivisionError):
        start(trainer)
    assert load(tmp_path / "run" / CHECKPOINT)["step"] == 4


def test_what_a_validation_lacks_is_known_before_the_first_step(start, whole):
    trainer, seen = ToyTrainer(), []

    def rehearse():
        torch.randn(1)  # as a validation may
        seen.append(trainer.step)
        raise InputError("--size is 0")

    trainer.rehearse = rehearse
    with pytest.raises(InputError, match="--size"):
        trainer.try_validation()
    assert seen == [0]
    trainer = ToyTrainer()
    trainer.rehearse = lambda: torch.randn(1)
    trainer.try_validation()
    assert_whole(start(trainer, "tried"), whole)
    trainer.rehearse = rehearse
    trainer.try_validation()  # nothing is left to validate


@pytest.mark.parametrize("why", ["signal", "error"])
def test_the_end_of_a_run_can_be_interrupted(tmp_path, why):
    """By a signal just after the last validation: it is stopped, not broken."""

    def finish(run):
        if why == "error":
            raise InputError("no weights")
        os.kill(os.getpid(), signal.SIGTERM)
        raise EvaluationStopped

    trainer, run = ToyTrainer(), Run(tmp_path, ("settings.json", "{}"))
    found = {"signal": (Stopped, "stopped by SIGTERM at step 8"), "error": (InputError, "no w")}
    with pytest.raises(found[why][0], match=found[why][1]):
        trainer.train(run, finish)
    run.close()
    stopped = [r["finished"] for r in of_kind(tmp_path, "summary")]
    assert stopped == ([False] if why == "signal" else [])
    assert load(tmp_path / CHECKPOINT)["step"] == 8
    trainer = resumed(tmp_path)
    trainer.train(Run.silent())  # nothing is left to do
    assert trainer.step == 8


def test_a_debug_run_does_not_say_that_it_is_saved(capsys):
    trainer, run = ToyTrainer(max_minutes=1e-9), Run(None, ("", ""))
    with pytest.raises(Stopped):
        trainer.train(run)
    assert "stopped by the time limit at step 1: nothing is saved\n" in capsys.readouterr().out


def test_a_mean_of_no_step_is_not_shown(start):
    """The line of the skipped step shows its loss, so that a mean of NaN would contradict it."""
    trainer = ToyTrainer()
    trainer.model.weight.register_hook(lambda grad: grad * (math.inf if trainer.step == 2 else 1))
    log = (start(trainer) / LOG).read_text()
    assert re.search(r"step 3 \| skipped: the loss is [0-9.]+, the gradient norm inf", log)
    assert "step 3 | all 1 since the last line skipped" in log
    assert "nan" not in log


# ---- checkpoints --------------------------------------------------------------------------------


def test_a_checkpoint_has_the_parts_that_are_asked_for():
    state = ToyTrainer().state_dict()
    ToyTrainer.check(state, "x.pt")
    for name in state:
        with pytest.raises(InputError):
            ToyTrainer.check({k: v for k, v in state.items() if k != name}, "x.pt")
    with pytest.raises(InputError, match="not a checkpoint of this trainer"):
        ToyTrainer.check(state | {"format": FORMAT - 1}, "x.pt")


def test_other_settings_are_refused():
    state = ToyTrainer().state_dict()
    trainer = ToyTrainer()
    trainer.pretrain_steps = 5
    with pytest.raises(InputError, match="--border 4, and this run has 5"):
        trainer.load_state_dict(state, "x.pt")


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_are_kept(start, keep):
    trainer = ToyTrainer(keep=keep)
    trainer.saves = range(9)
    folder = start(trainer)
    assert [load(p)["step"] for p in versions(folder / CHECKPOINT)] == [8, 7, 6, 5][:keep]


def test_the_best_weights_are_those_of_the_last_phase(start):
    trainer = ToyTrainer()
    trainer.every = 2
    trainer.scores = iter([9, 8, 3, 4])
    seen = {}
    trainer.after_validation = lambda found: seen.setdefault(trainer.step, state_of(trainer))
    folder = start(trainer)
    assert trainer.best == {"phase": "equilibrium", "score": 4, "step": 8, "name": "score"}
    assert_same(load(folder / WEIGHTS), seen[8])


@pytest.mark.parametrize(
    ("scores", "step"), [((5, math.nan, 3, math.nan), 6), ((5, 4, math.nan, 3), 4)]
)
def test_a_score_that_is_not_a_number_is_never_the_best(start, scores, step):
    """At the first validation of the last phase, after it, and before the best of the phase."""
    trainer = ToyTrainer()
    trainer.every, trainer.pretrain_steps = 2, 2
    trainer.scores, seen = iter(scores), {}
    trainer.after_validation = lambda found: seen.setdefault(trainer.step, state_of(trainer))
    folder = start(trainer)
    assert trainer.best["score"] == scores[step // 2 - 1]
    assert trainer.best["step"] == step
    assert_same(load(folder / WEIGHTS), seen[step])


def test_a_disk_that_is_full_leaves_what_was_there(start, tmp_path, monkeypatch):
    trainer = ToyTrainer()
    trainer.saves = (2, 3)
    fsync = os.fsync

    def full(descriptor):
        if trainer.step == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((InputError, OSError), match="No space left"):
        start(trainer)
    assert load(tmp_path / "run" / CHECKPOINT)["step"] == 2


def _moved(folder):
    folder.rename(folder.with_name("moved"))


def _taken_over(folder):
    """By a run that begins where this one lay."""
    _moved(folder)
    own(folder)
    (folder / LOG).write_text("of another run")


@pytest.mark.parametrize("happens", [_moved, _taken_over])
def test_a_run_whose_folder_is_gone_ends_and_writes_nothing(start, tmp_path, happens):
    folder, trainer, coming = tmp_path / "run", ToyTrainer(), [happens]
    trainer.on_step = lambda step: coming.pop()(folder) if step == 5 and coming else None
    own(folder)
    with pytest.raises(InputError, match="moved, removed or replaced, so step 8 cannot be saved"):
        start(trainer)
    left = sorted(path.name for path in folder.glob("*"))
    assert left == ([] if happens is _moved else [LOG, "run.lock"])
    assert load(tmp_path / "moved" / CHECKPOINT)["step"] == 4


def test_a_run_survives_that_its_lock_is_deleted(start, tmp_path):
    own(tmp_path / "run")
    trainer = ToyTrainer()
    trainer.on_step = lambda step: (tmp_path / "run" / "run.lock").unlink(missing_ok=True)
    assert load(start(trainer) / CHECKPOINT)["step"] == 8
