"""--graph without a GPU, and steps whose f comes from recorded operations."""

import pytest
import torch

from lib.deq import DEQWarning
from lib.graphs import Graphs
from lib.runs.run_folder import read_metrics
from recorded_graphs import check_steps
from small_model import build, words

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


def test_the_flag_without_a_gpu(train, run_folder):
    train(name="plain")
    train("--graph", name="graph")
    plain, found = (
        [r["loss"] for r in read_metrics(run_folder.parent / name) if "loss" in r]
        for name in ("plain", "graph")
    )
    assert found == plain
    log = (run_folder.parent / "graph" / "log.txt").read_text()
    assert log.count("warning: no CUDA graph: f is on no GPU") == 1


@pytest.mark.parametrize("settings", [{"dropout": 0.2}, {"dropatt": 0.2, "pre_lnorm": True}])
@pytest.mark.parametrize("amp", [False, True])
def test_f_from_its_source(settings, amp):
    """What f holds is all that differs between two forward passes."""
    model, made = build(wnorm=True, **settings), []
    prepare = model.func.prepare
    model.func.prepare = lambda *inputs: made.append(prepare(*inputs)) or made[-1]
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for seed in (0, 1):
            torch.manual_seed(seed)
            model(*words(seed=seed), [], f_thres=3, b_thres=3)
        first, second = made
        (build_first, _), (_, held) = first.source(), second.source()
        z = torch.randn_like(words(seed=0)[0].t()[..., None].expand(-1, -1, model.d_model).float())
        assert torch.equal(build_first(held)(z), second(z))
        assert not torch.equal(first(z), second(z))


@pytest.mark.parametrize("check_every", [1, 99])
@pytest.mark.parametrize("amp", [False, True])
def test_steps_from_a_recording(amp, check_every):
    """With memory."""

    def made():
        model, mems = build(wnorm=True, dropout=0.1, dropatt=0.1), []
        model.f_solver = model.b_solver = f"broyden:check_every={check_every}"

        def forward(step):
            loss, _, _, *mems[:] = model(*words(seed=step), [*mems], f_thres=9, b_thres=9)
            return loss.float().mean()

        return model, forward

    check_steps(made, amp=amp)


def test_no_source_in_a_replica():
    model, made = build(), []
    prepare = model.func.prepare
    model.func._is_replica = True
    model.func.prepare = lambda *inputs: made.append(prepare(*inputs)) or made[-1]
    model.deq.graphs = Graphs()
    with pytest.warns(DEQWarning, match="no CUDA graph: f has no source"):
        model(*words(seed=0), [], f_thres=3, b_thres=3)
    assert not hasattr(made[0], "source")
