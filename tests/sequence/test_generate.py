"""generate.py: the same text for the same seed, prompts from three sources, and bad input."""

import os
import pty
import runpy
import sys
from pathlib import Path

import pytest
import torch

import deq_sequence
from deq_sequence.generate_command import main
from deq_sequence.generation import generate

ROOM = Path(__file__).parents[2] / "DEQ-Sequence"
WORDS = str(ROOM.parent / "docs/models/words.safetensors")
SHORT = ["--words", "6", "--num_threads", "1"]


def run(capsys, *arguments):
    """Exit code, lines of the output, lines of the errors."""
    code = main([WORDS, *SHORT, *arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_seed_gives_a_text(capsys):
    prompt = ["--prompt", "this function returns", "--temperature", "1"]
    _, three, said = run(capsys, *prompt, "--number", "3", "--seed", "5")
    assert len(set(three)) == 3
    assert all(line.startswith("[this function returns] ") for line in three)
    assert said[-1].startswith("18 tokens, ")
    assert said[-1].endswith(" 6.0 evaluations of f per token")
    assert run(capsys, *prompt, "--seed", "6")[1] == three[1:2]


@pytest.mark.parametrize(
    "flags", [["--temperature", "0"], ["--top_k", "1"], ["--top_p", "1e-300", "--temperature", "2"]]
)
def test_the_likeliest_words(capsys, flags):
    """Three ways to ask for them; and they are those of the text as a whole."""
    trained = deq_sequence.load(WORDS)
    _, (line,), _ = run(capsys, "--prompt", "the object", "--f_thres", "60", *flags)
    ids = [trained.vocabulary.sym2idx[word] for word in trained.begin("the object")]
    for _ in range(6):
        scores = trained.model.log_probs(torch.tensor(ids)[:, None], f_thres=60)[-1, 0]
        scores[trained.vocabulary.sym2idx["<unk>"]] = -torch.inf
        ids.append(int(scores.argmax()))
    assert line == f"[the object] {trained.vocabulary.join(trained.vocabulary.decode(ids[2:]))}"


def test_top_p_keeps_the_fewest_words_that_have_it():
    """At each position the drawn word is among them, and more than one of them is drawn."""
    trained = deq_sequence.load(WORDS)
    model, vocab, prompt = trained.model, trained.vocabulary, ["the"]
    options = {"temperature": 1.0, "top_k": 10**9, "skip": ()}
    p = model.log_prob(torch.tensor([[vocab.sym2idx["the"]]]), [], f_thres=30)[0][0].exp()
    best, ids = p.sort(descending=True)
    kept = ids[: int((best.cumsum(0) < 0.3).sum()) + 1]
    found = {
        generate(model, vocab, prompt, 1, top_p=0.3, seed=seed, **options)[0] for seed in range(30)
    }
    assert 1 < len(found) <= len(kept)
    assert found <= set(vocab.decode(kept))


def test_lines_of_the_standard_input(capsys, monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("the object\n\nthis zyxxy\n")
    with (tmp_path / "lines").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, lines, said = run(capsys)
    assert code == 0
    assert [line.partition("] ")[0] for line in lines] == ["[the object", "[this <unk>"]
    assert "note: <unk> stands for what the vocabulary lacks: 'zyxxy'" in said


def test_a_standard_input_in_another_encoding(capsys, monkeypatch, tmp_path):
    (tmp_path / "lines").write_bytes(b"the value\xff\n")
    with (tmp_path / "lines").open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, lines, said = run(capsys)
    assert (code, lines) == (2, [])
    assert said[0].startswith("generate.py: the standard input is not UTF-8 text")


def test_a_prompt_of_lines_has_their_ends():
    trained = deq_sequence.load(WORDS)
    assert trained.begin("the\n\nvalue \n") == ["the", "<eos>", "<eos>", "value"]


def test_a_prompt_of_dashes(capsys):
    assert run(capsys, "--prompt=--")[1][0].startswith("[--] ")


def test_a_long_prompt_is_solved_in_segments():
    """So memory and time grow with its length, not with the square; all evaluations count."""
    trained = deq_sequence.load(WORDS)
    nfe = []
    options = {"f_thres": 5, "temperature": 0, "on_word": lambda _, n: nfe.append(n)}
    prompt = trained.begin("the value of the object " * 240)  # 1200 words, 3 segments
    generate(trained.model, trained.vocabulary, prompt, 2, **options)
    assert nfe == [15, 5]


def test_a_terminal_is_asked_until_an_empty_line(capsys, monkeypatch):
    ours, theirs = pty.openpty()
    os.write(ours, b"the object\nthe value\n\nnot read\n")
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        code, lines, said = run(capsys)
    os.close(ours)
    assert code == 0
    assert [line.partition("] ")[0] for line in lines] == ["[the object", "[the value"]
    assert "\n".join(said).count("prompt (an empty line ends): ") == 3


def test_memory_of_another_length(capsys):
    prompt = ["--prompt", "the object", "--temperature", "0", "--words", "12"]
    texts = {m: run(capsys, *prompt, "--mem_len", str(m))[1][0] for m in (0, 64)}
    assert texts[0] != texts[64]
    assert run(capsys, *prompt)[1][0] == texts[64]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([WORDS, "--words", "0"], "--words is 0"),
        ([WORDS, "--number", "-1"], "--number is -1"),
        ([WORDS, "--top_p", "0"], "top_p is 0.0"),
        ([WORDS, "--temperature", "-1"], "temperature is -1.0"),
        ([WORDS, "--mem_len", "-1"], "--mem_len is -1"),
        ([WORDS, "--f_thres", "0"], "--f_thres is 0"),
        ([WORDS, "--seed", "-1"], "seed is -1"),
        ([WORDS, "--seed", str(2**63 - 1), "--number", "2"], "from 0 to 2^63 minus --number"),
        ([WORDS, "--device", "nowhere"], "--device: the device nowhere cannot be used here"),
        ([WORDS, "--device", "meta"], "--device: the device meta cannot be used here"),
        ([WORDS, "--device", "hpu"], "--device: the device hpu cannot be used here"),
        ([WORDS, "--num_threads", "99999999999999999999"], "but must be at most 1024"),
        ([WORDS, "--sead", "1"], "did you mean --seed"),
        (["missing"], "no file missing"),
        ([str(ROOM)], "holds no run of DEQ-Sequence"),
        ([str(ROOM / "generate.py")], "generate.py is not a readable checkpoint"),
    ],
    ids=lambda value: " ".join(value[-2:])[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(capsys, arguments, part):
    assert main([*arguments, "--prompt", "the"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("generate.py: ")
    assert err.count("\n") == 1
    assert part in err


def test_no_line_at_all(capsys, monkeypatch):
    with open(os.devnull) as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, lines, said = run(capsys)
    assert (code, lines) == (2, [])
    assert said == ["generate.py: the standard input has no line to continue: give --prompt TEXT"]


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOM / "generate.py"), run_name="__main__")
    assert "--top_p" in capsys.readouterr().out
