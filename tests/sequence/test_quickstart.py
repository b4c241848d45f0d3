"""The quickstart's report, evaluation with more iterations, and generation."""

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deq_sequence.command import build_model
from deq_sequence.evaluation import evaluate
from deq_sequence.generation import generate
from deq_sequence.options import parse
from deq_sequence.quickstart import SETTINGS, main
from deq_sequence.text.ngram import kneser_ney_bigram_perplexity, unigram_perplexity
from deq_sequence.text.vocabulary import Vocab
from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from lib.runs.run_folder import WEIGHTS, read_metrics

# With solves in both passes; forward ones alone are reported in test_gradients_training.py.
TINY = """
    --grad ift --f_thres 12
    --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --pretrain_steps 40 --max_step 60
    --tgt_len 16 --mem_len 16 --eval_tgt_len 16 --batch_size 4 --eval_batch_size 4 --lr 0.01
    --eval-interval 20 --log-interval 10 --num_threads 1
"""
REPORT = Path(__file__).parents[2] / "docs/report.md"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def room(corpus_folder, tmp_path_factory):
    """Stands for DEQ-Sequence. The small text is no demo corpus, so it is another data set."""
    folder = tmp_path_factory.mktemp("room")
    shutil.copytree(corpus_folder, folder / "data" / "demo")
    return folder


def quickstart(room, *more) -> int:
    return main(["--dataset", "wt103", *TINY.split(), *more], room)


@pytest.fixture(scope="module")
def trained(room):
    """The folder of a finished run, and its settings."""
    threads = torch.get_num_threads()
    assert quickstart(room) == 0
    torch.set_num_threads(threads)
    places = ["--data", str(room / "data" / "demo"), "--work_dir", str(room / "LM-TFM")]
    args = parse([*SETTINGS.split(), *places, "--dataset", "wt103", *TINY.split()])
    return room / "LM-TFM-wt103" / "quickstart", args


@pytest.fixture
def model(trained, small_corpus):
    folder, args = trained
    model = build_model(args, small_corpus, torch.device("cpu"))
    load_weights(model, folder / WEIGHTS)
    return model


# ---- the report ------------------------------------------------------------------------------


def rows(text):
    """{title: [figures]} of the table's lines."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_report(trained, small_corpus):
    folder, args = trained
    table = rows((folder / "report.txt").read_text())
    assert table["perplexity"] == ["valid", "test"]
    n_token = len(small_corpus.vocab)
    for name, figure in (
        ("unigram", unigram_perplexity),
        ("Kneser-Ney bigram", kneser_ney_bigram_perplexity),
    ):
        texts = (small_corpus.valid, small_corpus.test)
        expected = [f"{figure(small_corpus.train, text, n_token):.1f}" for text in texts]
        assert table[name] == expected

    records = read_metrics(folder)
    (valid,) = [r for r in records if r["kind"] == "final_valid"]
    (test,) = [r for r in records if r["kind"] == "final_test"]
    stacked = [r for r in records if r["kind"] == "valid" and r["step"] == 40]
    assert table["this run, before its equilibrium phase"] == [
        f"{math.exp(stacked[0]['loss']):.1f}"
    ]
    assert table["equilibrium"] == [f"{math.exp(r['loss']):.1f}" for r in (valid, test)]
    share = math.exp(test["loss"]) / float(table["unigram"][1])
    assert float(table["test / unigram"][0]) == pytest.approx(share, abs=2e-3)

    assert table["equilibrium solves"] == ["rel. residual", "nfe"]
    solved = [r for r in records if r["kind"] == "train" and r["step"] > 40]
    for which in ("forward", "backward"):
        residual, nfe = map(float, table[f"{which}, training mean"])
        for found, name in ((residual, "rel_residual"), (nfe, "nfe")):
            mean = sum(r[f"{which}_{name}"] for r in solved) / len(solved)
            assert found == pytest.approx(mean, rel=0.01)
    residual, nfe = map(float, table["forward, evaluation mean"])
    assert residual == pytest.approx(test["rel_residual"], rel=0.01)
    assert 0 < nfe <= args.f_thres
    assert 0 < float(table["spectral radius (valid)"][0]) < 100
    assert re.fullmatch(r"\d+ MiB", table["peak memory"][0])


def test_report_names_the_curves_and_shows_words(trained, small_corpus):
    folder, _ = trained
    text = (folder / "report.txt").read_text()
    (path,) = re.findall(r"^curves: (.*)$", text, re.MULTILINE)
    assert path == str(folder / "curves.png")
    with open(path, "rb") as file:
        content = file.read()
    assert content.startswith(PNG)
    assert len(content) > 10_000
    samples = text.split("a few words from the model:")[1].strip().splitlines()
    assert len(samples) == 2
    for sample in samples:
        # The prompts' words are not in this vocabulary, so they begin at a line's end.
        prompt, *words = sample.replace("/", "<eos>").split()
        assert prompt == "[<eos>]"
        assert len(words) == 40
        assert set(words) <= set(small_corpus.vocab.idx2sym)
        assert "<unk>" not in words


def test_restart_of_a_finished_run_reports_again(room, trained, capsys):
    folder, _ = trained
    before = rows((folder / "report.txt").read_text())
    assert quickstart(room, "--restart") == 0
    shown = rows(capsys.readouterr().out)
    after = rows((folder / "report.txt").read_text())
    for name in (
        "unigram",
        "this run, before its equilibrium phase",
        "equilibrium",
        "test / unigram",
    ):
        assert after[name] == before[name] == shown[name]


def test_a_second_run_is_refused(room, trained, capsys):
    assert quickstart(room) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("quickstart.py: ")
    assert "--restart" in line


def test_somebody_elses_text_is_not_overwritten(room, capsys):
    text = (room / "data" / "demo" / "train.txt").read_bytes()
    assert main(TINY.split(), room) == 2
    assert str(room / "data" / "demo" / "train.txt") in capsys.readouterr().err
    assert (room / "data" / "demo" / "train.txt").read_bytes() == text


@pytest.mark.parametrize("more", [["--pretrain_steps", "0"], ["--pretrain_steps", "90"]])
def test_report_of_runs_of_one_phase(room, more, capsys):
    name = f"only{more[1]}"
    few = ["--max_step", "8", "--max_eval_steps", "2"]
    assert quickstart(room, *more, *few, "--name", name) == 0
    table = rows(capsys.readouterr().out)
    if more[1] == "90":
        assert "stacked (end of training)" in table
        assert "equilibrium" not in table
        assert "this run, before its equilibrium phase" not in table
    else:
        assert table["this run, before its equilibrium phase"] == ["none"]
        assert "equilibrium" in table
    assert (room / "LM-TFM-wt103" / name / "curves.png").exists()


def test_a_second_run_with_another_gradient(room, capsys):
    """As docs/report.md makes one, to compare it with the first."""
    flags = ["--name", "jfb", "--grad", "jfb"]
    assert f"quickstart.py {' '.join(flags)}\n" in REPORT.read_text("utf-8")
    assert quickstart(room, *flags, "--pretrain_steps", "2", "--max_step", "4") == 0
    assert float(rows(capsys.readouterr().out)["test / unigram"][0]) > 0
    settings = json.loads((room / "LM-TFM-wt103/jfb/settings.json").read_text())
    assert settings["grad"] == "jfb"


@pytest.mark.parametrize("more", [["--debug"], ["--eval"]])
def test_without_a_run_there_is_no_report(room, trained, more, capsys):
    assert quickstart(room, "--max_step", "2", *more) == 0
    assert "a few words" not in capsys.readouterr().out


# ---- evaluation ------------------------------------------------------------------------------


def evaluation(model, text, **options):
    settings = {"batch_size": 4, "tgt_len": 16, "mem_len": 16, "f_thres": 8}
    return evaluate(model, text, **{**settings, **options})


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
@pytest.mark.parametrize("max_steps", [1, -1], ids=["one segment", "whole text"])
def test_more_iterations_never_worsen_the_residual(model, small_corpus, solver, max_steps):
    model.f_solver = solver
    found = [
        evaluation(model, small_corpus.valid, f_thres=f_thres, max_steps=max_steps)
        for f_thres in (4, 8, 16, 32, 64)
    ]
    assert all(a.rel_residual >= b.rel_residual for a, b in pairwise(found))
    assert found[-1].rel_residual < 1e-3  # the solvers' eps: they converge in the end
    assert [e.nfe for e in found] == sorted(e.nfe for e in found)
    assert found[-1].loss == pytest.approx(found[-2].loss, abs=1e-3)


def test_evaluation_puts_everything_back(model, small_corpus):
    model.train()
    model.reset_length(5, 3)
    stats = model.deq.stats
    evaluation(model, small_corpus.valid, max_steps=2)
    assert model.training
    assert (model.tgt_len, model.mem_len) == (5, 3)
    assert model.deq.stats is stats
    assert stats.forward.solves == 0


def failing(*arguments, **options):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, RuntimeError),
        ({"mem_len": -1}, InputError),
    ],
)
def test_evaluation_that_fails_puts_everything_back(model, small_corpus, options, error):
    model.train()
    model.reset_length(5, 3)
    model.f_solver = failing
    stats = model.deq.stats
    with pytest.raises(error):
        evaluation(model, small_corpus.valid, **options)
    assert model.training
    assert (model.tgt_len, model.mem_len) == (5, 3)
    assert model.deq.stats is stats


def test_tokens_are_counted(model, small_corpus):
    whole = evaluation(model, small_corpus.valid)
    assert whole.tokens == (small_corpus.valid.numel() // 4 - 1) * 4
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    assert whole.bits == pytest.approx(whole.loss / math.log(2))


@pytest.mark.parametrize("tgt_len", [1, 7, 300])
def test_segments_do_not_matter_where_memory_reaches(model, small_corpus, tgt_len):
    """Memory of all that came before: up to the solver's accuracy, one segment or many."""
    model.f_solver = "broyden"
    text = small_corpus.valid[:120]
    options = {"batch_size": 2, "mem_len": 200, "f_thres": 60}
    one = evaluation(model, text, tgt_len=59, **options)
    assert evaluation(model, text, tgt_len=tgt_len, **options).loss == pytest.approx(
        one.loss, abs=5e-3
    )


# ---- generation ------------------------------------------------------------------------------


def test_generation_is_repeatable(model, small_corpus):
    def words(**options):
        return generate(model, small_corpus.vocab, ["<eos>", "="], 20, f_thres=6, **options)

    first = words(seed=1)
    torch.manual_seed(123)  # the global state has no say
    state = torch.get_rng_state()
    assert words(seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert words(seed=2) != first
    assert len(first) == 20
    assert set(first) <= set(small_corpus.vocab.idx2sym)


def test_top_1_takes_the_most_likely_word(model, small_corpus):
    one, two = (
        generate(model, small_corpus.vocab, ["<eos>"], 8, top_k=1, seed=seed) for seed in (1, 2)
    )
    assert one == two


def test_skipped_symbols_do_not_appear(model, small_corpus):
    vocab = small_corpus.vocab
    keep = vocab.idx2sym[7:9]
    skip = tuple(symbol for symbol in vocab.idx2sym if symbol not in keep)
    words = generate(model, vocab, ["<eos>"], 10, temperature=5.0, skip=skip)
    assert set(words) <= set(keep)


def test_temperature_0_is_the_limit(model, small_corpus):
    greedy = generate(model, small_corpus.vocab, ["<eos>"], 8, top_k=1)
    for temperature in (0, 1e-300, 1e-5):
        found = generate(model, small_corpus.vocab, ["<eos>"], 8, temperature=temperature, seed=3)
        assert found == greedy


def test_a_prompt_of_unknown_words(model, small_corpus):
    """<unk> is a word; a vocabulary without it says which word it does not have."""
    vocab = small_corpus.vocab
    known, unknown = (generate(model, vocab, [w, "w1"], 5) for w in ("<unk>", "never-seen"))
    assert known == unknown
    without = [symbol if symbol != "<unk>" else "other" for symbol in vocab.idx2sym]
    with pytest.raises(InputError, match="'never-seen' of the prompt is not in the vocabulary"):
        generate(model, Vocab.from_symbols(without), ["w1", "never-seen"], 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": "w1"}, "prompt"),
        ({"prompt": [1]}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": True}, "seed"),
        ({"skip": None}, "skip"),
        ({"skip": "w1"}, "skip"),
        ({"skip": [["w1"]]}, "skip"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"n_words": -1}, "n_words"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"f_thres": 0}, "threshold"),
        ({"vocab": Vocab.from_symbols(["<eos>", "w1"])}, "the size of the vocabulary is 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_generation_refuses(model, small_corpus, changes, named):
    model.train()
    stats = model.deq.stats
    options = {"vocab": small_corpus.vocab, "prompt": ["w1"], "n_words": 3} | changes
    with pytest.raises(InputError, match=named):
        generate(model, **options)
    assert model.training
    assert model.deq.stats is stats


def test_generation_with_nothing_left(model, small_corpus):
    with pytest.raises(InputError, match="fewer symbols"):
        generate(model, small_corpus.vocab, ["w1"], 1, skip=tuple(small_corpus.vocab.idx2sym))
    assert generate(model, small_corpus.vocab, ["w1"], 0) == []
    assert len(generate(model, small_corpus.vocab, ["w1"], 2, top_k=10**30)) == 2


def test_generation_keeps_the_training_mode(model, small_corpus):
    model.train()
    generate(model, small_corpus.vocab, ["<eos>"], 1)
    assert model.training
