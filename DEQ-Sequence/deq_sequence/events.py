"""What TensorBoard shows of a language model beside scalars: its text, and the curves."""

import io
import time

from deq_sequence.generation import generate
from deq_sequence.model import DEQTransformerLM
from deq_sequence.text.corpus import Corpus
from deq_sequence.text.vocabulary import ByteVocab
from deq_sequence.text_report import draw_perplexity, prompts
from lib.errors import InputError, needs
from lib.runs.figures import draw_curves
from lib.runs.run_folder import Run, read_metrics

_WORDS, _BYTES = 20, 60  # of a generated text: a small part of the time of a validation
_PAUSE = 30.0  # seconds between two drawings of the curves, which take about half a second


class TextEvents:
    """Writes to the events of a run after each validation."""

    def __init__(self):
        self._drawn = time.monotonic()

    def sample(self, run: Run, step: int, model: DEQTransformerLM, corpus: Corpus, f_thres) -> None:
        """Show a generated text, the same with the same weights.

        Torch's random state is neither used nor changed: a run is the same with and without it.
        """
        if run.folder is not None:
            # Imported here, and below: slow, and no use of a trained model needs it.
            with needs("words"):
                from tensorboardX.summary import text
            run.show(step, text("generated text", _sample(model, corpus, f_thres)))

    def curves(self, run: Run, step: int, border: int) -> None:
        """Show the curves, if half a minute has passed; ``border``: the first step solved."""
        if run.folder is not None and time.monotonic() > self._drawn + _PAUSE:
            run.show(step, _curves(run, border))
            self._drawn = time.monotonic()


def _sample(model: DEQTransformerLM, corpus: Corpus, f_thres: int) -> str:
    """A line from the model; in backquotes, as TensorBoard takes a text for Markdown."""
    vocab = corpus.vocab
    n = _BYTES if isinstance(vocab, ByteVocab) else _WORDS
    prompt = prompts(corpus)[0] or vocab.decode(corpus.test[: n // 2])
    try:
        words = generate(model, vocab, prompt, n, f_thres=f_thres, temperature=0.7)
    except InputError as error:  # such as a vocabulary of <unk> alone: training goes on
        return str(error)
    return f"`[{vocab.join(prompt)}] {vocab.join(words)}`"


def _curves(run: Run, border: int):
    """A summary of tensorboardX."""
    with needs("words"):
        from tensorboardX.proto.summary_pb2 import Summary
    records, file = read_metrics(run.folder), io.BytesIO()
    draw_curves(records, border, file, lambda axes: draw_perplexity(axes, records, {}))
    image = Summary.Image(encoded_image_string=file.getvalue())
    return Summary(value=[Summary.Value(tag="curves", image=image)])
