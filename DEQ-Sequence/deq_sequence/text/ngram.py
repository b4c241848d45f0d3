"""Perplexities of unigram and bigram models, as references for a neural model.

A network that has learnt only word frequencies has the unigram perplexity. A network that uses its
context must be better than the bigram model. Both models predict every token of a text except the
first, as ``LMOrderedIterator`` with one stream does, so the perplexities are comparable.
"""

import math

import numpy as np
import torch

from lib.errors import InputError

UNIGRAM_SMOOTHING = 0.01  # added to each count, so that an unseen word has a probability above 0


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor, n_token: int) -> float:
    """Perplexity of word frequencies on ``test[1:]``: p(w) = (c(w) + 0.01) / (N + 0.01 n_token).

    ``train`` and ``test`` are 1-d LongTensors of ids below ``n_token``, the size of the vocabulary;
    N is the length of ``train``, and c(w) the count of w in it.

    Raises:
        InputError: an id is outside the vocabulary, or a text has fewer than two tokens.
    """
    train_ids, test_ids = _ids(train, n_token), _ids(test, n_token)
    counts = np.bincount(train_ids, minlength=n_token) + UNIGRAM_SMOOTHING
    return _perplexity((counts / counts.sum())[test_ids[1:]])


def kneser_ney_bigram_perplexity(
    train: torch.Tensor, test: torch.Tensor, n_token: int, discount: float | None = None
) -> float:
    """Perplexity of the interpolated Kneser-Ney bigram model on ``test[1:]``.

    Arguments and errors are those of ``KneserNeyBigram`` and ``unigram_perplexity``.
    """
    model = KneserNeyBigram(train, n_token, discount)
    test_ids = _ids(test, n_token)
    return _perplexity(model.probability(test_ids[:-1], test_ids[1:]))


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram model.

        p(w | h) = max(c(h, w) - D, 0) / c(h) + D N(h) / c(h) p_cont(w)
        p_cont(w) = max(N(w) - D, 0) / N + D V / N / n_token

    - c(h, w): count of w after h; c(h): the sum of c(h, w) over w
    - N(h): number of different words after h
    - N(w): number of different words before w
    - N: number of different pairs (h, w)
    - V: number of words with N(w) > 0

    After an unseen history h, p = p_cont. Both distributions sum to one over the vocabulary, and
    every word has a probability above zero.

    Sources: Kneser & Ney 1995, "Improved backing-off for m-gram language modeling"; the
    interpolated form and D = n1 / (n1 + 2 n2), with n1 and n2 the numbers of pairs seen once and
    twice: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling".

    Args:
        train: 1-d LongTensor of at least two ids below ``n_token``.
        n_token: size of the vocabulary.
        discount: D in (0, 1]; None estimates D as above. If no pair was seen once, the estimate
            would be 0 and unseen pairs would have probability zero, so D is 0.5.

    Raises:
        InputError: an id is outside the vocabulary, the text has fewer than two tokens, or the
            discount is outside (0, 1].
    """

    def __init__(self, train: torch.Tensor, n_token: int, discount: float | None = None):
        ids = _ids(train, n_token)
        self.n_token = n_token
        # The pair (h, w) is the number h * n_token + w: np.unique counts pairs by sorting, and
        # bisection looks them up.
        pairs, counts = np.unique(ids[:-1] * n_token + ids[1:], return_counts=True)
        if discount is None:
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / (once + 2 * twice) if once else 0.5
        if not 0 < discount <= 1:
            raise InputError(f"discount is {discount}: give a number above 0 and at most 1")
        self.discount = discount
        self._pairs, self._pair_counts = pairs, counts
        self._history_counts = np.bincount(ids[:-1], minlength=n_token)
        self._followers = np.bincount(pairs // n_token, minlength=n_token)
        predecessors = np.bincount(pairs % n_token, minlength=n_token)
        spare = discount * np.count_nonzero(predecessors)
        self._continuation = np.maximum(predecessors - discount, 0) + spare / n_token
        self._continuation /= len(pairs)

    def probability(self, history: np.ndarray, word: np.ndarray) -> np.ndarray:
        """p(word | history), element by element: int64 arrays (n,) -> float64 (n,)."""
        pair = history * self.n_token + word
        place = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
        pair_count = np.where(self._pairs[place] == pair, self._pair_counts[place], 0)
        total = self._history_counts[history]
        seen = np.maximum(total, 1)  # no division by zero: unseen histories are replaced below
        direct = np.maximum(pair_count - self.discount, 0) / seen
        backoff = np.where(total > 0, self.discount * self._followers[history] / seen, 1.0)
        return direct + backoff * self._continuation[word]


def _ids(tokens: torch.Tensor, n_token: int) -> np.ndarray:
    ids = tokens.numpy()
    if ids.size < 2:
        raise InputError(f"the text has {ids.size} tokens: give at least 2, one to predict")
    if ids.min() < 0 or ids.max() >= n_token:
        raise InputError(
            f"token ids go from {ids.min()} to {ids.max()}, outside the vocabulary of "
            f"n_token={n_token} words: encode the text with the vocabulary it is scored under"
        )
    return ids


def _perplexity(probabilities: np.ndarray) -> float:
    return math.exp(-float(np.log(probabilities).mean()))
