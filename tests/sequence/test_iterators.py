"""LMOrderedIterator: streams, shifted targets, the short last batch, starts, random lengths."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deq_sequence.text.iterators import LMOrderedIterator
from lib.errors import InputError


def test_columns_are_contiguous_stretches_and_the_rest_is_trimmed():
    batches = LMOrderedIterator(torch.arange(23), bsz=3, bptt=3)
    assert batches.data.T.tolist() == [list(range(0, 7)), list(range(7, 14)), list(range(14, 21))]


def test_batches_of_a_small_text():
    batches = list(LMOrderedIterator(torch.arange(16), bsz=2, bptt=3))
    assert [b[2] for b in batches] == [3, 3, 1]  # rows - 1 - i for the last
    data, target, _ = batches[1]
    assert data.tolist() == [[3, 11], [4, 12], [5, 13]]
    assert target.tolist() == [[4, 12], [5, 13], [6, 14]]
    assert batches[2][1].tolist() == [[7, 15]]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(2, 40), st.integers(0, 6))
def test_every_position_is_predicted_once(bsz, bptt, rows, ext_len):
    tokens = torch.arange(rows * bsz + bsz - 1)
    iterator = LMOrderedIterator(tokens, bsz, bptt, ext_len=ext_len)
    batches = list(iterator)
    assert len(batches) == len(iterator)
    assert torch.equal(torch.cat([target for _, target, _ in batches]), iterator.data[1:])
    for i, (data, target, seq_len) in zip(range(0, rows, bptt), batches, strict=False):
        assert data.shape == (min(i, ext_len) + seq_len, bsz)
        assert target.shape == (seq_len, bsz)
        assert torch.equal(data[-seq_len:] + 1, target)  # arange: the next token is one more
        assert torch.equal(data, iterator.data[max(0, i - ext_len) : i + seq_len])


def test_iteration_goes_on_from_a_row():
    iterator = LMOrderedIterator(torch.arange(50), bsz=2, bptt=4)
    whole, rest = list(iterator), list(iterator.iterate(8))
    assert len(rest) == len(whole) - 2
    for expected, got in zip(whole[2:], rest, strict=True):
        assert torch.equal(expected[0], got[0])
        assert torch.equal(expected[1], got[1])
    assert list(iterator.iterate(24)) == []  # a finished pass


def test_random_lengths_cover_the_text_and_stay_in_bounds():
    iterator = LMOrderedIterator(torch.arange(20_001), bsz=1, bptt=20)
    batches = list(iterator.iterate_varlen(generator=random.Random(0)))
    assert torch.equal(torch.cat([target for _, target, _ in batches]), iterator.data[1:])
    lengths = [seq_len for _, _, seq_len in batches[:-1]]
    assert min(lengths) >= 5
    assert max(lengths) <= 35
    # 0.95 * 20 + 0.05 * 10 = 19.5, less 0.5 for rounding down; the mean of 1000 is good to 0.5.
    assert sum(lengths) / len(lengths) == pytest.approx(19, abs=0.6)


def test_random_lengths_repeat_from_the_generators_state():
    iterator = LMOrderedIterator(torch.arange(2000), bsz=2, bptt=20)
    generator = random.Random(7)
    walk = iterator.iterate_varlen(generator=generator)
    row = sum(next(walk)[2] for _ in range(5))
    state = generator.getstate()
    rest = [seq_len for _, _, seq_len in walk]

    resumed = random.Random()
    resumed.setstate(state)
    assert [n for _, _, n in iterator.iterate_varlen(row, resumed)] == rest
    assert len(set(rest)) > 3


def test_single_batches_can_be_asked_for():
    iterator = LMOrderedIterator(torch.arange(20), bsz=2, bptt=3)
    assert iterator.get_batch(4, bptt=2)[0].tolist() == [[4, 14], [5, 15]]
    assert iterator.get_batch(8)[2] == 1
    for row in (-1, 9):
        with pytest.raises(InputError, match=f"no batch starts at row {row}: rows go from 0 to 8"):
            iterator.get_batch(row)


@pytest.mark.parametrize("method", ["iterate", "iterate_varlen"])
@pytest.mark.parametrize("start", [-1, 10])
def test_start_outside_the_text_is_refused_at_once(method, start):
    iterator = LMOrderedIterator(torch.arange(20), bsz=2, bptt=3)
    with pytest.raises(InputError, match=f"start row {start} is outside the text: rows 0 to 9"):
        getattr(iterator, method)(start)


def test_text_that_is_too_small_names_batch_size_and_tokens():
    LMOrderedIterator(torch.arange(8), bsz=4, bptt=3)
    with pytest.raises(InputError) as error:
        LMOrderedIterator(torch.arange(7), bsz=4, bptt=3)
    message = str(error.value)
    assert "the text has 7 tokens" in message
    assert "(bsz) of 4" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"bsz": 0, "bptt": 3}, "bsz is 0: give 1 or more"),
        ({"bsz": 2, "bptt": 0}, "bptt is 0: give 1 or more"),
        ({"bsz": 2, "bptt": 3, "ext_len": -1}, "ext_len is -1: give 0 or more"),
    ],
)
def test_sizes_below_the_least_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        LMOrderedIterator(torch.arange(20), **sizes)
