"""The yardstick models: known values, distributions that sum to one, and error lines."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from deq_sequence.text.ngram import (
    KneserNeyBigram,
    kneser_ney_bigram_perplexity,
    unigram_perplexity,
)
from lib.errors import InputError

V = 7


def random_text(length: int, seed: int = 0, words: int = V - 1) -> torch.Tensor:
    """Words 0 .. words - 1, Zipf-like; the last word of the vocabulary never occurs."""
    weights = 1.0 / torch.arange(1, words + 1)
    return torch.multinomial(weights, length, replacement=True, generator=torch.manual_seed(seed))


def test_unigram_of_a_uniform_text_is_the_vocabulary_size():
    text = torch.arange(V).repeat(50)
    assert unigram_perplexity(text, text, V) == pytest.approx(V, rel=1e-6)


def test_unigram_is_the_exponential_of_the_cross_entropy():
    train = torch.tensor([0, 0, 0, 1] * 1000)
    expected = math.exp(-0.5 * (math.log(0.75) + math.log(0.25)))
    # test[0] has no history and is not predicted; the smoothing moves the result by 1e-5.
    result = unigram_perplexity(train, torch.tensor([1, 0, 1]), 2)
    assert result == pytest.approx(expected, rel=1e-4)


def test_unseen_word_has_some_unigram_probability():
    assert math.isfinite(unigram_perplexity(random_text(100), torch.tensor([0, V - 1]), V))


@pytest.mark.parametrize("discount", [None, 0.3, 1.0])
@pytest.mark.parametrize("length", [2, 5, 60, 3000])
def test_bigram_distribution_sums_to_one_for_every_history(length, discount):
    model = KneserNeyBigram(random_text(length), V, discount)
    words = np.arange(V)
    for history in range(V):
        p = model.probability(np.full(V, history), words)
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
        assert (p > 0).all()


def test_bigram_equals_the_equation_written_out():
    train = random_text(40).tolist()
    pairs = list(pairwise(train))
    model = KneserNeyBigram(torch.tensor(train), V)
    counts = {pair: pairs.count(pair) for pair in pairs}
    n1, n2 = (list(counts.values()).count(n) for n in (1, 2))
    discount = n1 / (n1 + 2 * n2)
    assert model.discount == discount
    seen_words = len({w for _, w in counts})
    for h in range(V):
        c_h = sum(counts.get((h, w), 0) for w in range(V))
        followers = sum((h, w) in counts for w in range(V))
        for w in range(V):
            before = sum((u, w) in counts for u in range(V))
            p = max(before - discount, 0) / len(counts)
            p += discount * seen_words / len(counts) / V
            if c_h:
                p *= discount * followers / c_h
                p += max(counts.get((h, w), 0) - discount, 0) / c_h
            assert model.probability(np.array([h]), np.array([w]))[0] == pytest.approx(p, rel=1e-12)


def test_bigram_finds_what_the_unigram_cannot():
    text = torch.tensor([0, 1, 2, 3] * 500)
    assert unigram_perplexity(text, text, 4) == pytest.approx(4, rel=1e-3)
    assert kneser_ney_bigram_perplexity(text, text, 4) < 1.01


def test_perplexity_is_that_of_the_pairs():
    train, test = random_text(500), random_text(50, seed=1)
    model = KneserNeyBigram(train, V)
    log_p = np.log(model.probability(test[:-1].numpy(), test[1:].numpy()))
    expected = math.exp(-log_p.mean())
    assert kneser_ney_bigram_perplexity(train, test, V) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("perplexity", [unigram_perplexity, kneser_ney_bigram_perplexity])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1, 7], [0, 1], "token ids go from 0 to 7, outside the vocabulary of n_token=7"),
        ([0, 1], [-1, 1], "token ids go from -1 to 1, outside"),
        ([0, 1], [1], "the text has 1 tokens: give at least 2"),
    ],
)
def test_unusable_texts_are_refused(perplexity, train, test, message):
    with pytest.raises(InputError, match=message):
        perplexity(torch.tensor(train), torch.tensor(test), V)


@pytest.mark.parametrize("discount", [0, 1.5, -0.1])
def test_discount_outside_its_range_is_refused(discount):
    with pytest.raises(InputError, match=f"discount is {discount}: give a number above 0"):
        kneser_ney_bigram_perplexity(random_text(9), random_text(9), V, discount)
