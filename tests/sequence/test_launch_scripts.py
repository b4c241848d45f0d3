"""The launch scripts: the published settings, and both of their modes on a small text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attempts import Attempt
from deq_sequence.options import parse
from lib.runs.run_folder import read_metrics

ROOM = Path(__file__).parents[2] / "DEQ-Sequence"
RUNS = json.loads((Path(__file__).parents[1] / "data" / "lm_runs.json").read_text())
SMALL = """
    --d_model 64 --n_head 2 --d_head 32 --d_embed 64 --d_inner 64 --batch_size 4 --gpu0_bsz 1
    --tgt_len 8 --mem_len 8 --eval_tgt_len 8 --pretrain_steps 6 --max_step 12 --warmup_step 5
    --f_thres 5 --b_thres 5 --log-interval 3 --max_eval_steps 4 --num_threads 1
"""


def launch(script, *arguments, python=sys.executable, cwd=None, **variables):
    return subprocess.run(
        ["bash", str(ROOM / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "NPROC": "", "TORCHRUN": "", "PYTHON": str(python), **variables},
    )


@pytest.fixture
def show(tmp_path):
    """Run a script with an interpreter that prints its arguments, one a line."""
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)

    def run(script, *arguments, torchrun=(), **variables):
        done = launch(script, *arguments, python=stub, cwd=tmp_path, **variables)
        assert done.returncode == 0
        assert done.stderr == ""
        folder, *words = done.stdout.splitlines()
        launcher, (command, *flags) = words[: len(torchrun)], words[len(torchrun) :]
        assert launcher == list(torchrun)
        assert Path(folder) == ROOM
        assert (Path(folder) / command).is_file()
        return flags

    return run


def as_dict(flags):
    """{flag: value, or True}, refusing a flag that is given twice."""
    found, name = {}, None
    for word in flags:
        if word.startswith("--"):
            assert word not in found
            name, found[word] = word, True
        else:
            assert found[name] is True
            found[name] = word
    return found


def test_there_is_a_script_for_each_published_run():
    assert sorted(p.name for p in ROOM.glob("wt103_*.sh")) == sorted(RUNS)


@pytest.mark.parametrize("script", RUNS)
def test_published_settings(show, script):
    settings = as_dict(show(script, "train"))
    name = settings.pop("--name")
    assert script == f"{name}.sh"
    assert settings == RUNS[script]
    evaluated = {"--eval": True, "--name": name}
    gpus = {flag: settings[flag] for flag in ("--multi_gpu", "--gpu0_bsz")}
    assert as_dict(show(script, "eval")) == evaluated | gpus  # all else is as in the run
    for load in (["--load", "a"], ["--load=a"]):
        found = as_dict(show(script, "eval", *load))
        assert found.pop(load[0], "a") == ("a" if len(load) == 2 else True)
        assert found == settings | evaluated


@pytest.mark.parametrize("script", RUNS)
def test_flags_after_the_mode_override(show, script):
    flags = show(script, "train", "--max_step", "7", "--data", "a folder")
    args = parse(flags)
    assert (args.max_step, args.data) == (7, "a folder")


def test_state_tracking(show):
    """The script's own settings, with any group: nothing else has to be given."""
    args = parse(show("state_tracking.sh", "train", "--dataset", "state:A5", "--max_step", "7"))
    assert (args.dataset, args.max_step, args.eval) == ("state:A5", 7, False)
    assert args.name == "state_tracking"
    assert args.local_size == 2  # further words reach a position by iterations alone
    evaluated = {"--eval": True, "--name": "state_tracking", "--dataset": "state:A5"}
    assert as_dict(show("state_tracking.sh", "eval", "--dataset", "state:A5")) == evaluated


TORCHRUN = ["-m", "torch.distributed.run"]
ONE_MACHINE = ["--standalone", "--nproc_per_node=4"]
TWO_MACHINES = ["--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=host0:29400"]
BY_TORCHRUN = [
    ({"NPROC": "4"}, ONE_MACHINE),
    ({"TORCHRUN": " ".join(TWO_MACHINES)}, TWO_MACHINES),
    ({"TORCHRUN": " ".join(TWO_MACHINES), "NPROC": "3"}, TWO_MACHINES),
]


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize(("variables", "flags"), BY_TORCHRUN)
def test_the_same_settings_under_torchrun(show, script, variables, flags):
    """But for those of the one process that uses all GPUs."""
    published = {**RUNS[script], "--name": script.removesuffix(".sh")}
    del published["--multi_gpu"], published["--gpu0_bsz"]
    weights = ["--load", "a"]
    for mode, words, more in (
        ("train", [], {}),
        ("eval", weights, {"--eval": True, "--load": "a"}),
    ):
        found = as_dict(show(script, mode, *words, torchrun=[*TORCHRUN, *flags], **variables))
        assert found == published | more
    found = show(script, "train", "--data", "a folder", torchrun=[*TORCHRUN, *flags], **variables)
    assert found[-2:] == ["--data", "a folder"]


def test_empty_variables_mean_one_process(show):
    script = next(iter(RUNS))
    assert show(script, "train", NPROC="", TORCHRUN="") == show(script, "train")


@pytest.mark.parametrize("script", RUNS)
@pytest.mark.parametrize("arguments", [[], ["test"], ["--max_step", "7"]])
def test_usage(script, arguments):
    done = launch(script, *arguments, python="false")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == f"usage: bash {script} train|eval [flags of train_transformer.py]"


def results(output, mark):
    """What the command says of each text at the end."""
    lines = [line.split(" | ") for line in output.splitlines() if mark in line]
    return {line[1]: line[2:] for line in lines}


@pytest.mark.parametrize(
    "script",
    [
        script if "_deq_transformer_reg" in script else pytest.param(script, marks=pytest.mark.slow)
        for script in RUNS
    ],
)
def test_train_and_eval(script, corpus_folder, tmp_path, show, server):
    """What a script runs; it is forked, where the script would start an interpreter."""
    places = ["--data", corpus_folder, "--work_dir", tmp_path / "runs"]

    def forked(mode, *more):
        command = ["train_transformer.py", *show(script, mode, *places, *SMALL.split(), *more)]
        with Attempt(command, server=server, folder=ROOM) as attempt:
            assert attempt.wait() == 0, attempt.errors()
            return "\n".join(attempt.lines), attempt.errors()

    trained, said = forked("train")
    assert said.splitlines() == ["no GPU is available: --cuda and --multi_gpu have no effect"]
    folder = tmp_path / "runs-wt103" / script.removesuffix(".sh")
    records = read_metrics(folder)
    assert [r["step"] for r in records if r["kind"] == "train"] == [3, 6, 9, 12]
    phases = [(r["step"], r["phase"]) for r in records if r["kind"] == "valid"]
    assert phases == [(6, "stacked"), (12, "equilibrium")]
    final = results(trained, "end of training | ")
    assert set(final) == {"valid", "test"}
    assert all("ppl" in found[0] for found in final.values())

    evaluated, _ = forked("eval")
    assert results(evaluated, str(folder / "model.pt")) == final

    if script == "wt103_deq_transformer_reg.sh":
        restarted, _ = forked("train", "--restart", "--max_step", 14, "--log-interval", 1)
        assert re.search(r"continuing \S+ at step 12$", restarted, re.MULTILINE)
        steps = [r["step"] for r in read_metrics(folder) if r["kind"] == "train"]
        assert steps == [3, 6, 9, 12, 13, 14]
