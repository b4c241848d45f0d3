"""bench_graph.py on a CPU, in tiny sizes: its figures, and that a failure stops no other form."""

import json
from argparse import Namespace

import bench_graph
import pytest
import torch
from torch.utils._pytree import tree_map

from lib.graphs import Graphs
from lib.solvers.maps import transformed
from recorded_graphs import OnCpu

pytestmark = pytest.mark.filterwarnings("ignore::lib.deq.DEQWarning")


def bench(tmp_path, *argv) -> tuple[int, dict]:
    path = tmp_path / "found.json"
    flags = ["--device", "cpu", "--rounds", "1", "--json", str(path)]
    code = bench_graph.main([*flags, "--settings", "wt103_deq_transformer_reg", *argv])
    return code, json.loads(path.read_text())["settings"]["wt103_deq_transformer_reg"]


@pytest.mark.slow
def test_forms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_graph, "WARMUP", 1)
    inside = bench_graph.Setting._inside

    def failing(self, form):
        inside(self, form) if form != "unread" else {}["nothing"]

    monkeypatch.setattr(bench_graph.Setting, "_inside", failing)
    code, found = bench(tmp_path, "--without", "plain,graph-unread,graph-bf16,compile")
    assert code == 0
    assert list(found) == ["fast", "unread", "graph"]
    assert found["graph"]["gradient"] == found["fast"]["gradient"] == 0
    assert found["unread"]["error"] == "KeyError: 'nothing'"
    assert all(figures["ms"] > 0 for figures in found.values())
    printed = capsys.readouterr().out
    assert "wt103_deq_transformer_reg, unread:\nTraceback" in printed
    assert "| graph " in printed


class Off(Graphs):
    """f with relative noise of a size."""

    size = 1.2e-7

    def of(self, f):
        random = torch.Generator().manual_seed(7)

        def changed(t):
            return t * (1 + self.size * torch.randn(t.shape, generator=random))

        return transformed(f, lambda f: lambda z: tree_map(changed, f(z)))


class FarOff(Off):
    size = 1e-4


class Stale(OnCpu):
    """Copies what f holds only once."""

    def _recorded(self, inputs, steps):
        form, user = super()._recorded(inputs, steps), object()
        return lambda _, fixed, moving: form(user, fixed, moving)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(OnCpu, 0, 0), (Off, 0.1, 20), (FarOff, 100, torch.inf), (Stale, 100, torch.inf)],
)
def test_the_comparison_tells_a_mistake_from_rounding(kind, least, most):
    args = Namespace(device=torch.device("cpu"), without="", rounds=0)
    setting = bench_graph.Setting("cifar/cls_mdeq_TINY", args, deadline=0)
    setting.found["graph"], setting.graphs = {}, kind()
    setting._build(with_plain=False)
    setting._compare(["graph"])
    found = setting.found["graph"]
    assert "error" not in found
    assert least <= found["times"] <= most
    assert found["spread"] < 1e-4  # the solves end


def test_no_time(tmp_path, capsys):
    code = bench_graph.main(["--device", "cpu", "--seconds", "0"])
    assert code == 0
    assert "cifar/cls_mdeq_TINY: left out, no time left" in capsys.readouterr().out
