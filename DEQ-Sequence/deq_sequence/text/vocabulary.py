"""The map from symbols (words or bytes) to token ids and back."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from lib.errors import InputError

EOS = "<eos>"
UNK = "<unk>"


class Vocab:
    """A vocabulary of words. First ``count`` lines, then ``build``, then ``encode`` and ``decode``.

    A line is stripped and split at white space, and ``<eos>`` ends every line (a blank line is
    only ``<eos>``). Id 0 is ``<eos>``, which is not counted. The other ids are the words in order
    of falling count; words of equal count are in first-seen order. These are the rules of
    Transformer-XL (Dai et al. 2019, arXiv 1901.02860), so ids agree with the published weights.

    With a ``min_count`` above 1, words that were counted less often are left out: they become
    ``<unk>``, which is then a word of the vocabulary, with the sum of their counts.

    Attributes:
        idx2sym: list of str, the symbol of each id.
        sym2idx: dict of str to int, the id of each symbol.
    """

    def __init__(self, *, lower_case: bool = False, min_count: int = 1):
        self.lower_case, self.min_count = lower_case, min_count
        self.counter: Counter = Counter()
        self._set_symbols([])

    @classmethod
    def from_symbols(cls, idx2sym: list[str], *, lower_case: bool = False) -> "Vocab":
        """Build a vocabulary, such as from a cache; the ids are the positions in ``idx2sym``."""
        vocab = cls(lower_case=lower_case)
        vocab._set_symbols(idx2sym)
        return vocab

    def __len__(self) -> int:
        return len(self.idx2sym)

    def count(self, lines: Iterable[str]) -> None:
        """Add the words of ``lines`` to the counts; ids change only at the next ``build``."""
        for line in lines:
            self.counter.update(self._split(line))

    def build(self) -> None:
        """Assign ids according to the counts so far."""
        counts = self.counter
        if self.min_count > 1:
            rare = sum(count for count in counts.values() if count < self.min_count)
            kept = {word: count for word, count in counts.items() if count >= self.min_count}
            counts = Counter(kept | {UNK: kept.get(UNK, 0) + rare})
        # most_common keeps first-seen order among equal counts. A literal <eos> in the text gets
        # no second entry: it is the end-of-line symbol.
        words = (word for word, _ in counts.most_common() if word != EOS)
        self._set_symbols([EOS, *words])

    def encode(self, lines: Iterable[str], source: str = "text") -> torch.Tensor:
        """Token ids of ``lines``, a 1-d LongTensor with one ``<eos>`` per line.

        A word outside the vocabulary becomes ``<unk>`` if the vocabulary contains ``<unk>``.

        Raises:
            InputError: a word is unknown and there is no ``<unk>``; the message names the word,
                the ``source`` and the line.
        """
        ids = array("i")  # 4 bytes per token; a list needs 36, and WikiText-103 has 103 million
        lookup, unk = self.sym2idx, self.sym2idx.get(UNK)
        for number, line in enumerate(lines, start=1):
            try:
                ids.fromlist([lookup[word] for word in self._split(line)])
            except KeyError as error:
                if unk is None:
                    raise InputError(
                        f"{source}, line {number}: the word {error.args[0]!r} is not in the "
                        f"vocabulary, which has no {UNK} to stand for it: "
                        f"write {UNK} for rare words in the training text, or raise --min_count "
                        "of --dataset text"
                    ) from None
                ids.fromlist([lookup.get(word, unk) for word in self._split(line)])
            ids.append(lookup[EOS])
        return torch.from_numpy(np.asarray(ids)).long()

    def fingerprint(self) -> str:
        """A short text that changes if any id changes."""
        digest = hashlib.sha256("\0".join(self.idx2sym).encode()).hexdigest()
        return f"{len(self)} types ({digest[:12]})"

    def decode(self, ids: torch.Tensor | Iterable[int]) -> list[str]:
        """Symbols of token ids (any 1-d tensor or iterable of ints).

        Raises:
            InputError: an id is outside ``[0, len(self))``.
        """
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        for i in ids:
            if not 0 <= i < len(self):  # a negative index would count from the end of the list
                raise InputError(f"token id {i} is outside the vocabulary of {len(self)} symbols")
        return [self.idx2sym[i] for i in ids]

    def symbols(self, text: str) -> list[str]:
        """The symbols of a prompt: its lines, the last one without its end; errors as in encode."""
        return self.decode(self.encode(text.strip().split("\n"))[:-1])

    def join(self, symbols: Iterable[str]) -> str:
        """The text that symbols stand for, in one line; a slash for the end of a line."""
        return " ".join("/" if symbol == EOS else symbol for symbol in symbols)

    def _split(self, line: str) -> list[str]:
        return (line.lower() if self.lower_case else line).split()

    def _set_symbols(self, idx2sym: list[str]) -> None:
        self.idx2sym = list(idx2sym)
        self.sym2idx = {symbol: i for i, symbol in enumerate(self.idx2sym)}


class ByteVocab(Vocab):
    """A vocabulary of bytes, for the character data sets enwik8 and text8.

    Ids are in order of falling count; bytes of equal count are in first-seen order. There is no
    ``<eos>``. The symbol of a byte is the character with that code point (latin-1), so
    ``"".join(vocab.decode(ids)).encode("latin-1")`` returns the bytes.
    """

    def count(self, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            self.counter.update(block)

    def build(self) -> None:
        self._set_symbols([chr(byte) for byte, _ in self.counter.most_common()])

    def encode(self, blocks: Iterable[bytes], source: str = "text") -> torch.Tensor:
        """Token ids of ``blocks``, a 1-d LongTensor with one id per byte.

        Raises:
            InputError: a byte is not in the vocabulary.
        """
        raw = b"".join(blocks)
        table = np.full(256, -1, dtype=np.int64)
        for i, symbol in enumerate(self.idx2sym):
            table[ord(symbol)] = i
        ids = table[np.frombuffer(raw, dtype=np.uint8)]
        if ids.size and ids.min() < 0:
            position = int(ids.argmin())
            raise InputError(
                f"{source}, byte {position}: the byte {raw[position]:#04x} does not occur in the "
                f"counted text: count all files that are to be encoded"
            )
        return torch.from_numpy(ids)

    def symbols(self, text: str) -> list[str]:
        text = text.lower() if self.lower_case else text
        # Python keeps a command line's bytes that are not UTF-8 in this form.
        return self.decode(self.encode([text.encode(errors="surrogateescape")]))

    def join(self, symbols: Iterable[str]) -> str:
        text = "".join(symbols).encode("latin-1").decode(errors="replace")
        return text.replace("\n", "/")
