"""A run that was stopped and restarted is, bit for bit, the one that was not.

Runs that are killed: tests/faults/test_kills.py.
"""

import json
import os
import shutil

import pytest
import torch

from deq_sequence.command import main
from lib.runs.checkpoint import load
from lib.runs.retention import versions
from lib.runs.run_folder import CHECKPOINT, LOG, SETTINGS, WEIGHTS, own, read_metrics

# Everything that draws random numbers or carries state from step to step.
STATEFUL = """
    --dropout 0.1 --dropatt 0.1 --jac_loss_weight 1 --jac_loss_freq 0.5 --rand_f_thres_delta 2
    --batch_chunk 2 --warmup_step 3 --wnorm --save-interval 3 --max_eval_steps 2
""".split()


def losses(folder):
    """(kind, step, loss) of every record: training, validation, and the end."""
    return [(r["kind"], r["step"], r.get("loss")) for r in read_metrics(folder)]


def assert_same_run(one, two):
    assert losses(one) == losses(two)
    for name in (WEIGHTS, CHECKPOINT):
        a, b = load(one / name), load(two / name)
        if name == CHECKPOINT:
            torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
            for key in ("format", "step", "epoch", "row", "best", "counts", "learning_rate"):
                assert a[key] == b[key]
            for key in ("mems", "random_states"):
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
            a, b = a["model"], b["model"]
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


# ---- stopped within the process, which is cheaper than a kill and as abrupt -------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """``undisturbed(flags)``: the folder of a run to its end, trained once for the same flags."""
    folders = {}

    def get(flags):
        at = flags.index("--work_dir")
        key = (*flags[:at], *flags[at + 2 :])
        if key not in folders:
            place = tmp_path_factory.mktemp("undisturbed")
            assert main([*flags, "--work_dir", str(place / "runs"), "--name", "whole"]) == 0
            folders[key] = place / "runs-wt103" / "whole"
        return folders[key]

    return get


# Options that do not exclude each other, several at a time.
TOGETHER = [
    "--varlen --tgt_len 200 --optim RAdam --jac_incremental 2",
    "--optim RMSprop --amp bf16 --pre_lnorm --mem_len 0",
    "--scheduler dev_perf --decay_rate 0.9 --eval-interval 2 --optim SGD --clip_nonemb "
    "--adaptive --div_val 2 --tie_proj_mode storage",
    "--adaptive --div_val 2 --optim Adagrad --not_tied --save-interval 1",
    "--optim Muon --weight_decay 0.01 --f_start learned --eval_state value",
]
AROUND = [("", stop) for stop in (4, 5, 6, 8)]  # the border is 5; 3, 5 and 6 are saved


@pytest.mark.parametrize(("more", "stop"), [*AROUND, *((more, 8) for more in TOGETHER)])
def test_stopped_and_restarted(flags, run_folder, undisturbed, stop_at, more, stop):
    flags = [*flags, *STATEFUL, "--max_step", "9", "--pretrain_steps", "5", *more.split()]
    whole = undisturbed(flags)
    stop_at(stop)
    assert main(flags) == 130
    before = load(run_folder / CHECKPOINT)["step"]
    assert before < stop
    assert main([*flags, "--restart"]) == 0
    assert_same_run(run_folder, whole)


def test_means_of_the_log_survive(flags, run_folder, stop_at):
    """A log line that covers steps before and after the restart is the uninterrupted one's."""
    flags = [*flags, *STATEFUL, "--max_step", "9", "--log-interval", "4"]
    assert main([*flags, "--name", "whole"]) == 0
    stop_at(8)
    assert main(flags) == 130
    assert load(run_folder / CHECKPOINT)["step"] == 6
    assert main([*flags, "--restart"]) == 0
    found, expected = (
        [
            {k: v for k, v in r.items() if not k.endswith(("_per_s", "_mib"))}
            for r in read_metrics(folder)
        ]
        for folder in (run_folder, run_folder.parent / "whole")
    )
    assert found == expected


# ---- going on --------------------------------------------------------------------------------


@pytest.fixture
def finished(flags, run_folder, undisturbed):
    """The command line of a finished run."""
    shutil.copytree(undisturbed(flags), run_folder)
    return flags


def test_a_finished_run_is_only_evaluated(finished, run_folder, capsys):
    weights = load(run_folder / WEIGHTS)
    trained = [r for r in losses(run_folder) if r[0] in ("train", "valid")]
    finals = {r for r in losses(run_folder) if r[0].startswith("final")}
    assert main([*finished, "--restart"]) == 0
    assert f"continuing {run_folder / CHECKPOINT} at step 6" in capsys.readouterr().out
    assert [r for r in losses(run_folder) if r[0] in ("train", "valid")] == trained
    assert {r for r in losses(run_folder) if r[0].startswith("final")} == finals
    again = load(run_folder / WEIGHTS)
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_finished_run_has_one_final_record_of_each_text(finished, run_folder):
    assert main([*finished, "--restart", "--max_step", "8"]) == 0
    assert [r["kind"] for r in read_metrics(run_folder) if r["kind"].startswith("final")] == [
        "final_valid",
        "final_test",
    ]


def test_more_steps(flags, run_folder, capsys):
    constant = ["--scheduler", "constant"]
    assert main([*flags, *constant, "--max_step", "9", "--name", "whole"]) == 0
    assert main([*flags, *constant]) == 0
    assert main([*flags, *constant, "--restart", "--max_step", "9"]) == 0
    assert "changed since" not in capsys.readouterr().out  # more steps are what a restart is for
    whole, run = (
        [r for r in losses(folder) if r[0] == "train"]
        for folder in (run_folder.parent / "whole", run_folder)
    )
    assert run == whole


def test_restart_dir(finished, run_folder, capsys):
    moved = run_folder.rename(run_folder.parent / "moved")
    arguments = ["--name", "N/A", "--restart", "--restart_dir", str(moved), "--max_step", "7"]
    assert main([*finished, *arguments]) == 0
    assert [step for kind, step, _ in losses(moved) if kind == "train"] == list(range(1, 8))
    assert os.listdir(run_folder.parent) == ["moved"]


def test_changed_settings_are_named_and_saved(finished, run_folder, capsys):
    more = ["--lr", "0.004", "--max_step", "7", "--max_eval_steps", "3"]
    assert main([*finished, "--restart", *more]) == 0
    found = capsys.readouterr().out
    assert "changed since the checkpoint: --lr from 0.01 to 0.004" in found
    # The best score so far was measured with the former.
    assert "changed since the checkpoint: --max_eval_steps from 4 to 3" in found
    assert "--lr from 0.01 to 0.004" in (run_folder / LOG).read_text()
    assert json.loads((run_folder / SETTINGS).read_text())["lr"] == 0.004
    assert [r["lr"] < 0.004 for r in read_metrics(run_folder) if r["step"] == 7 and "lr" in r] == [
        True
    ]


def test_changed_rounding_is_named(finished, capsys):
    assert main([*finished, "--restart", "--tf32", "--amp", "bf16", "--max_step", "7"]) == 0
    found = capsys.readouterr().out
    assert "changed since the checkpoint: --tf32 from False to True" in found
    assert "changed since the checkpoint: --amp from 'none' to 'bf16'" in found


def test_changed_cutoffs_are_named(flags, capsys):
    """Of the same number, so with the same shapes: nothing else would show it."""
    adaptive = [*flags, "--adaptive", "--cutoffs"]
    assert main([*adaptive, "20", "40"]) == 0
    assert main([*adaptive, "20", "50", "--restart", "--max_step", "7"]) == 0
    assert "--cutoffs from [20, 40] to [20, 50]" in capsys.readouterr().out


def test_a_changed_weight_decay_takes_effect(finished, run_folder):
    assert main([*finished, "--restart", "--weight_decay", "0.5", "--max_step", "7"]) == 0
    (group,) = load(run_folder / CHECKPOINT)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


# ---- refused ---------------------------------------------------------------------------------


@pytest.fixture
def refused(flags, run_folder, capsys):
    """Restart with flags that cannot be continued with; the line that says so."""

    def restart(*more):
        files = {p.name: p.read_bytes() for p in run_folder.glob("*")}
        capsys.readouterr()
        assert main([*flags, "--restart", "--max_step", "9", *more]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert {p.name: p.read_bytes() for p in run_folder.glob("*")} == files
        return line

    return restart


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--d_inner 64", "shape"),
        ("--d_model 32 --d_head 16", "shape"),
        ("--wnorm", "missing"),
        ("--adaptive --div_val 2", "missing"),
        ("--batch_size 2", "--batch_size"),
        ("--optim SGD", "--optim"),
        ("--seed 5", "with --seed 1111, and this run has 5"),
        ("--not_tied", "with --not_tied False, and this run has True"),
        ("--init_std 0.5", "--init_std 0.5 has no effect on a run that goes on"),
        ("--start_train_steps 2", "it began with 0"),
    ],
)
def test_settings_that_a_restart_cannot_change(finished, refused, more, named):
    assert named in refused(*more.split())


def test_restart_without_a_run(refused, run_folder):
    assert f"{run_folder} holds no run: check --name" in refused()
    assert not run_folder.exists()


def test_restart_of_a_run_that_goes_on(finished, refused, run_folder):
    """The checkpoint is not even read: its owner may be about to write a newer one."""
    (run_folder / CHECKPOINT).write_bytes(b"")
    with own(run_folder):
        assert f"{run_folder} is in use by process {os.getpid()} on " in refused()


def test_restart_of_a_run_that_saved_nothing(flags, run_folder, undisturbed, stop_at, capsys):
    """It begins anew, as every message says; without the flag its files are safe."""
    stop_at(2)
    assert main(flags) == 130
    assert "interrupted (--restart continues the run)" in capsys.readouterr().err
    assert versions(run_folder / CHECKPOINT) == []
    before = (run_folder / LOG).read_bytes()
    assert main(flags) == 2
    assert f"{run_folder} already holds a run: add --restart" in capsys.readouterr().err
    assert (run_folder / LOG).read_bytes() == before
    assert main([*flags, "--restart"]) == 0
    assert_same_run(run_folder, undisturbed(flags))


@pytest.fixture
def alone(finished, run_folder):
    """With a checkpoint before it, the run would go on from that one (tests/faults)."""
    for older in versions(run_folder / CHECKPOINT)[1:]:
        older.unlink()


@pytest.mark.usefixtures("alone")
def test_restart_of_other_weights(refused, run_folder):
    """model.pt in the place of checkpoint.pt."""
    (run_folder / CHECKPOINT).write_bytes((run_folder / WEIGHTS).read_bytes())
    assert "not a checkpoint of this trainer" in refused()


@pytest.mark.parametrize("entry", ["fixed", "mems", "window", "random_states", "model"])
@pytest.mark.usefixtures("alone")
def test_restart_of_a_checkpoint_that_lacks_an_entry(refused, run_folder, entry):
    """Such as one of an earlier version under the same format number."""
    state = load(run_folder / CHECKPOINT)
    del state[entry]
    torch.save(state, run_folder / CHECKPOINT)
    assert str(run_folder / CHECKPOINT) in refused()


def test_restart_with_damaged_settings(finished, refused, run_folder):
    (run_folder / SETTINGS).write_text("{")
    assert str(run_folder / SETTINGS) in refused()


def test_restart_with_another_text(finished, refused, tmp_path, corpus_folder):
    short = tmp_path / "short"
    short.mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (short / name).write_text((corpus_folder / name).read_text()[:3000])
    assert "was saved with the vocabulary 161 types" in refused("--data", str(short))


@pytest.mark.parametrize("what", ["the text of", "the vocabulary"])
def test_restart_with_a_text_that_was_replaced(flags, refused, run_folder, undisturbed, what):
    """In place: by one with as many words, all of the vocabulary, or by one of other words."""
    own = run_folder.parents[1] / "own"
    shutil.copytree(flags[flags.index("--data") + 1], own)
    shutil.copytree(undisturbed(flags), run_folder)
    texts = {path: path.read_text() for path in own.glob("*.txt")}
    for path, text in texts.items():
        if what == "the vocabulary":
            path.write_text(text.replace("w", "v"))
        elif path.name == "valid.txt":  # whose words are not counted
            path.write_text(text.replace(" w7 ", " w8 ", 1))
    assert f"was saved with {what} " in refused("--data", str(own))


def test_a_checkpoint_from_before_the_text_was_told(finished, run_folder):
    state = load(run_folder / CHECKPOINT)
    for name in ("the text of", "--seed", "--not_tied"):
        del state["fixed"][name]
    torch.save(state, run_folder / CHECKPOINT)
    assert main([*finished, "--restart", "--max_step", "7"]) == 0


@pytest.mark.parametrize("same", [True, False])
def test_characters_that_were_counted_in_the_training_text_alone(
    flags, run_folder, tmp_path, capsys, same
):
    """So they once were: where that gave other ids, a checkpoint of then means other bytes."""
    texts = {"train": "aaaabbbccd" * 40, "valid": "ab" * 99, "test": "abcd" * 30}
    if not same:
        texts["valid"] = "b" * 900
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    flags += ["--data", str(tmp_path), "--dataset", "text8"]
    assert main(flags) == 0
    file = run_folder.parents[1] / "runs-text8" / "run" / CHECKPOINT
    state = load(file)
    assert state["fixed"].pop("the vocabulary").startswith("4 types (")
    torch.save(state, file)
    if same:
        assert main([*flags, "--restart", "--max_step", "7"]) == 0
    else:
        assert main([*flags, "--restart", "--max_step", "7"]) == 2
        said = "saved with the vocabulary of the training text alone, and this run has 4 types"
        assert said in capsys.readouterr().err
