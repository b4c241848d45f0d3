"""What the tests of DEQ-Sequence share: a small text, and a model that trains on it in a second."""

import random
from pathlib import Path

import pytest
import torch

from deq_sequence.command import build_model, main
from deq_sequence.events import TextEvents
from deq_sequence.options import parse
from deq_sequence.text.corpus import get_lm_corpus
from deq_sequence.text_trainer import LMTrainer
from lib.runs.run_folder import read_metrics

TINY = """
    --d_model 16 --n_head 2 --d_head 8 --d_inner 32 --n_layer 2 --eval_n_layer 2 --init_std 0.2
    --tgt_len 8 --mem_len 8 --eval_tgt_len 16 --batch_size 4 --eval_batch_size 4
    --max_eval_steps 4 --f_thres 6 --b_thres 6 --max_step 6 --pretrain_steps 3 --lr 0.01
    --log-interval 1 --num_threads 1
"""


def write_corpus(folder: Path, words: int = 150, seed: int = 0) -> None:
    """A folder as get_data.sh makes it of WikiText-103, with text that can be learnt a little.

    Every word has a few favourite successors, so that a model gains on the word frequencies.
    """
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)] + [",", "."]
    successors = {word: rng.choices(vocabulary, k=3) for word in vocabulary}
    folder.mkdir(parents=True, exist_ok=True)
    for split, n_articles in (("train", 30), ("valid", 6), ("test", 6)):
        lines = []
        for article in range(n_articles):
            lines += [" ", f" = Article {article % 5} = ", " "]
            for _ in range(4):
                word, paragraph = rng.choice(vocabulary), []
                for _ in range(30):
                    paragraph.append("<unk>" if rng.random() < 0.03 else word)
                    near = rng.random() < 0.8
                    word = rng.choice(successors[word] if near else vocabulary)
                lines.append(" " + " ".join(paragraph) + " ")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _without_texts(monkeypatch, request):
    """The text that a validation generates takes a quarter of the time of a run this small.

    A run is the same with and without it, which test_events.py tests.
    """
    if request.path.name != "test_events.py":
        monkeypatch.setattr(TextEvents, "sample", lambda *arguments: None)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A small text in WikiText-103's format. Do not write to it: copy it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def small_corpus(corpus_folder):
    return get_lm_corpus(corpus_folder, "wt103")


@pytest.fixture
def flags(corpus_folder, tmp_path):
    """The command line of a short run through both phases, whose run folder is ``run_folder``."""
    places = ["--data", str(corpus_folder), "--work_dir", str(tmp_path / "runs"), "--name", "run"]
    return [*TINY.split(), *places]


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "runs-wt103" / "run"


@pytest.fixture
def train(flags, run_folder):
    """Train in this process with more flags (another run needs a name); the run's records."""

    def run(*more, name="run"):
        assert main([*flags, "--name", name, *map(str, more)]) == 0
        return read_metrics(run_folder.parent / name)

    return run


@pytest.fixture
def make_trainer(flags, small_corpus):
    """A trainer as train_transformer.py builds it, to look into."""

    def make(*more):
        args = parse([*flags, *map(str, more)])
        torch.manual_seed(args.seed)
        torch.set_num_threads(1)
        device = torch.device("cpu")
        return LMTrainer(args, build_model(args, small_corpus, device), small_corpus, device)

    return make
