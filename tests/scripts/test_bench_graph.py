"""bench_graph.py on a CPU, in tiny sizes: its figures, and that a failure stops no other form."""

import json
from argparse import Namespace

import bench_graph
import pytest
import torch
from torch.utils._pytree import tree_map

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


class Off:
    """Takes the place of graphs: f with relative noise of a size."""

    def __init__(self, size: float):
        self.size, self.random = size, torch.Generator().manual_seed(7)

    def of(self, f):
        def changed(t):
            return t * (1 + self.size * torch.randn(t.shape, generator=self.random))

        return transformed(f, lambda f: lambda z: tree_map(changed, f(z)))


def test_the_comparison_tells_a_mistake_from_rounding():
    args = Namespace(device=torch.device("cpu"), without="", rounds=0)
    setting = bench_graph.Setting("cifar/cls_mdeq_TINY", args, deadline=0)
    setting.found["graph"] = {}
    setting._build(with_plain=False)

    def compared(graphs) -> dict:
        setting.graphs = graphs
        setting._compare(["graph"])
        return setting.found["graph"]

    for size, low, high in ((1.2e-7, 0.1, 20), (1e-4, 100, torch.inf)):
        found = compared(Off(size))
        assert low < found["times"] < high
        assert found["spread"] < 1e-4  # the solves end
    graphs = OnCpu()
    found = compared(graphs)
    assert found["gradient"] == found["times"] == 0
    assert graphs.replays
    assert None not in graphs._forms.values()


def test_no_time(tmp_path, capsys):
    code = bench_graph.main(["--device", "cpu", "--seconds", "0"])
    assert code == 0
    assert "cifar/cls_mdeq_TINY: left out, no time left" in capsys.readouterr().out
