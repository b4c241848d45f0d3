"""Ids by falling count, <eos> per line, <unk> for the rest, and bytes for character sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deq_sequence.text.vocabulary import ByteVocab, Vocab
from lib.errors import InputError


def built(*lines: str, **options) -> Vocab:
    vocab = Vocab(**options)
    vocab.count(lines)
    vocab.build()
    return vocab


def test_ids_by_falling_count_with_ties_in_first_seen_order():
    vocab = built("  d c b \n", "b a\tc c\n", "\n")
    assert vocab.idx2sym == ["<eos>", "c", "b", "d", "a"]
    assert vocab.sym2idx == {"<eos>": 0, "c": 1, "b": 2, "d": 3, "a": 4}
    assert len(vocab) == 5


def test_counts_add_up_over_texts_before_build():
    vocab = Vocab()
    vocab.count(["a b"])
    vocab.count(["b"])
    vocab.build()
    assert vocab.idx2sym == ["<eos>", "b", "a"]


def test_every_line_ends_in_eos_and_a_blank_line_is_a_lone_one():
    vocab = built("a b", "a")
    ids = vocab.encode(["  a  b \n", " \n", "b"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 2, 0, 0, 2, 0]
    assert vocab.decode(ids) == ["a", "b", "<eos>", "<eos>", "b", "<eos>"]


def test_literal_eos_in_the_text_is_the_same_symbol():
    vocab = built("<eos> a <eos>")
    assert vocab.idx2sym == ["<eos>", "a"]
    assert vocab.encode(["a <eos>"]).tolist() == [1, 0, 0]


def test_lower_case_applies_to_counting_and_encoding():
    vocab = built("The the THE Cat", lower_case=True)
    assert vocab.idx2sym == ["<eos>", "the", "cat"]
    assert vocab.encode(["CAT"]).tolist() == [2, 0]
    assert built("The the").idx2sym == ["<eos>", "The", "the"]


def test_unknown_word_is_unk_if_that_is_a_word():
    vocab = built("<unk> a a")
    assert vocab.encode(["a new word", "a"]).tolist() == [1, 2, 2, 0, 1, 0]


def test_unknown_word_without_unk_names_word_source_and_line():
    with pytest.raises(InputError) as error:
        built("a b").encode(["a\n", "b zebra\n"], source="valid.txt")
    message = str(error.value)
    assert message.startswith("valid.txt, line 2: the word 'zebra' is not in the vocabulary")
    assert "\n" not in message


def test_nothing_encodes_to_an_empty_long_tensor():
    ids = built("a").encode([])
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("bad", [-1, 2])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(bad):
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of 2 symbols"):
        built("a").decode([0, bad])


@given(st.lists(st.text(max_size=30), max_size=20))
def test_decoding_gives_the_words_back(lines):
    vocab = built(*lines)
    words = [word for line in lines for word in [*line.split(), "<eos>"]]
    assert vocab.decode(vocab.encode(lines)) == words


def test_restored_from_symbols_encodes_alike():
    vocab = built("B a b", lower_case=True)
    again = Vocab.from_symbols(vocab.idx2sym, lower_case=True)
    assert again.encode(["A B"]).tolist() == vocab.encode(["A B"]).tolist()


def test_bytes_have_no_eos_and_keep_white_space():
    vocab = ByteVocab()
    vocab.count([b"ab b\n"])
    vocab.build()
    assert vocab.idx2sym == ["b", "a", " ", "\n"]
    ids = vocab.encode([b"b\n", b"a"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [0, 3, 1]


@given(st.binary(min_size=1))
def test_bytes_come_back_through_latin_1(raw):
    vocab = ByteVocab()
    vocab.count([raw])
    vocab.build()
    assert "".join(vocab.decode(vocab.encode([raw]))).encode("latin-1") == raw


def test_unknown_byte_names_byte_source_and_position():
    vocab = ByteVocab()
    vocab.count([b"ab"])
    vocab.build()
    with pytest.raises(InputError) as error:
        vocab.encode([b"ab\xffa"], source="test.txt")
    message = str(error.value)
    assert message.startswith("test.txt, byte 2: the byte 0xff does not occur")
    assert "\n" not in message
