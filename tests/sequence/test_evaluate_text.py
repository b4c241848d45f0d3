"""evaluate.py: perplexity of a text, figures of its tokens, sweeps, and bad input."""

import csv
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from deq_sequence import evaluate_command, generate_command
from deq_sequence.evaluate_command import main

ROOM = Path(__file__).parents[2] / "DEQ-Sequence"
WORDS = str(ROOM.parent / "docs/models/words.safetensors")
TEXT = "\n".join(["the value of the object is a list of names", "this function returns zyxxy"] * 4)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def rows(capsys, *arguments) -> list[list[float]]:
    """The table that the command prints."""
    assert main([*map(str, arguments), "--num_threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[0] == "tokens")
    table = [line.split() for line in lines[head + 1 :] if line.startswith(" ")]
    return [[float(cell) for cell in row] for row in table]


def test_the_figures_are_those_of_training(train, run_folder, corpus_folder, capsys):
    records = train("--max_eval_steps", "-1")
    (test,) = [r for r in records if r["kind"] == "final_test"]
    capsys.readouterr()
    ((tokens, mem_len, f_thres, perplexity, nfe, residual),) = rows(
        capsys, run_folder, corpus_folder / "test.txt", "--batch_size", "4"
    )
    assert (tokens, mem_len, f_thres, nfe) == (test["tokens"], 8, 6, test["nfe"])
    assert perplexity == pytest.approx(math.exp(test["loss"]), abs=6e-4)
    assert residual == pytest.approx(test["rel_residual"], rel=0.06)


def test_the_value_is_one_evaluation_ahead(text, capsys):
    """After one evaluation, at z0, f(z0) is the second point."""
    (value,) = rows(capsys, WORDS, text, "--f_thres", "1", "--eval_state", "value")
    (point,) = rows(capsys, WORDS, text, "--f_thres", "2")
    assert value[3] == pytest.approx(point[3], rel=1e-4)
    assert (value[4], point[4]) == (1, 2)


def test_figures_of_each_token(text, tmp_path, capsys):
    out = tmp_path / "tokens.csv"
    ((tokens, *_, perplexity, nfe, residual),) = rows(capsys, WORDS, text, "--tokens", out)
    (again,) = rows(capsys, WORDS, text)
    assert again[3] == pytest.approx(perplexity, abs=2e-3)
    with out.open(newline="") as file:
        found = list(csv.DictReader(file))
    words = " <eos> ".join(TEXT.replace("zyxxy", "<unk>").splitlines()).split()
    assert [row["token"] for row in found] == [*words[1:], "<eos>"]
    assert len(found) == tokens
    loss = sum(float(row["minus_log_p"]) for row in found) / len(found)
    assert math.exp(loss) == pytest.approx(perplexity, abs=2e-3)
    assert {row["evaluations"] for row in found} == {"6"} == {f"{nfe:.0f}"}
    residuals = [float(row["residual"]) for row in found]
    assert len(set(residuals)) > tokens / 2
    assert min(residuals) < residual < max(residuals)


def test_more_evaluations_lower_each_residual(text, tmp_path, capsys):
    worst = []
    for f_thres in (6, 40):
        out = tmp_path / f"{f_thres}.csv"
        rows(capsys, WORDS, text, "--tokens", out, "--f_thres", f_thres)
        with out.open(newline="") as file:
            worst.append(max(float(row["residual"]) for row in csv.DictReader(file)))
    assert worst[1] < 0.1 * worst[0]


def test_a_sweep(text, tmp_path, capsys):
    figure = tmp_path / "sweep.png"
    found = rows(
        *(capsys, WORDS, text, "--mem_len", 0, 8, "--f_thres", 1, 4, 12),
        *("--tgt_len", 16, "--figure", figure),
    )
    assert [row[1:3] for row in found] == [[m, f] for m in (0, 8) for f in (1, 4, 12)]
    for low, high in ((found[0], found[2]), (found[3], found[5])):
        assert low[3] > high[3]  # one evaluation is no equilibrium
        assert low[5] > high[5]
    assert found[5][3] < found[2][3]  # the memory helps
    with Image.open(figure) as picture:
        assert picture.size[0] > 500
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """On a short text, in a folder that lies as DEQ-Sequence does."""
    page = (ROOM.parent / "docs/words.md").read_text("utf-8")
    lines = re.findall(r"^python (generate|evaluate)\.py (.*)$", page, flags=re.MULTILINE)
    assert len(lines) == 4
    (tmp_path / "docs").symlink_to(ROOM.parent / "docs")
    (data := tmp_path / "DEQ-Sequence/data/demo").mkdir(parents=True)
    for name in ("test.txt", "valid.txt"):
        (data / name).write_text(TEXT)
    monkeypatch.chdir(tmp_path / "DEQ-Sequence")
    for command, flags in lines:
        run = generate_command.main if command == "generate" else evaluate_command.main
        words = [*shlex.split(flags), "--num_threads", "1"]
        assert run([*words, "--words", "4"] if command == "generate" else words) == 0
    assert Path("sweep.png").exists()
    assert Path("tokens.csv").exists()
    assert "[this function returns] " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "text.txt has 0 tokens"),
        (b"caf\xe9 is not UTF-8\n", "text.txt, line 1: not UTF-8"),
        (None, "no file"),
    ],
    ids=["empty", "latin-1", "missing"],
)
def test_a_bad_text(tmp_path, capsys, content, part):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main([WORDS, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluate.py: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--figure", "text.txt"], "--figure: text.txt exists"),
        (["--tokens", "text.txt"], "--tokens: text.txt exists"),
        (["--figure", "figure.pdf"], "does not end in .png"),
        (["--tokens", "new.csv", "--f_thres", "1", "2"], "--tokens needs one --mem_len"),
        (["--tokens", "a.png", "--figure", "./a.png"], "--figure: a.png is the file of --tokens"),
        (["--tokens", "gone/new.csv"], "--tokens: there is no folder gone"),
        (["--f_thres", "0"], "--f_thres is 0"),
        (["--mem_len", "8", "-1"], "--mem_len is -1"),
        (["--tgt_len", "0"], "--tgt_len is 0"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--batch_size", "99"], "too few for a batch size (bsz) of 99"),
        (["--device", "nowhere"], "--device: the device nowhere cannot be used here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(text, capsys, monkeypatch, flags, part):
    monkeypatch.chdir(text.parent)
    assert main([WORDS, "text.txt", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # not even the head of the table
    assert err.startswith("evaluate.py: ")
    assert err.count("\n") == 1
    assert part in err
    assert [path.name for path in text.parent.iterdir()] == ["text.txt"]
    assert text.read_text() == TEXT


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOM / "evaluate.py"), run_name="__main__")
    assert "--mem_len" in capsys.readouterr().out
