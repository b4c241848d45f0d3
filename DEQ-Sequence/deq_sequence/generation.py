"""Text generation with a trained model."""

from collections.abc import Callable

import torch
from torch import Tensor

from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.vocabulary import EOS, UNK, ByteVocab, Vocab
from lib.errors import InputError, check, check_count, is_number
from lib.runs.evaluation_loop import evaluating

_GREEDY = 1e-6  # temperatures below this one count as 0: float32 could not divide by them
_HOTTEST = 1e9  # by far: at 100 nearly all words are equally likely
_WORDS, _BYTES = 40, 200  # lengths of a continuation
_SEGMENT = 512  # symbols of a prompt that are solved together: attention needs their square


def generate(
    model: DEQTransformerLM,
    vocab: Vocab,
    prompt: list[str],
    n_words: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    f_thres: int = 30,
    seed: int = 0,
    skip: tuple[str, ...] = (UNK,),
    warm_start: bool = False,
    on_word: Callable[[str, int], None] = lambda symbol, evaluations: None,
) -> list[str]:
    """Sample ``n_words`` words after ``prompt``, one at a time, with the model's memory.

    A word w is drawn with a probability proportional to p(w)^(1 / temperature), from the ``top_k``
    most likely ones, and of these from the fewest that together have the probability ``top_p``
    (Holtzman et al. 2020, arXiv 1904.09751). The model's mode and solver statistics are left as
    they were.

    Args:
        vocab: the vocabulary of the model.
        prompt: at least one symbol; one outside the vocabulary stands for ``<unk>``. More than 512
            are solved in segments, with the model's memory in between.
        temperature: lower values give more likely text; 0 always takes the most likely word.
        top_k: number of most likely words to sample from at each position, at least 1; a number
            above the vocabulary's size means all.
        top_p: above 0 and at most 1, which means all of the ``top_k`` words.
        seed: of the draws; torch's own random state is neither used nor changed.
        skip: symbols that are never sampled.
        warm_start: begin each solve at the state of the word before, not at zeros.
        on_word: called with each symbol, and with the number of evaluations of f of the solve that
            gave its probability (for the first symbol, of the solves of the whole prompt).

    Raises:
        InputError: an argument cannot be used, or a symbol of the prompt is unknown and the
            vocabulary has no ``<unk>``.
    """
    check_count("n_words", n_words, 0)
    check_count("top_k", top_k)
    fits = is_number(temperature) and 0 <= temperature < _HOTTEST
    check(fits, "temperature", temperature, f"a number of at least 0, and below {_HOTTEST:g}")
    check(is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    check(type(seed) is int and 0 <= seed < 2**63, "seed", seed, "from 0 to 2^63 - 1")
    fits = isinstance(skip, (tuple, list, set)) and all(isinstance(s, str) for s in skip)
    check(fits, "skip", skip, "a list of symbols")
    size = model.n_token
    check(len(vocab) == size, "the size of the vocabulary", len(vocab), f"{size}, the model's")
    banned = [vocab.sym2idx[symbol] for symbol in set(skip) if symbol in vocab.sym2idx]
    left = size - len(banned)
    check(left > 0, "skip", skip, "fewer symbols than the vocabulary has")
    device = next(model.parameters()).device
    data = _ids(vocab, prompt).to(device)
    count = 1 if temperature < _GREEDY else min(top_k, size)
    generator = torch.Generator().manual_seed(seed)
    mems: list[Tensor] = []
    words: list[str] = []
    with evaluating(model) as stats:
        for _ in range(n_words):
            before = stats.forward.nfe
            for part in data.split(_SEGMENT):
                scores, mems = model.log_prob(part, mems, f_thres=f_thres, warm_start=warm_start)
            scores = scores[0].float().cpu() / max(float(temperature), _GREEDY)
            scores[banned] = -torch.inf
            best, ids = scores.topk(count)
            p = best.softmax(0)
            # The words before it have enough. The first one stays, also where top_p rounds to 0.
            p[1:][(p.cumsum(0) - p)[1:] >= top_p] = 0
            choice = ids[torch.multinomial(p, 1, generator=generator)]
            words += vocab.decode(choice)
            data = choice.view(1, 1).to(device)
            on_word(words[-1], stats.forward.nfe - before)
    return words


def continuation(
    model: DEQTransformerLM,
    vocab: Vocab,
    prompt: list[str],
    f_thres: int,
    seed: int = 0,
    temperature: float = 0.7,
) -> str:
    """One line of text: ``prompt`` in brackets, and 40 words or 200 bytes after it.

    A prompt without a word is the end of a line. The options are those of :func:`generate`.
    """
    begin = prompt or [EOS]
    n = _BYTES if isinstance(vocab, ByteVocab) else _WORDS
    options = {"temperature": temperature, "f_thres": f_thres, "seed": seed}
    return f"[{vocab.join(begin)}] {vocab.join(generate(model, vocab, begin, n, **options))}"


def _ids(vocab: Vocab, prompt: list[str]) -> Tensor:
    """The ids of a prompt, (L, 1)."""
    is_list = isinstance(prompt, (list, tuple)) and all(isinstance(s, str) for s in prompt)
    check(is_list and len(prompt) > 0, "prompt", prompt, "a list of at least one symbol")
    unk = vocab.sym2idx.get(UNK)
    ids = [vocab.sym2idx.get(symbol, unk) for symbol in prompt]
    if None in ids:
        raise InputError(
            f"the symbol {prompt[ids.index(None)]!r} of the prompt is not in the vocabulary, which "
            f"has no {UNK} to stand for it"
        )
    return torch.tensor(ids)[:, None]
