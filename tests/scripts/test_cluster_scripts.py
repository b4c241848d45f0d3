"""multinode.sh and slurm.sh with stand-ins for Python and Slurm; run_progress.py; a real run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import run_progress

from lib.runs.run_folder import METRICS, read_metrics
from small_runs import SCENES, TINY_SCENES

ROOT = Path(__file__).resolve().parents[2]
# Notes folder, variables of torch and arguments, then does what $STUBS/<name> says.
STUB = """#!/bin/sh
name=$(basename "$0")
{
    echo "== $name"; pwd; echo $(env | grep -E '^(OMP|TORCH)_' | sort); printf '%s\\n' "$@"
} >>"$STUBS/calls"
case "$1" in */run_progress.py) name=progress ;; esac
[ ! -f "$STUBS/$name" ] || . "$STUBS/$name"
"""
TORCHRUN = ["-m", "torch.distributed.run"]
WORDS = ("DEQ-Sequence", ["train_transformer.py"], ["--auto_restart"])
LAUNCH = ("DEQ-Sequence", ["wt103_deq_transformer.sh", "train"], ["--auto_restart"])
CLS = ("MDEQ-Vision", ["tools/cls_train.py"], ["AUTO_RESUME", "True"])
SEG = ("MDEQ-Vision", ["tools/seg_train.py"], ["AUTO_RESUME", "True"])
TRAINING = [
    (["train_transformer.py"], WORDS),
    (["python", "train_transformer.py"], WORDS),
    (["python", "DEQ-Sequence/train_transformer.py"], WORDS),
    (["bash", "wt103_deq_transformer.sh", "train"], LAUNCH),
    (["DEQ-Sequence/wt103_deq_transformer.sh", "train"], LAUNCH),
    (["python", "tools/cls_train.py"], CLS),
    (["python", "MDEQ-Vision/tools/cls_train.py"], CLS),
    (["python", "tools/seg_train.py"], SEG),
]
ODD = ["--data", "a folder", "", "*", "$HOME", '--work_dir=it\'s "here"']


class Cluster:
    """A PATH of stand-ins; ``run`` gives what was run and what each stand-in was called with."""

    def __init__(self, folder: Path):
        self.stubs = folder / "stubs"
        self.stubs.mkdir()
        for name in ("python", "srun", "scontrol", "squeue", "nproc"):
            (self.stubs / "bin").mkdir(exist_ok=True)
            (self.stubs / "bin" / name).write_text(STUB)
            (self.stubs / "bin" / name).chmod(0o755)
        self.does("nproc", "echo 16")

    def does(self, name, code):
        (self.stubs / name).write_text(code + "\n")

    def run(self, script, *words, cwd=ROOT, **variables):
        (self.stubs / "calls").write_text("")
        path = f"{self.stubs / 'bin'}:/usr/bin:/bin"
        self.done = subprocess.run(
            ["bash", str(script), *words],
            cwd=cwd,
            env={"PATH": path, "STUBS": str(self.stubs), **variables},
            capture_output=True,
            text=True,
        )
        self.calls = {}
        for call in (self.stubs / "calls").read_text().split("== ")[1:]:
            name, folder, variables, *arguments = call.split("\n")[:-1]
            self.calls.setdefault(name, []).append((folder, variables, arguments))
        return self.done

    def python(self):
        """Folder, variables and arguments of the only Python that trains."""
        progress = str(ROOT / "scripts/cluster/run_progress.py")
        (call,) = (c for c in self.calls["python"] if c[2][0] != progress)
        return call

    def refuses(self, *words):
        """The last run ended with exit code 2 and one line, which holds ``words``."""
        assert self.done.returncode == 2
        assert self.done.stdout == ""
        (line,) = self.done.stderr.splitlines()
        for word in words:
            assert word in line


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.fixture
def machine(cluster, tmp_path):
    """multinode.sh from an unrelated folder: what Python is called with."""

    def run(*words, **variables):
        done = cluster.run(ROOT / "scripts/cluster/multinode.sh", *words, cwd=tmp_path, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        return cluster.python()

    return run


def test_scripts_parse():
    for path in ROOT.glob("*/*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


# ---- multinode.sh ------------------------------------------------------------------------------


def test_one_machine(machine):
    folder, variables, arguments = machine("python", "train_transformer.py", *ODD, GPUS="4")
    assert arguments == [
        *TORCHRUN,
        *"--nnodes=1 --nproc_per_node=4 --max_restarts=0 --standalone".split(),
        *["train_transformer.py", *ODD],
    ]
    assert Path(folder) == ROOT / "DEQ-Sequence"
    assert variables == "OMP_NUM_THREADS=4"  # 16 cores for 4 processes


def test_two_machines(machine):
    where = {"MASTER": "host0", "NODES": "2", "GPUS": "8"}
    folder, _, arguments = machine("python", "tools/seg_train.py", *ODD, **where)
    flags = "--nnodes=2 --nproc_per_node=8 --max_restarts=0 --rdzv_backend=c10d"
    rendezvous = ["--rdzv_endpoint=host0:29400", "--rdzv_id=deq"]
    expected = [*TORCHRUN, *flags.split(), *rendezvous, "tools/seg_train.py", *ODD]
    assert arguments == expected
    assert Path(folder) == ROOT / "MDEQ-Vision"

    more = {"PORT": "1234", "RUN_ID": "mine", "TORCHRUN": "--local_addr=10.0.0.1 --log_dir=logs"}
    _, _, arguments = machine("python", "tools/seg_train.py", *ODD, **where, **more)
    rendezvous = ["--rdzv_endpoint=host0:1234", "--rdzv_id=mine", *more["TORCHRUN"].split()]
    assert arguments == [*TORCHRUN, *flags.split(), *rendezvous, "tools/seg_train.py", *ODD]


def test_a_machine_can_be_replaced(machine):
    """Which torchrun does not do by itself where its processes share its store."""
    words = ["python", "tools/seg_train.py"]
    many = {"MASTER": "host0", "NODES": "2", "GPUS": "1"}
    variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert variable not in machine(*words, **many)[1]
    assert variable in machine(*words, **many, RESTARTS="1")[1]


def test_launch_script(machine):
    """It runs torchrun itself, with its settings between."""
    words = ["bash", "wt103_deq_transformer.sh", "train", *ODD]
    _, _, arguments = machine(*words, MASTER="host0", NODES="2", GPUS="4", AUTO_RESTART="1")
    flags = "--nnodes=2 --nproc_per_node=4 --max_restarts=0 --rdzv_backend=c10d"
    head = [*TORCHRUN, *flags.split(), "--rdzv_endpoint=host0:29400", "--rdzv_id=deq"]
    assert arguments[: len(head) + 1] == [*head, "train_transformer.py"]
    tail = ["--name", "wt103_deq_transformer", "--auto_restart", *ODD]
    assert arguments[-len(tail) :] == tail
    assert not {"--multi_gpu", "--gpu0_bsz", "train"} & set(arguments)


@pytest.mark.parametrize(("words", "expected"), TRAINING)
def test_what_continues_a_run(machine, words, expected):
    room, (file, *_), resume = expected
    file = "train_transformer.py" if file.endswith(".sh") else file
    for variables, flags in [
        ({}, []),
        ({"AUTO_RESTART": "0"}, []),
        ({"AUTO_RESTART": "1"}, resume),
        ({"RESTARTS": "3"}, resume),
        ({"RESTARTS": "3", "MAX_TIME": "90"}, [*resume, "--max_time", "90"]),
        ({"MAX_TIME": "7.5"}, ["--max_time", "7.5"]),
    ]:
        folder, _, arguments = machine(*words, "--last", GPUS="1", **variables)
        assert Path(folder) == ROOT / room
        assert f"--max_restarts={variables.get('RESTARTS', 0)}" in arguments
        assert file in arguments
        first = -1 - len(flags)
        assert arguments[first:] == [*flags, "--last"]
        assert not {*resume, "--max_time"} & set(arguments[:first])


def test_environment_is_left_alone(machine, cluster):
    words = ["python", "tools/cls_train.py"]
    assert machine(*words, GPUS="4", OMP_NUM_THREADS="7")[1] == "OMP_NUM_THREADS=7"
    assert machine(*words, GPUS="32")[1] == "OMP_NUM_THREADS=1"
    (cluster.stubs / "bin/python").rename(cluster.stubs / "bin/another")
    machine_python = {"PYTHON": str(cluster.stubs / "bin/another"), "GPUS": "1"}
    done = cluster.run(ROOT / "scripts/cluster/multinode.sh", *words, **machine_python)
    assert done.returncode == 0
    assert cluster.calls["another"][0][2][:2] == TORCHRUN


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "'' is none of the training commands"),
        (["python"], {}, "'' is none of the training commands"),
        (["python", "tools/cls_valid.py"], {}, "'cls_valid.py' is none of the training commands"),
        (["bash", "wt103_other.sh", "train"], {}, "there is no DEQ-Sequence/wt103_other.sh"),
        (["bash", "wt103_deq_transformer.sh", "eval"], {}, "is not training"),
        (["bash", "wt103_deq_transformer.sh"], {}, "is not training"),
        (["train_transformer.py"], {"GPUS": ""}, "GPUS is '', but must be a number, 1 or more"),
        (["train_transformer.py"], {"GPUS": "0"}, "GPUS is '0', but must be"),
        (["train_transformer.py"], {"NODES": "two"}, "NODES is 'two', but must be"),
        (["train_transformer.py"], {"NODES": "2"}, "2 machines need MASTER"),
        (["train_transformer.py"], {"RESTARTS": "-1"}, "RESTARTS is '-1', but must be"),
    ],
)
def test_bad_use_of_multinode(cluster, words, variables, said):
    cluster.run(ROOT / "scripts/cluster/multinode.sh", *words, **{"GPUS": "4", **variables})
    cluster.refuses("multinode: ", said)
    assert "python" not in cluster.calls


# ---- slurm.sh ----------------------------------------------------------------------------------

JOB = {
    "SLURM_JOB_ID": "4321",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
}


@pytest.fixture
def job(cluster, tmp_path):
    """slurm.sh as Slurm runs it: a copy in another folder, on node 7 of two.

    ``before`` and ``after`` are what run_progress.py finds, ``code`` is the training's.
    """
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / "scripts/cluster/slurm.sh").read_text())
    cluster.does("scontrol", '[ "$1" != show ] || printf "gpu07\\ngpu08\\n"')
    cluster.does("squeue", "echo 1-02:03:04")
    # The one node that this stands for; srun's own flags end where the command begins.
    cluster.does("srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
    cluster.does(
        "progress",
        'if [ -e "$STUBS/trained" ]; then echo "$AFTER"; else echo "$BEFORE"; fi',
    )
    cluster.does("python", '>"$STUBS/trained"; exit "$CODE"')

    def run(*words, before="new 0", after="finished 9", code=0, cwd=ROOT, **variables):
        (cluster.stubs / "trained").unlink(missing_ok=True)
        states = {"BEFORE": before, "AFTER": after, "CODE": str(code)}
        return cluster.run(copy, *words, cwd=cwd, **{**JOB, **states, **variables})

    return run


@pytest.mark.parametrize(("words", "expected"), TRAINING)
def test_job_of_two_nodes(job, cluster, words, expected):
    room, training, resume = expected
    done = job(*words, *ODD)
    assert (done.returncode, done.stderr) == (0, "")
    ((folder, _, arguments),) = cluster.calls["srun"]
    assert Path(folder) == ROOT
    flags = "--nodes=2 --ntasks=2 --cpus-per-task=32 --export=ALL --kill-on-bad-exit=0 --wait=180"
    assert arguments == [*flags.split(), "bash", "scripts/cluster/multinode.sh", *words, *ODD]

    folder, variables, arguments = cluster.python()
    assert Path(folder) == ROOT / room
    assert variables == "OMP_NUM_THREADS=4 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120"
    flags = "--nnodes=2 --nproc_per_node=4 --max_restarts=0 --rdzv_backend=c10d"
    rendezvous = ["--rdzv_endpoint=gpu07:24321", "--rdzv_id=4321-0"]
    head = [*TORCHRUN, *flags.split(), *rendezvous]
    assert arguments[: len(head)] == head
    # 26 hours and 3 minutes, less five minutes
    tail = [*resume, "--max_time", "1558", *ODD]
    assert arguments[-len(tail) :] == tail

    progress = [c for c in cluster.calls["python"] if "run_progress" in c[2][0]]
    assert len(progress) == 2
    for folder, _, arguments in progress:
        assert Path(folder) == ROOT / room
        assert arguments[1:] == [*training, *ODD]


def test_job_of_one_node_and_its_variables(job, cluster):
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "gpu07", "GPUS": "2"}
    done = job("python", "tools/cls_train.py", **one, RESTARTS="2", SLURM_RESTART_COUNT="5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--nodes=1" in cluster.calls["srun"][0][2]
    flags = "--nnodes=1 --nproc_per_node=2 --max_restarts=2 --standalone"
    resume = ["AUTO_RESUME", "True", "--max_time", "1558"]
    expected = [*TORCHRUN, *flags.split(), "tools/cls_train.py", *resume]
    assert cluster.python()[2] == expected

    job("python", "tools/cls_train.py", SLURM_RESTART_COUNT="5", PORT="99")
    rendezvous = {"--rdzv_endpoint=gpu07:99", "--rdzv_id=4321-5"}
    assert rendezvous <= set(cluster.python()[2])


@pytest.mark.parametrize(
    ("left", "variables", "expected"),
    [
        ("2-00:00:00", {}, "2875"),
        ("23:59:59", {}, "1434"),
        ("08:09:00", {}, "484"),
        ("45:00", {}, "40"),
        ("45:00", {"MARGIN": "15"}, "30"),
        ("45:00", {"MARGIN": "2.5"}, "42.5"),
        ("45:00", {"MARGIN": "08"}, "37"),
        ("1000-00:00:00", {"MARGIN": "010.25"}, "1439989.75"),
        ("45:00", {"MAX_TIME": "7.5"}, "7.5"),
        ("UNLIMITED", {}, None),
        ("NOT_SET", {}, None),
        ("", {}, None),
    ],
)
def test_time_limit(job, cluster, left, variables, expected):
    cluster.does("squeue", f"echo {left}")
    job("python", "tools/cls_train.py", **variables)
    arguments = cluster.python()[2]
    assert cluster.calls["squeue"][0][2] == ["-h", "-j", "4321", "-o", "%L"]
    after = arguments[arguments.index("tools/cls_train.py") + 3 :]
    assert after == ([] if expected is None else ["--max_time", expected])


def test_without_an_answer_of_squeue(job, cluster):
    cluster.does("squeue", "echo squeue: error: timed out >&2; exit 1")
    assert job("python", "tools/cls_train.py").returncode == 0
    assert "--max_time" not in cluster.python()[2]


REQUEUE = ["requeue", "4321"]


@pytest.mark.parametrize(
    ("before", "after", "code", "queued", "expected"),
    [
        ("new 0", "stopped 50", 0, True, 0),  # time limit
        ("stopped 50", "stopped 90", 1, True, 0),  # signal: torchrun's exit code is 1
        ("running 70", "stopped 60", 1, True, 0),  # had been killed long after its checkpoint
        ("finished 90", "stopped 95", 0, True, 0),  # with more steps to make than last time
        ("new 0", "finished 90", 0, False, 0),
        ("stopped 50", "finished 90", 0, False, 0),
        ("finished 90", "finished 90", 2, False, 2),  # refused: the state is an old one
        ("stopped 50", "stopped 50", 0, False, 1),  # no progress
        ("stopped 50", "stopped 50", 2, False, 2),
        ("stopped 50", "running 70", 1, False, 1),  # failed on the way
        ("new 0", "running 70", 0, False, 1),
        ("new 0", "new 0", 3, False, 3),
    ],
)
def test_queued_again(job, cluster, before, after, code, queued, expected):
    done = job("python", "tools/cls_train.py", before=before, after=after, code=code)
    assert done.returncode == expected
    assert f"before: {before}, after: {after}, exit code {code}" in done.stdout
    assert [c[2] for c in cluster.calls["scontrol"][1:]] == [REQUEUE] * queued
    refused = not queued and not (after.startswith("finished"))
    assert done.stderr.count("slurm: not queued again") == refused


def test_bad_use_of_slurm(job, cluster, tmp_path):
    job("python", "tools/cls_valid.py")
    cluster.refuses("slurm: 'cls_valid.py' is none of the training commands")
    job("python", "tools/cls_train.py", SLURM_JOB_ID="")
    cluster.refuses("slurm: submit this: sbatch")
    job("python", "tools/cls_train.py", cwd=tmp_path)
    cluster.refuses(f"slurm: {tmp_path} is not the repository")
    cluster.does("squeue", "echo 5:59")
    job("python", "tools/cls_train.py")
    cluster.refuses("slurm: MARGIN is 5 minutes, but the job has only 5 left")
    code = f"minutes[$(touch {tmp_path}/ran)]"  # runs where Bash takes it for a number
    for margin in ("-3", "1e3", "0x10", "five", code):
        job("python", "tools/cls_train.py", MARGIN=margin)
        cluster.refuses(f"slurm: MARGIN is '{margin}', but must be a number of minutes")
    job("python", "tools/cls_train.py", SLURM_JOB_ID=code)
    cluster.refuses("slurm: submit this: sbatch")
    assert not (tmp_path / "ran").exists()
    assert "srun" not in cluster.calls


def test_a_command_that_cannot_be_understood_is_not_begun(job, cluster):
    cluster.does("progress", "echo run_progress: unknown key >&2; exit 2")
    job("python", "tools/cls_train.py")
    cluster.refuses("run_progress: unknown key")
    assert "srun" not in cluster.calls


def test_the_header_of_the_job():
    """Slurm reads flags up to the first command."""
    lines = (ROOT / "scripts/cluster/slurm.sh").read_text().splitlines()
    head = lines[: lines.index("set -euo pipefail")]
    assert all(line.startswith("#") for line in head)
    flags = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--requeue", "--open-mode=append"} <= set(flags)
    assert "--signal=TERM@150" in flags  # no B: this shell must outlive the run to requeue it


# ---- run_progress.py ---------------------------------------------------------------------------

STATES = [
    ([], "new 0"),
    ([("train", {}), ("valid", {"phase": "stacked"})], "running 2"),
    ([("train", {}), ("summary", {"finished": False})], "stopped 2"),
    ([("summary", {"finished": False}), ("train", {})], "running 2"),
    ([("train", {}), ("summary", {"finished": True})], "finished 2"),
    ([("final_test", {}), ("summary", {"finished": True})], "finished 2"),
]


@pytest.mark.parametrize(("records", "expected"), STATES)
def test_progress(tmp_path, monkeypatch, capsys, records, expected):
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"kind": kind, "step": i, **more}) for i, (kind, more) in enumerate(records, 1)
    ]
    for folder, argv in [
        ("LM-TFM-wt103/a", ["train_transformer.py", "--name", "a", "--max_step", "9"]),
        ("b-demo/c", ["train_transformer.py", "--dataset=demo", "--work_dir=b", "--name=c", "-1"]),
        ("LM-TFM-wt103/wt103_x", ["wt103_x.sh", "train", "--max_step", "9"]),
        ("LM-TFM-wt103/d", ["wt103_x.sh", "train", "--name", "d"]),
        (f"output/digit_scenes/{SCENES.stem}", ["tools/seg_train.py", "--cfg", str(SCENES)]),
        (
            f"e/digit_scenes/{SCENES.stem}",
            ["tools/cls_train.py", "OUTPUT_DIR", "e", "--cfg", str(SCENES), "TRAIN.LR", "1"],
        ),
    ]:
        if lines:
            Path(folder).mkdir(parents=True)
            (Path(folder) / METRICS).write_text("\n".join(lines) + "\n")
        assert run_progress.main(argv) == 0
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["train_transformer.py"],
        ["train_transformer.py", "--name", "a", "--dataset", "none"],
        ["tools/cls_train.py", "--cfg", "none.yaml"],
        ["tools/cls_train.py"],
    ],
)
def test_progress_of_no_run(capsys, argv):
    assert run_progress.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run_progress: ")


# ---- for real ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_for_real(tmp_path):
    """Two torchruns of one process each, on one machine; then once more, to continue."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"MASTER": "localhost", "NODES": "2", "GPUS": "1", "PORT": str(port)}
    more = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "RESTARTS": "1"}
    words = ["python", "tools/seg_train.py", "--cfg", str(SCENES), "--modelDir", str(tmp_path)]
    for epochs in ("1", "2"):
        sizes = [*TINY_SCENES, "TRAIN.BATCH_SIZE_PER_GPU", "2", "TRAIN.END_EPOCH", epochs]
        machines = [
            subprocess.Popen(
                ["bash", ROOT / "scripts/cluster/multinode.sh", *words, *sizes],
                env={**os.environ, **where, **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        outputs = [machine.communicate(timeout=180) for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], outputs
        output = "".join(out for out, _ in outputs)
        assert "2 process(es)" in output
        assert ("continuing" in output) == (epochs == "2")
    records = read_metrics(tmp_path / "digit_scenes" / SCENES.stem)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
