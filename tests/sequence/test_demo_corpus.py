"""The demo corpus: prose only, splits that share no paragraph, and a folder left alone."""

import json
import re

import pytest

from deq_sequence.text import demo_corpus
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text.demo_corpus import build_demo_corpus
from deq_sequence.text.docstring_prose import prose
from deq_sequence.text.ngram import kneser_ney_bigram_perplexity, unigram_perplexity
from lib.errors import InputError

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def demo(demo_folder):
    return demo_folder, get_lm_corpus(demo_folder, "demo")


def lines(folder, split):
    return (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()


def test_sizes_and_unk_shares(demo):
    folder, corpus = demo
    manifest = json.loads((folder / "demo_corpus.json").read_text())
    assert 300_000 < corpus.train.numel() < 600_000
    assert 4_500 < len(corpus.vocab) < 7_500
    assert manifest["types"] == len(corpus.vocab)
    unk = corpus.vocab.sym2idx["<unk>"]
    for split in SPLITS:
        ids, facts = getattr(corpus, split), manifest["splits"][split]
        assert facts["tokens"] == ids.numel()
        assert facts["unk_share"] == pytest.approx((ids == unk).double().mean().item(), abs=1e-4)
        assert facts["unk_share"] < 0.06
    for split in ("valid", "test"):
        assert 0.035 < getattr(corpus, split).numel() / corpus.train.numel() < 0.07


def test_rare_words_of_train_are_unk_everywhere(demo):
    _, corpus = demo
    assert corpus.train.bincount()[1:].min() >= demo_corpus.MIN_COUNT


def test_layout_is_wikitext(demo):
    folder, _ = demo
    for split in SPLITS:
        text = lines(folder, split)
        headings = [i for i, line in enumerate(text) if re.fullmatch(r" = [^=]+ = ", line)]
        assert len(headings) > 5
        for i in headings:
            assert not text[i - 1].strip()
            assert not text[i + 1].strip()
        sources = {text[i].split()[1] for i in headings}
        assert sources == {"module", "help"}
        assert all(line == line.lower() for line in text)


def test_no_paragraph_is_in_two_splits(demo):
    folder, _ = demo
    sets = {s: {line for line in lines(folder, s) if line.count(" ") > 12} for s in SPLITS}
    for split in ("valid", "test"):
        # <unk> makes a few short paragraphs alike that were different.
        same = {line for line in sets[split] & sets["train"] if "<unk>" not in line}
        assert not same
    assert not {line for line in sets["valid"] & sets["test"] if "<unk>" not in line}


def test_no_mark_up_and_no_addresses_are_left(demo):
    folder, _ = demo
    for split in SPLITS:
        text = (folder / f"{split}.txt").read_text(encoding="utf-8")
        assert "`" not in text
        assert ": / /" not in text


def test_a_bigram_learns_it(demo):
    _, corpus = demo
    unigram = unigram_perplexity(corpus.train, corpus.valid, len(corpus.vocab))
    bigram = kneser_ney_bigram_perplexity(corpus.train, corpus.valid, len(corpus.vocab))
    assert 200 < unigram < 600
    assert 80 < bigram < 0.5 * unigram


SENTENCE = "this is the text of the {} module and it is all about that ."
SECOND = f'''\
raise SystemExit("a module is never imported")
# {SENTENCE.format("second")}
# It goes on in the second line of the comment.
try:
    def f():
        """{SENTENCE.format("function")}"""
        return """{SENTENCE.format("string")}"""
    def g():
        """{SENTENCE.format("package")}"""
finally:
    pass
'''


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A standard library of forty small modules, so that a build takes no time."""
    stdlib = tmp_path / "stdlib"
    docstrings = {f"pkg/m{i}.py": f"m{i}" for i in range(36)} | {
        "pkg/__init__.py": "package",
        "pkg/tests/skipped.py": "test",
        "site-packages/skipped.py": "site",
    }
    sources = {path: f'"""{SENTENCE.format(name)}"""\n' for path, name in docstrings.items()}
    sources["pkg/broken.py"] = f"this is no python\n# {SENTENCE.format('broken')}\n"
    sources["second.py"] = SECOND
    for path, source in sources.items():
        (stdlib / path).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / path).write_text(source)
    help_texts = {f"t{i}": SENTENCE.format(f"help {i}") for i in range(30)}
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _name: str(stdlib))
    monkeypatch.setattr(demo_corpus, "topics", help_texts)
    monkeypatch.setattr(demo_corpus, "MIN_COUNT", 0)
    return stdlib


def test_documents_of_a_small_library(small_library, tmp_path):
    build_demo_corpus(tmp_path)
    text = [line.strip() for split in SPLITS for line in lines(tmp_path, split)]
    for name in ("m0", "m35", "package", "function", "help 0", "help 29"):
        assert text.count(SENTENCE.format(name)) == 1, name
    for name in ("broken", "test", "site", "string"):
        assert SENTENCE.format(name) not in text
    start = text.index("= module second =")
    assert text[start - 1 : start + 6] == [
        "",
        "= module second =",
        "",
        SENTENCE.format("second") + " it goes on in the second line of the comment .",
        SENTENCE.format("function"),
        SENTENCE.format("package"),
        "",
    ]
    assert "= module pkg =" not in text  # its only paragraph was met before, in second.py


def test_a_share_of_both_sources_is_held_out(small_library, tmp_path):
    build_demo_corpus(tmp_path)
    for split in ("valid", "test"):
        headings = [line.split()[1] for line in lines(tmp_path, split) if line.startswith(" = ")]
        assert headings == ["module", "help"]  # 5 % of 37 and of 30 documents: one each


def test_python_without_sources_is_one_line(small_library, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus, "topics", {})
    monkeypatch.setattr(demo_corpus.sysconfig, "get_path", lambda _name: str(tmp_path / "none"))
    with pytest.raises(InputError) as error:
        build_demo_corpus(tmp_path / "out")
    assert "too little documentation" in str(error.value)
    assert "\n" not in str(error.value)


def test_same_library_gives_the_same_bytes(small_library, tmp_path):
    for folder in ("one", "two"):
        build_demo_corpus(tmp_path / folder)
    for name in ("train.txt", "valid.txt", "test.txt", "demo_corpus.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_complete_folder_is_left_alone_and_a_damaged_one_rebuilt(
    small_library, tmp_path, monkeypatch
):
    built = build_demo_corpus(tmp_path)
    times = {split: (tmp_path / f"{split}.txt").stat().st_mtime_ns for split in SPLITS}
    monkeypatch.setattr(demo_corpus.platform, "python_version", lambda: "9.9.9")
    assert build_demo_corpus(tmp_path) == built
    assert times == {s: (tmp_path / f"{s}.txt").stat().st_mtime_ns for s in SPLITS}

    (tmp_path / "train.txt").write_text("cut")
    assert build_demo_corpus(tmp_path)["python"] == "9.9.9"
    assert len(lines(tmp_path, "train")) > 100

    (tmp_path / "test.txt").unlink()
    build_demo_corpus(tmp_path)
    assert (tmp_path / "test.txt").exists()


def test_text_of_somebody_else_is_never_overwritten(tmp_path):
    (tmp_path / "train.txt").write_text("my text")
    with pytest.raises(InputError) as error:
        build_demo_corpus(tmp_path)
    assert str(tmp_path / "train.txt") in str(error.value)
    assert "name another folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "train.txt").read_text() == "my text"


def test_folder_that_cannot_be_made_is_one_line(small_library, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        build_demo_corpus(tmp_path / "file" / "data")
    message = str(error.value)
    assert message.startswith(f"cannot write the demo corpus to {tmp_path / 'file' / 'data'} (")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It's a :class:`Foo`, which doesn't need ``bar()`` or *baz* to be read-only.",
            ["it 's a foo , which doesn 't need bar or baz to be read @-@ only ."],
        ),
        (
            "The “quoted” 'name' of sys.stdout is kept — in Python 3.11…",
            ["the quoted name of sys.stdout is kept -- in python 3.11 ..."],
        ),
        (
            "This is the text before the example:\n>>> f(x)\n1\n\nThis is the text after it.",
            ["this is the text before the example :", "this is the text after it ."],
        ),
        (
            "The code below is not prose at all::\n\n    this is the code and it is dropped\n\n"
            "The text that follows it is.",
            ["the code below is not prose at all :", "the text that follows it is ."],
        ),
        (
            "- this is the first item of it\n- this is the second item of it\n  on two lines",
            ["this is the first item of it", "this is the second item of it on two lines"],
        ),
        ("f(a, b[, c]) -> the object", []),
        ("x = y + z * (a / b) if c else {d: e}", []),
        ("+----+----+\n| is | of |\n+----+----+", []),
        ("See the web page at https://example.org for all of it.", []),
        ("Too short to be.", []),
    ],
)
def test_prose_is_kept_and_the_rest_dropped(text, expected):
    assert [" ".join(tokens) for tokens in prose(text)] == expected
