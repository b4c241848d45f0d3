"""get_lm_corpus: which files are counted, the cache, and one clear line for every bad folder."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deq_sequence.text import corpus_cache
from deq_sequence.text.corpus import DATASETS, get_lm_corpus
from deq_sequence.text.text_files import read_bytes
from deq_sequence.text.vocabulary import Vocab
from lib.errors import InputError

TEXTS = {"train": "b a <unk>\na B\n", "valid": "c c c\n\n", "test": "d a\n"}
SPLITS = ("train", "valid", "test")


@pytest.fixture
def datadir(tmp_path):
    return write(tmp_path, TEXTS)


def write(folder, texts):
    for split, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        (folder / f"{split}.txt").write_bytes(content)
    return folder


def ids(corpus):
    return [getattr(corpus, split).tolist() for split in SPLITS]


def message_of(datadir, dataset):
    with pytest.raises(InputError) as error:
        get_lm_corpus(datadir, dataset)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wt103_counts_train_only_and_maps_the_rest_to_unk(datadir):
    corpus = get_lm_corpus(str(datadir), "wt103")
    assert corpus.dataset == "wt103"
    assert corpus.vocab.idx2sym == ["<eos>", "a", "b", "<unk>", "B"]
    assert ids(corpus) == [[2, 1, 3, 0, 1, 4, 0], [3, 3, 3, 0, 0], [3, 1, 0]]
    assert all(getattr(corpus, split).dtype == torch.int64 for split in SPLITS)


def test_wt2_counts_train_valid_and_test_in_this_order(datadir):
    vocab = get_lm_corpus(datadir, "wt2").vocab
    assert vocab.idx2sym == ["<eos>", "a", "c", "b", "<unk>", "B", "d"]


def test_ptb_is_lower_cased(datadir):
    vocab = get_lm_corpus(datadir, "ptb").vocab
    assert vocab.idx2sym == ["<eos>", "a", "c", "b", "<unk>", "d"]


def test_second_call_reads_the_cache_and_gives_the_same(datadir, monkeypatch):
    first = get_lm_corpus(datadir, "ptb")
    monkeypatch.setattr(Vocab, "count", lambda *_: pytest.fail("the texts were read again"))
    second = get_lm_corpus(datadir, "ptb")
    assert ids(second) == ids(first)
    assert second.vocab.idx2sym == first.vocab.idx2sym
    assert second.vocab.encode(["A"]).tolist() == [1, 0]  # still lower-cases
    assert second.train.dtype == torch.int64


def test_cache_is_plain_data_and_kept_per_dataset(datadir):
    get_lm_corpus(datadir, "wt103")
    get_lm_corpus(datadir, "wt2")
    stored = torch.load(datadir / "corpus.wt103.pt", weights_only=True)
    assert stored["idx2sym"] == ["<eos>", "a", "b", "<unk>", "B"]
    assert len(get_lm_corpus(datadir, "wt103").vocab) == 5
    assert len(get_lm_corpus(datadir, "wt2").vocab) == 7
    assert sorted(p.suffix for p in datadir.iterdir()) == [".pt"] * 2 + [".txt"] * 3


def test_changed_text_rebuilds_the_cache(datadir):
    get_lm_corpus(datadir, "wt103")
    valid = datadir / "valid.txt"
    before = valid.stat()
    valid.write_text("a a a\n\n")  # as long as before
    os.utime(valid, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert get_lm_corpus(datadir, "wt103").valid.tolist() == [1, 1, 1, 0, 0]


def test_cache_of_another_format_version_is_rebuilt(datadir, monkeypatch):
    get_lm_corpus(datadir, "wt103")
    calls = []
    count = Vocab.count
    monkeypatch.setattr(Vocab, "count", lambda *args: (calls.append(1), count(*args)))
    get_lm_corpus(datadir, "wt103")
    assert not calls
    monkeypatch.setattr(corpus_cache, "FORMAT_VERSION", corpus_cache.FORMAT_VERSION + 1)
    get_lm_corpus(datadir, "wt103")
    assert calls


def flipped(content: bytes, seed: int) -> bytes:
    changed = bytearray(content)
    changed[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    return bytes(changed)


@pytest.mark.parametrize(
    "damage", ["noise", "empty", "cut", "object", "other", *(f"bit {i}" for i in range(6))]
)
def test_damaged_cache_is_rebuilt(datadir, capsys, damage):
    expected = ids(get_lm_corpus(datadir, "wt103"))
    cache = datadir / "corpus.wt103.pt"
    whole = cache.read_bytes()
    if damage == "object":  # what a pickled corpus of earlier code looks like to weights_only
        torch.save({"key": random.Random(0)}, cache)
    elif damage == "other":
        torch.save([1, 2], cache)
    elif damage.startswith("bit"):
        cache.write_bytes(flipped(whole, int(damage[-1])))
    else:
        cache.write_bytes({"noise": b"noise", "empty": b"", "cut": whole[:-100]}[damage])
    assert ids(get_lm_corpus(datadir, "wt103")) == expected
    said = capsys.readouterr().err
    if not damage.startswith("bit") or said:  # a bit of padding does no harm
        assert said == f"{cache}: damaged; the texts are encoded again\n"
        assert cache.read_bytes() == whole
    assert ids(get_lm_corpus(datadir, "wt103")) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("entry", ["idx2sym", "ids"])
def test_flipped_bit_in_the_content_is_noticed(datadir, capsys, entry):
    corpus = get_lm_corpus(datadir, "wt103")
    expected, cache = ids(corpus), datadir / "corpus.wt103.pt"
    whole = bytearray(cache.read_bytes())
    numbers = corpus.train.int().numpy().tobytes()
    whole[whole.index(numbers if entry == "ids" else b"<eos>") + 4] ^= 1
    cache.write_bytes(whole)
    assert ids(get_lm_corpus(datadir, "wt103")) == expected
    assert f"{cache}: damaged" in capsys.readouterr().err


def test_another_text_of_the_same_size_and_time(datadir):
    """As a copy that keeps the time, or a change within the clock's tick, leaves it."""
    get_lm_corpus(datadir, "wt103")
    path = datadir / "train.txt"
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"B", b"C"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert get_lm_corpus(datadir, "wt103").vocab.idx2sym == ["<eos>", "a", "b", "<unk>", "C"]


def test_many_at_once_make_one_cache(datadir, capsys):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ids(get_lm_corpus(datadir, "wt103")), range(24)))
    assert found == found[:1] * 24
    assert sorted(path.name for path in datadir.glob("[!tv]*")) == ["corpus.wt103.pt"]
    assert ids(get_lm_corpus(datadir, "wt103")) == found[0]
    assert capsys.readouterr().err == ""


def test_unreadable_cache_is_no_error(datadir, monkeypatch, capsys):
    expected = ids(get_lm_corpus(datadir, "wt103"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus_cache.checkpoint, "load", refuse)
    assert ids(get_lm_corpus(datadir, "wt103")) == expected
    assert capsys.readouterr().err.endswith(
        "corpus.wt103.pt: Permission denied; the texts are encoded again\n"
    )


def test_byte_order_mark_is_no_part_of_a_word(datadir):
    expected = get_lm_corpus(datadir, "wt103")
    for split in SPLITS:
        path = datadir / f"{split}.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = get_lm_corpus(datadir, "wt103")
    assert found.vocab.idx2sym == expected.vocab.idx2sym
    assert ids(found) == ids(expected)


def test_folder_that_cannot_be_written_to_is_no_error(datadir, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert get_lm_corpus(datadir, "wt103").train.numel() == 7
    assert sorted(p.name for p in datadir.iterdir()) == ["test.txt", "train.txt", "valid.txt"]


@pytest.mark.parametrize("dataset", ["enwik8", "text8"])
def test_characters_are_raw_bytes_counted_over_all_three(tmp_path, dataset):
    """As published: Z, which only valid has, and the order of a and b, which test decides."""
    write(tmp_path, {"train": b"abb \xc3\xa9\n", "valid": b"Zb a", "test": b"aa\n"})
    corpus = get_lm_corpus(tmp_path, dataset)
    assert corpus.vocab.idx2sym == ["a", "b", " ", "\n", "\xc3", "\xa9", "Z"]
    assert ids(corpus) == [[0, 1, 1, 2, 4, 5, 3], [6, 1, 2, 0], [0, 0, 3]]
    again = get_lm_corpus(tmp_path, dataset)
    assert ids(again) == ids(corpus)
    assert again.vocab.encode([b"a"]).tolist() == [0]


def test_a_cache_from_before_is_not_read(tmp_path):
    """Format 1 of the cache, whose characters were counted in train alone."""
    write(tmp_path, {"train": b"abb", "valid": b"aa", "test": b"a"})
    expected = ids(get_lm_corpus(tmp_path, "enwik8"))
    files = [tmp_path / f"{split}.txt" for split in SPLITS]
    key = [1, "enwik8", [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]]
    old = {split: torch.zeros(3, dtype=torch.int32) for split in SPLITS}
    torch.save({"key": key, "idx2sym": ["b", "a"], "ids": old}, tmp_path / "corpus.enwik8.pt")
    assert ids(get_lm_corpus(tmp_path, "enwik8")) == expected


def test_other_rules_of_counting_make_another_cache(datadir, monkeypatch):
    get_lm_corpus(datadir, "wt103")
    monkeypatch.setitem(DATASETS, "wt103", DATASETS["wt2"])
    assert len(get_lm_corpus(datadir, "wt103").vocab) == 7


def transformer_xl_format(raw: bytes) -> bytes:
    """What Transformer-XL's preparation made of a text."""
    return " ".join("\n" if byte == 10 else str(byte) for byte in raw).encode()


@pytest.mark.parametrize("size", [2, 700, 5000])  # shorter and longer than the probe
def test_numbers_stand_for_bytes(tmp_path, size):
    raw = b"\n\n" + random.Random(size).randbytes(size) + b" \n"
    path = tmp_path / "train.txt"
    path.write_bytes(transformer_xl_format(raw))
    assert read_bytes(path) == raw
    path.write_bytes(raw)
    assert read_bytes(path) == raw


@pytest.mark.parametrize("text", [b"7", b"1 256", b"one 2 3", b"12-13"])
def test_other_text_is_not_taken_for_numbers(tmp_path, text):
    path = tmp_path / "train.txt"
    path.write_bytes(text)
    assert read_bytes(path) == text


@pytest.mark.parametrize("end", [b"300", b"-1", b"and words"])
def test_numbers_that_turn_into_something_else(tmp_path, end):
    write(tmp_path, {"train": b"65 " * 2000 + end, "valid": b"a", "test": b"a"})
    message = message_of(tmp_path, "enwik8")
    assert message.startswith(f"{tmp_path / 'train.txt'} begins as byte values")


def test_unknown_dataset_lists_the_known_ones(datadir):
    assert message_of(datadir, "wt104") == (
        "unknown dataset 'wt104': choose one of wt103, wt2, ptb, enwik8, text8, demo, text"
    )


def test_missing_folder_names_the_ways_out(tmp_path):
    message = message_of(tmp_path / "nowhere", "wt2")
    assert message.startswith(f"data folder {tmp_path / 'nowhere'} does not exist")
    assert "get_data.sh wt2" in message
    assert "--dataset demo" in message


def test_missing_and_empty_files_are_named(datadir):
    (datadir / "valid.txt").write_bytes(b"")
    assert message_of(datadir, "wt103").startswith(f"{datadir / 'valid.txt'} is empty")
    (datadir / "valid.txt").unlink()
    assert message_of(datadir, "wt103").startswith(f"{datadir / 'valid.txt'} does not exist")


def test_text_that_is_not_utf_8_names_file_and_line(datadir):
    (datadir / "test.txt").write_bytes(b"a\nb\n\xe9t\xe9\n")
    assert message_of(datadir, "wt103").startswith(f"{datadir / 'test.txt'}, line 3: not UTF-8")


def test_unknown_word_names_file_and_line(datadir):
    (datadir / "train.txt").write_text("a\n")
    message = message_of(datadir, "wt103")
    assert message.startswith(f"{datadir / 'valid.txt'}, line 1: the word 'c' is not in")


def test_only_the_character_sets_report_bits_per_character():
    assert {name for name, facts in DATASETS.items() if facts.characters} == {"enwik8", "text8"}
