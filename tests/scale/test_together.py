"""Three processes (gloo), started once: what they send, skip, resume and evaluate together."""

import copy
import itertools
import math
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import lib.runs.processes
from cases import CPU, Case, Recorder, image_config, make_trainer
from deq_sequence.evaluation import evaluate
from groups import run_group, work
from lib.deq import DEQWarning
from lib.runs.processes import Processes
from lib.runs.trainer import Trainer
from mdeq_vision.evaluation import evaluate_classification, evaluate_segmentation

N = 3
MODELS = ("words", "digits", "scenes")
CHUNKS = (1, 2)
# Everything that draws random numbers, with the solvers and tolerances of the commands.
RANDOM = ("--dropout", "0.1", "--dropatt", "0.1", "--f_thres", "8", "--b_thres", "8")
RESUMED = Case("words", batch=6, jacobian=True, steps=6, more=RANDOM)
# Of 4 streams or images one process of three has two, in two batches the images; of 2 one has none.
STREAMS, IMAGES = (4, 2), (4, 2, 1)

# ---- what each process does ---------------------------------------------------------------------


def found_by(processes: Processes, data: str) -> dict:
    warnings.simplefilter("ignore", DEQWarning)
    return {
        "sent": {(m, c): sent(m, c, processes, data) for m in MODELS for c in CHUNKS},
        "skipped": {model: skipped(model, processes, data) for model in MODELS},
        "copied": copied(processes, data),
        "resumed": resumed(processes, data),
        "unsettled": with_unsettled_buckets(processes, data),
        "evaluated": evaluations(processes, data),
    }


def short_case(model: str, chunk: int = 1) -> Case:
    """One stacked step, then others, whose solves need not converge."""
    if model == "words":
        more = ("--pretrain_steps", "1", "--f_thres", "4", "--b_thres", "4")
    else:
        more = ("TRAIN.PRETRAIN_STEPS", 1, "DEQ.F_THRES", 4, "DEQ.B_THRES", 4)
    return Case(model, batch=6, chunk=chunk, steps=10, more=more)


def sent(model: str, chunk: int, processes: Processes, data: str) -> dict:
    """Bytes of gradients, and other sums, that travel in each of two steps."""
    trainer = make_trainer(short_case(model, chunk), processes, data)
    buckets, sums, found = [], [], []

    def count(state, bucket):
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    def all_reduce(tensor, *args, **kwargs):
        sums.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    trainer.parallel.register_comm_hook(None, count)
    trainer.model.train()
    reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", all_reduce):
        batches = trainer.batches()
        for _ in range(2):  # the first is stacked, the second at equilibrium
            trainer.update(next(batches))
            found.append({"gradients": sum(buckets), "sums": len(sums) - len(buckets)})
            buckets.clear()
            sums.clear()
    nbytes = sum(p.nbytes for p in trainer.model.parameters())
    return {"steps": found, "parameters": nbytes}


def skipped(model: str, processes: Processes, data: str) -> dict:
    """A step in which a part of the second process's share is not finite, between two good ones."""
    trainer = make_trainer(short_case(model), processes, data)
    trainer.model.train()
    batches, part = trainer.batches(), trainer.part
    trainer.update(next(batches))
    before = snapshot(trainer)
    memory = bool(trainer.mems[0]) if model == "words" else None

    def poisoned(*args):
        loss, *rest = part(*args)
        return (loss * (math.nan if processes.rank == 1 else 1.0), *rest)

    trainer.part = poisoned
    trainer.update(next(batches))
    after, counts = snapshot(trainer), dict(trainer.counts)
    forgot = trainer.mems == [[]] if model == "words" else None
    trainer.part = part
    trainer.update(next(batches))
    return {
        "before": before,
        "after": after,
        "counts": counts,
        "memory": (memory, forgot),
        "in the end": snapshot(trainer),
        "in a row": trainer.skipped_in_a_row,
        "step": trainer.step,
    }


def snapshot(trainer: Trainer) -> dict:
    """Weights, statistics of batch norm, and the optimiser's moments."""
    return copy.deepcopy(
        {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()["state"]}
    )


def copied(processes: Processes, data: str) -> dict:
    """An epoch whose last batch has fewer images than there are processes; with dropout."""
    case = short_case("digits")
    case = replace(case, steps=4, more=(*case.more, "MODEL.DROPOUT", 0.2))
    trainer = make_trainer(case, processes, data)
    trainer.model.train()
    for batch in itertools.islice(trainer.batches(), 2):
        trainer.update(batch)
    return {"left": len(batch[0]), "images": trainer._window["images"], **snapshot(trainer)}


def resumed(processes: Processes, data: str) -> dict:
    """A run of six steps, and one that goes on from its checkpoint after four."""
    whole, checkpoint = make_trainer(RESUMED, processes, data), {}

    whole.due = lambda: (True, False, whole.step == 4)
    whole.save = lambda: checkpoint.update(copy.deepcopy(whole.state_dict()))
    first = Recorder()
    whole.train(first)
    again = make_trainer(RESUMED, processes, data)
    lines = again.load_state_dict(checkpoint, "checkpoint")
    again.due = lambda: (True, False, False)
    second = Recorder()
    again.train(second)
    return {
        "losses": (first.losses()[-2:], second.losses()),
        "states": (whole.model.state_dict(), again.model.state_dict()),
        "lines": lines,
    }


def with_unsettled_buckets(processes: Processes, data: str) -> dict:
    with mock.patch.object(lib.runs.processes, "_settle_buckets"):
        return resumed(processes, data)


def evaluations(processes: Processes, data: str) -> dict:
    """Losses and scores of untrained models at equilibrium, also where some have nothing to do."""
    found = {}
    words = make_trainer(Case("words", steps=2), processes, data)
    for n in STREAMS:
        figures = evaluate(
            words.model, words.corpus.valid, batch_size=n, tgt_len=16, mem_len=16, f_thres=200,
            max_steps=2, spectral_radius=n == 2, processes=processes,
        )  # fmt: skip
        found["words", n] = {"loss": figures.loss, "tokens": figures.tokens}
        if figures.sradius is not None:
            found["words", n]["sradius"] = figures.sradius
    kinds = {"digits": evaluate_classification, "scenes": evaluate_segmentation}
    for model, evaluator in kinds.items():
        trainer = make_trainer(Case(model, steps=2), processes, data)
        for n in IMAGES:
            cfg = image_config(Case(model))
            cfg.TEST.NUM_SAMPLES, cfg.TEST.BATCH_SIZE_PER_GPU = n, 1
            got = evaluator(cfg, trainer.model, trainer.valid_set, device=CPU, processes=processes)
            # Those of the solver are means over solves, and those are other ones.
            solver = ("nfe", "rel_residual", "abs_residual")
            found[model, n] = {k: v for k, v in got.figures.items() if k not in solver}
            found[model, n]["images"] = got.images
    return found


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(demo_folder, tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("group")
    return run_group(__file__, N, folder / "found", str(demo_folder), server=server, timeout=240)


def same(a, b) -> bool:
    """Whether nested containers of tensors are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_travel_once_a_step(found, model, chunk):
    """However many parts the batch has."""
    for f in found:
        seen = f["sent"][model, chunk]
        assert [step["gradients"] for step in seen["steps"]] == [seen["parameters"]] * 2


@pytest.mark.parametrize("chunk", CHUNKS)
def test_words_exchange_one_more_tensor_a_step(found, chunk):
    """Losses, counts and wishes to stop in one."""
    for f in found:
        assert [step["sums"] for step in f["sent"]["words", chunk]["steps"]] == [1, 1]


@pytest.mark.parametrize("model", MODELS)
def test_a_step_is_skipped_together(found, model):
    """Where the loss of one process is not finite."""
    for f in found:
        seen, first = f["skipped"][model], found[0]["skipped"][model]
        assert seen["counts"]["skipped"] == 1
        assert same(seen["before"], seen["after"])
        assert not same(seen["after"]["model"], seen["in the end"]["model"])
        assert all(t.isfinite().all() for t in seen["in the end"]["model"].values())
        assert same(seen["in the end"], first["in the end"])
        assert (seen["step"], seen["in a row"]) == (3, 0)


def test_memory_is_dropped_in_all_processes(found):
    assert [f["skipped"]["words"]["memory"] for f in found] == [(True, True)] * N


def test_a_batch_with_fewer_images_than_processes(found):
    """All compute the same on all of it, and the statistics of batch norm stay the same."""
    for f in found:
        assert f["copied"]["left"] == 1
        assert f["copied"]["images"] == pytest.approx(7)
        assert same(f["copied"], found[0]["copied"])


def test_resumed_at_equilibrium_bit_for_bit(found):
    """Dropout and the Jacobian loss included."""
    for f in found:
        whole, again = f["resumed"]["losses"]
        assert whole == again
        assert same(*f["resumed"]["states"])
        assert f["resumed"]["lines"] == []


def test_that_depends_on_settled_buckets(found):
    """DistributedDataParallel left to itself adds up in another order after a resume."""
    assert not any(same(*f["unsettled"]["states"]) for f in found)


@pytest.mark.parametrize(
    ("model", "n"),
    [*(("words", n) for n in STREAMS), *((m, n) for m in MODELS[1:] for n in IMAGES)],
)
def test_evaluation_does_not_depend_on_the_processes(found, alone, model, n):
    radius = alone[model, n].get("sradius")
    for f in found:
        figures = f["evaluated"][model, n]
        assert figures == found[0]["evaluated"][model, n]
        if radius is not None:  # which begins with random vectors
            assert figures["sradius"] == pytest.approx(radius, rel=0.01)
            figures = figures | {"sradius": radius}
        assert figures == pytest.approx(alone[model, n], rel=1e-6)


@pytest.fixture(scope="module")
def alone(demo_folder):
    return evaluations(Processes(), str(demo_folder))


if __name__ == "__main__":
    import sys

    work(found_by, sys.argv[1:])
