"""compare_ties.py on a tiny text: its tables, what it keeps, and what it refuses."""

import json
import random

import compare_ties
import pytest
import torch

from deq_sequence.command import main as train_main
from deq_sequence.text import demo_corpus

TINY = """
    --dataset wt103 --d_model 8 --n_head 2 --d_head 4 --d_inner 8 --init_std 0.2
    --n_layer 1 --eval_n_layer 1 --adaptive --cutoffs 4 9 --div_val 2 --max_eval_steps 2
    --tgt_len 4 --mem_len 4 --batch_size 2 --eval_batch_size 2 --f_thres 3 --b_thres 3 --lr 0.01
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command in this process, on words drawn at random, in a folder that stays."""
    rng, out = random.Random(0), tmp_path / "ties"
    for split in ("train", "valid", "test"):
        path = out / "text" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = rng.choices([f"w{i}" for i in range(20)], range(20, 0, -1), k=400)
        path.write_text(" ".join(["<unk>", *[f"w{i}" for i in range(20)], *words]))
    trained = []

    def here(function, flags):
        trained.append(flags[flags.index("--name") + 1])
        function(flags)

    monkeypatch.setattr(compare_ties, "in_new_process", here)
    monkeypatch.setattr(compare_ties, "_texts", lambda out: dict.fromkeys(PLANS, out / "text"))
    PLANS = {"quickstart": TINY + " --grad jfb", "small": TINY}
    monkeypatch.setattr(compare_ties, "PLANS", PLANS)
    monkeypatch.setattr(compare_ties, "LAST", 10)

    def run(*more):
        trained.clear()
        code = compare_ties.main(["--steps", "12", "--out", str(out), *more])
        return code, list(trained)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def test_the_command(command, tmp_path, capsys):
    code, trained = command("--seeds", "1", "1")
    assert code == 0
    assert trained == [
        f"{plan}-{mode}-1"
        for plan in ("quickstart", "small")
        for mode in ("apart", "shared", "storage")
    ]
    found = json.loads((tmp_path / "ties/ties.json").read_text())
    printed = capsys.readouterr().out
    assert (tmp_path / "ties/ties.md").read_text().strip() in printed
    for row in found["runs"]:
        assert 1 < row["loss"] < 5
        assert all(2 < row[split] < 200 for split in ("valid", "test"))
        assert (row["adjoint_residual"] is None) == (row["plan"] == "quickstart")
    # All ways start from the same weights; then they differ.
    first = {}
    for path in (tmp_path / "ties/runs-wt103").glob("small-*-1/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [r["loss"] for r in records if r["kind"] == "train"]
        assert len(steps) == 12
        first[path.parent.name] = steps
    assert len({losses[0] for losses in first.values()}) == 1
    assert len({losses[-1] for losses in first.values()}) == 3
    # Nothing is trained twice.
    assert command("--seeds", "1") == (0, [])
    assert json.loads((tmp_path / "ties/ties.json").read_text())["runs"] == found["runs"]


def test_a_run_that_was_cut_off_goes_on(command, stop_at, tmp_path):
    few = ("--only", "small", "--modes", "storage", "--seeds", "3")
    stop_at(7)
    assert command(*few)[0] == 130
    assert command(*few) == (0, ["small-storage-3"])
    whole = json.loads((tmp_path / "ties/ties.json").read_text())["runs"]
    (tmp_path / "ties/runs-wt103").rename(tmp_path / "elsewhere")
    assert command(*few)[0] == 0
    assert json.loads((tmp_path / "ties/ties.json").read_text())["runs"] == whole


def test_how_weights_load():
    found = {(row["mode"], row["differ"]): row["outcome"] for row in compare_ties.loading()}
    for mode in ("apart", "shared", "storage"):
        assert found[mode, False] == "loads, every value as saved"
    assert found["apart", True] == "loads, every value as saved"
    for mode in ("shared", "storage"):
        said = "refused: weights.pt: crit.out_projs.1.weight differs from word_emb.emb_projs.1.w"
        assert found[mode, True].startswith(said)


def test_runs_of_other_settings_are_refused(command, capsys):
    few = ("--only", "small", "--modes", "apart", "--seeds", "1")
    assert command(*few)[0] == 0
    assert command(*few, "--steps", "16") == (2, [])
    error = capsys.readouterr().err
    assert "small-apart-1 has other settings (max_step, pretrain_steps): choose another" in error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--only", "digits"], "digits"),
        (["--modes", "glued"], "glued"),
        (["--seeds", "-1"], "--seed is -1"),
        (["--steps", "9"], "--steps is 9"),
    ],
)
def test_bad_arguments(command, capsys, argv, named):
    code, trained = command(*argv)
    assert (code, trained) == (2, [])
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_each_plan_has_its_own_text(tmp_path, monkeypatch):
    def texts(min_count=None):
        return {split: f"{split} {min_count}\n" for split in demo_corpus.SPLITS}

    monkeypatch.setattr(compare_ties, "demo_texts", texts)
    monkeypatch.setattr(demo_corpus, "demo_texts", texts)
    folders = compare_ties._texts(tmp_path)
    assert (folders["quickstart"] / "valid.txt").read_text() == "valid None\n"
    assert (folders["small"] / "test.txt").read_text() == "test 2\n"


def test_the_settings_tie_projections(tmp_path):
    """All plans: else the three ways would be one."""
    for plan in compare_ties.PLANS:
        data = dict.fromkeys(compare_ties.PLANS, tmp_path)
        options = compare_ties.parse(["--out", str(tmp_path)])
        flags = compare_ties._flags(plan, "shared", 1, data, options)
        args = compare_ties.parse_flags(flags)  # refused where it would have no effect
        assert args.tie_proj_mode == "shared"
        assert train_main([*flags, "--tie_proj_mode", "glued"]) == 2
