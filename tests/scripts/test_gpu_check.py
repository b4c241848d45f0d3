"""scripts/gpu_check.sh on the CPU, in tiny sizes: that the check itself works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_check

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.sh"


def check(folder, *argv):
    """Run the command from another folder: its exit code, and the file that it wrote."""
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    out = folder / "gpu_check.md"
    command = ["bash", str(SCRIPT), "--device", "cpu", "--out", str(out), *argv]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout == out.read_text()
    return done.returncode, done.stdout


@pytest.mark.slow
def test_digits(tmp_path):
    code, text = check(tmp_path, "--sections", "digits")
    assert code == 0
    assert text.startswith("\n## digits\n")
    for name in ("anderson", "newton_krylov", "ift, gmres", "reversible"):
        assert f"| {name} " in text
    assert text.endswith("nothing wrong was found\n")


def test_a_section_without_time_is_broken_off(tmp_path):
    # 1.6 s beside the reserve: less than the imports of the first section take.
    code, text = check(tmp_path, "--sections", "steps,nccl", "--minutes", "0.11")
    assert code == 0
    assert "broken off: out of time" in text
    assert "left out: no time left" in text


@pytest.mark.slow
def test_a_package_that_is_missing(tmp_path, monkeypatch):
    """The steps need yacs; nothing else is lost with it."""
    (tmp_path / "yacs.py").write_text("raise ModuleNotFoundError(\"No module named 'yacs'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, text = check(tmp_path, "--sections", "steps,machine")
    assert code == 0
    assert "left out, all or in part: ModuleNotFoundError: No module named 'yacs'" in text
    assert " threads | torch " in text


def test_what_is_wrong_decides_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_section", lambda name, *_: name == "nccl")
    out = tmp_path / "out.md"
    assert gpu_check.main(["--out", str(out)]) == 1
    assert out.read_text().endswith("wrong: nccl\n")
    assert gpu_check.main(["--sections", "digit", "--out", str(out)]) == 2
    assert "--sections: unknown 'digit': did you mean digits?" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it(tmp_path):
    code, text = check(
        tmp_path, "--settings", "wt103_deq_transformer,cifar/cls_mdeq_TINY", "--minutes", "8"
    )
    assert code == 0
    assert "gloo: sum right" in text
    assert "aten::bmm" in text
    for name in ("wt103_deq_transformer", "cifar/cls_mdeq_TINY"):
        for form in ("plain", "fast", "fast-bf16", "fast-graph", "fast-gmres", "fast-compile"):
            assert f"| {name} | {form} | " in text
    assert "!" not in text
