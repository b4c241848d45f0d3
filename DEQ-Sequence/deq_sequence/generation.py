"""Text generation with a trained model."""

import torch

from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.vocabulary import EOS, ByteVocab, Vocab

_WORDS, _BYTES = 40, 200  # lengths of a continuation


@torch.no_grad()
def generate(
    model: DEQTransformerLM,
    vocab: Vocab,
    prompt: list[str],
    n_words: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    f_thres: int = 30,
    seed: int = 0,
    skip: tuple[str, ...] = ("<unk>",),
) -> list[str]:
    """Sample ``n_words`` words after ``prompt``, one at a time, with the model's memory.

    Args:
        prompt: at least one symbol; all must be in the vocabulary.
        temperature: divisor of the log-probabilities; lower values give more likely text.
        top_k: number of most likely words to sample from at each position.
        skip: symbols that are never sampled.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    banned = [vocab.sym2idx[symbol] for symbol in skip if symbol in vocab.sym2idx]
    data = torch.tensor([[vocab.sym2idx[symbol]] for symbol in prompt], device=device)  # (L, 1)
    mems, words = [], []
    for _ in range(n_words):
        scores, mems = model.log_prob(data, mems, f_thres=f_thres)
        scores = scores[0].float().cpu() / temperature
        scores[banned] = -torch.inf
        best, ids = scores.topk(min(top_k, len(scores)))
        choice = ids[torch.multinomial(best.softmax(0), 1, generator=generator)]
        words += vocab.decode(choice)
        data = choice.view(1, 1).to(device)
    model.train(was_training)
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
