"""bench_graph.py on a CPU, in tiny sizes: its figures, and that a failure stops no other form."""

import json

import bench_graph
import pytest

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


def test_no_time(tmp_path, capsys):
    code = bench_graph.main(["--device", "cpu", "--seconds", "0"])
    assert code == 0
    assert "cifar/cls_mdeq_TINY: left out, no time left" in capsys.readouterr().out
