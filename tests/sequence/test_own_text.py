"""--dataset text: the user's own files, the rules by which their symbols get ids, and refusals."""

import pytest
import run_progress

from deq_sequence.command import main, read_corpus
from deq_sequence.options import data_name, folder_of, parse
from deq_sequence.text.one_file import split_file
from lib.errors import InputError

# Three steps, the last one at equilibrium.
TINY = """
    --d_model 8 --n_head 2 --d_head 4 --d_inner 8 --n_layer 1 --eval_n_layer 1 --init_std 0.2
    --tgt_len 8 --mem_len 8 --eval_tgt_len 8 --batch_size 2 --eval_batch_size 2 --f_thres 3
    --b_thres 3 --max_step 3 --pretrain_steps 2 --num_threads 1 --max_eval_steps 2
"""
TEXTS = {"train": "b a\na B b\n", "valid": "B new\n", "test": "é a\n"}
SPLITS = tuple(TEXTS)


@pytest.fixture
def tiny_flags(tmp_path):
    return [*TINY.split(), "--work_dir", str(tmp_path / "runs"), "--name", "run"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my.words"
    folder.mkdir()
    for split, text in TEXTS.items():
        (folder / f"{split}.txt").write_text(text)
    return folder


def arguments(data, *more):
    return parse(["--dataset", "text", "--data", str(data), *more])


def text_of(corpus, split):
    symbols = corpus.vocab.decode(getattr(corpus, split))
    return "".join(symbols).encode("latin-1").decode() if corpus.characters else " ".join(symbols)


def refusal(*argv):
    with pytest.raises(InputError) as error:
        read_corpus(parse(list(argv)))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- a folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words", "valid"),
    [
        ([], ["<eos>", "b", "a", "<unk>"], "<unk> <unk> <eos>"),
        (["--lower_case"], ["<eos>", "b", "a", "<unk>"], "b <unk> <eos>"),
        (["--min_count", "3"], ["<eos>", "<unk>"], "<unk> <unk> <eos>"),
        (["--lower_case", "--min_count", "3"], ["<eos>", "b", "<unk>"], "b <unk> <eos>"),
    ],
)
def test_words(folder, flags, words, valid):
    corpus = read_corpus(arguments(folder, *flags))
    assert corpus.vocab.idx2sym == words
    assert text_of(corpus, "valid") == valid
    again = read_corpus(arguments(folder, *flags))  # from the cache
    assert again.vocab.idx2sym == words
    assert again.vocab.encode(["B"]).tolist() == corpus.vocab.encode(["B"]).tolist()


def test_rare_words_count_as_one(folder):
    (folder / "train.txt").write_text("x y z w w w\n")
    assert read_corpus(arguments(folder)).vocab.idx2sym == ["<eos>", "w", "<unk>"]
    (folder / "train.txt").write_text("x y z <unk> w w w\n")
    assert read_corpus(arguments(folder)).vocab.idx2sym == ["<eos>", "<unk>", "w"]


def test_the_log_says_how_much_is_unknown(folder):
    found = read_corpus(arguments(folder))
    assert (
        found.description == "7 training tokens, 4 types, 66.7 % of the validation tokens are <unk>"
    )


def test_without_unk_an_unknown_word_names_the_way_out(folder):
    message = refusal("--dataset", "text", "--data", str(folder), "--min_count", "1")
    assert message.startswith(f"{folder / 'valid.txt'}, line 1: the word 'new' is not in")
    assert message.endswith("or raise --min_count of --dataset text")


@pytest.mark.parametrize("lower", [False, True])
def test_characters(folder, lower):
    """All bytes of all files are known; a text that begins with numbers is not taken for bytes."""
    (folder / "test.txt").write_text("65 66 É\n")
    corpus = read_corpus(arguments(folder, "--characters", *["--lower_case"] * lower))
    assert corpus.characters
    assert text_of(corpus, "test") == ("65 66 é\n" if lower else "65 66 É\n")
    assert corpus.vocab.join(corpus.vocab.symbols("É a")) == ("é a" if lower else "É a")


# ---- one file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("whole_lines", [True, False])
def test_one_file_is_cut_in_three(tmp_path, share, whole_lines):
    text = "".join(f"{'é ' * (i % 7)}{i}\n" for i in range(200))
    (tmp_path / "all.txt").write_text(text)
    parts = split_file(tmp_path / "all.txt", share, whole_lines=whole_lines)
    assert "".join(parts[split] for split in SPLITS) == text
    slack = 20 if whole_lines else 1  # characters of the longest line
    for split in ("valid", "test"):
        assert abs(len(parts[split]) - share * len(text)) <= slack
    if whole_lines:
        assert all(part.endswith("\n") for part in parts.values())


def test_one_file_is_read_and_kept_apart_from_others(tmp_path):
    for name, word in (("one.txt", "a"), ("two.txt", "b")):
        (tmp_path / name).write_text(f"{word} {word}\n" * 40)
    for _ in range(2):  # the second time from the cache
        for name, word in (("one.txt", "a"), ("two.txt", "b")):
            corpus = read_corpus(arguments(tmp_path / name))
            assert corpus.vocab.idx2sym == ["<eos>", word, "<unk>"]
            assert [text_of(corpus, s).count("<eos>") for s in SPLITS] == [36, 2, 2]
    corpus = read_corpus(arguments(tmp_path / "one.txt", "--held_out", "0.25"))
    assert [text_of(corpus, s).count("<eos>") for s in SPLITS] == [20, 10, 10]
    assert len(list(tmp_path.glob("corpus.*"))) == 2


def test_characters_need_no_lines(tmp_path):
    (tmp_path / "all.txt").write_text("ab" * 50)
    corpus = read_corpus(arguments(tmp_path / "all.txt", "--characters"))
    assert [len(getattr(corpus, split)) for split in SPLITS] == [90, 5, 5]


# ---- the run -------------------------------------------------------------------------------------


def test_the_run_has_the_name_of_the_text(folder, tmp_path):
    args = arguments(folder, "--work_dir", str(tmp_path / "runs"), "--name", "try")
    assert folder_of(args) == tmp_path / "runs-text-my.words" / "try"
    (tmp_path / "plays.txt").write_text("a\n")
    assert data_name(arguments(tmp_path / "plays.txt")) == "text-plays"
    assert data_name(parse(["--dataset", "demo"])) == "demo"


@pytest.mark.parametrize("data", ["text", "state:S3"])
def test_the_progress_of_a_run_is_found(folder, tmp_path, data):
    """Where slurm.sh looks is where the run lies."""
    argv = ["--dataset", data, "--data", str(folder), "--name", "a", "--work_dir", str(tmp_path)]
    found = run_progress.folder_of("train_transformer.py", argv)
    assert found == folder_of(parse([*argv, "--mem_len", "0"]))
    assert ":" not in found.parent.name


@pytest.mark.parametrize("flags", [[], ["--characters"]])
def test_train_and_continue_a_prompt(folder, tmp_path, tiny_flags, flags, capsys):
    for split in SPLITS:
        (folder / f"{split}.txt").write_text("the cat sat on the mat\n" * 40)
    argv = ["--dataset", "text", "--data", str(folder), *flags, *tiny_flags]
    assert main(argv) == 0
    log = (tmp_path / "runs-text-my.words/run/log.txt").read_text()
    assert "\ntext-my.words: " in log
    capsys.readouterr()
    assert main([*argv, "--eval", "--prompt", "the dog" if not flags else "the mat"]) == 0
    *figures, sample = capsys.readouterr().out.splitlines()
    assert ["bpc" in line for line in figures] == [bool(flags)] * 2
    prompt, text = sample[1:].split("] ", 1)
    assert prompt == ("the mat" if flags else "the <unk>")
    known = set("the cat sat on the mat /" if flags else "the cat sat on the mat /".split())
    assert set(text if flags else text.split()) <= known


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--dataset", "text"], "--dataset text needs --data"),
        (["--dataset", "demo", "--lower_case"], "--lower_case has no effect without --dataset"),
        (["--dataset", "demo", "--held_out", "0.1"], "--held_out has no effect without --dataset"),
        (["--characters", "--min_count", "5"], "--min_count has no effect with --characters"),
        (["--held_out", "0.1"], "--held_out has no effect on --data"),
        (["--held_out", "0.5"], "in (0, 0.5)"),
        (["--min_count", "0"], "1 or more"),
        (["--prompt", "a"], "--prompt has no effect without --eval"),
    ],
)
def test_flags_that_do_not_fit(folder, tmp_path, monkeypatch, argv, named):
    monkeypatch.chdir(tmp_path)
    data = [] if "--dataset" in argv else ["--dataset", "text", "--data", str(folder)]
    if "0.5" in argv:
        data[-1] = str(folder / "train.txt")
    assert named in refusal(*data, *argv)


def test_folders_and_files_that_do_not_fit(folder, tmp_path):
    (folder / "valid.txt").unlink()
    gone = ["--dataset", "text", "--data"]
    assert refusal(*gone, str(folder)).startswith(f"{folder / 'valid.txt'} does not exist: name")
    assert "does not exist: name a folder" in refusal(*gone, str(tmp_path / "gone"))
    (tmp_path / "short.txt").write_text("one line\n")
    assert "leaves no valid text" in refusal(*gone, str(tmp_path / "short.txt"))
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9\n" * 40)
    assert "line 2: not UTF-8" in refusal(*gone, str(tmp_path / "latin.txt"), "--characters")
