"""deq_sequence.load: the same model from a run's folder and from one file; what is refused."""

import json
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deq_sequence
from deq_sequence.trained import KIND, of_run
from export_weights import main as export
from lib.errors import InputError
from lib.runs.checkpoint import load_weights
from lib.runs.model_file import FORM, KEY, SUM, digest, read_model_file
from lib.solvers import anderson

WORDS = Path(__file__).parents[2] / "docs/models/words.safetensors"
TEXT = "the value of the object is a list of names"


@pytest.fixture(scope="session")
def words():
    """The trained model in the repository. Do not change it."""
    return deq_sequence.load(WORDS)


@pytest.fixture
def run(train, run_folder):
    train()
    return run_folder


def change(path: Path, edit) -> None:
    """Edit the text of a model file's header in place: a list of characters of the same length."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = edit(data[8 : 8 + size].decode())
    assert len(header.encode()) == size
    path.write_bytes(data[:8] + header.encode() + data[8 + size :])


def test_the_model_of_the_repository(words):
    assert not words.model.training
    assert words.vocabulary.fingerprint() == "5966 types (5e39a41e94cd)"
    assert words.settings.f_thres == 6
    assert words.figures["final_test"]["loss"] < 4.4
    assert words.perplexity(TEXT) < 150  # 5,966 words: chance is 5,966
    assert words.generate("the object", 5, seed=1) == words.generate("the object", 5, seed=1)
    assert "/" not in json.dumps(vars(words.settings)["data"])
    page = WORDS.with_suffix(".md").read_text("utf-8")
    parameters = sum(p.numel() for p in words.model.parameters())
    assert f"| parameters | {parameters:,} |" in page
    assert "verdict of the audit" in page


def test_token_by_token_is_the_whole_sequence(words):
    """With solves that converge, the kept memory is what the whole text would give."""
    ids = words.encode(TEXT)
    model = words.model
    solver, length = model.f_solver, model.mem_len
    try:
        model.f_solver = partial(anderson, eps=1e-7)
        model.reset_length(None, len(ids))
        whole = model.log_probs(ids[:, None], f_thres=200)[:, 0]
        mems, found = [], []
        for token in ids:
            p, mems = model.log_prob(token.view(1, 1), mems, f_thres=200)
            found.append(p[0])
        assert torch.allclose(torch.stack(found), whole, rtol=0, atol=1e-4)
        warm, _ = model.log_prob(ids[:1, None], [], f_thres=200, warm_start=True)
        assert torch.equal(warm[0], found[0])  # without memory there is no other start
        _, mems = model.log_prob(ids[:-1, None], [], f_thres=200)
        warm, _ = model.log_prob(ids[-1:, None], mems, f_thres=200, warm_start=True)
        assert torch.allclose(warm[0], whole[-1], rtol=0, atol=1e-4)
    finally:
        model.f_solver = solver
        model.reset_length(model.tgt_len, length)


def test_a_run_and_its_export_are_the_same_model(run, small_corpus, tmp_path, capsys):
    assert json.loads((run / "vocabulary.json").read_text()) == small_corpus.vocab.idx2sym
    target = tmp_path / "new" / "own.safetensors"
    assert export([str(run), str(target)]) == 0
    state = torch.get_rng_state()
    own, file = deq_sequence.load(run), deq_sequence.load(str(target))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in own.model.state_dict().items():
        assert torch.equal(value, file.model.state_dict()[name]), name
    assert file.vocabulary.idx2sym == own.vocabulary.idx2sym == small_corpus.vocab.idx2sym
    assert file.figures == own.figures
    assert file.figures["final_test"]["tokens"] > 0
    assert own.perplexity("w1 w2 w3 w4") == file.perplexity("w1 w2 w3 w4")
    assert own.generate("w1", 5) == file.generate("w1", 5)
    load_weights(own.model, target)  # as --load does: the tied names are there
    assert str(run.parent.parent) not in target.with_suffix(".md").read_text()
    assert str(run.parent.parent).encode() not in target.read_bytes()


def test_a_run_without_its_vocabulary(run, flags, tmp_path):
    """An older run: the words come from its text, if that is still there and the same."""
    before = deq_sequence.load(run).vocabulary.idx2sym
    (run / "vocabulary.json").unlink()
    assert deq_sequence.load(run).vocabulary.idx2sym == before
    settings = json.loads((run / "settings.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(settings["data"], copy)
    (run / "settings.json").write_text(json.dumps(settings | {"data": str(copy)}))
    with (copy / "train.txt").open("a") as file:
        file.write("some newer words\n")
    with pytest.raises(InputError, match="was trained with the vocabulary"):
        deq_sequence.load(run)
    shutil.rmtree(copy)
    with pytest.raises(InputError, match="is missing, and so is the text of the run"):
        deq_sequence.load(run)


@pytest.mark.parametrize("content", ["[1, 2]", "{", '["\\ud800"]', '["<eos>", "w1"]'])
def test_a_wrong_vocabulary(run, content):
    (run / "vocabulary.json").write_text(content)
    with pytest.raises(InputError, match="is not the vocabulary of the run"):
        deq_sequence.load(run)


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda text: text.replace("language model", "language mode1"), "or is damaged"),
        (lambda text: text.replace('\\"function\\"', '\\"fUnction\\"'), "or is damaged"),
        (lambda text: text.replace(KEY, "deq.mode1"), "does not say what model"),
        (lambda text: text.replace('\\"form\\": 1', '\\"form\\": 2'), "or is damaged"),
        (lambda text: text.replace("crit.out_layers", "crit.oUt_layers"), "not a readable"),
    ],
    ids=["kind", "word", "key", "form", "tie"],
)
def test_a_damaged_file(tmp_path, edit, part):
    path = shutil.copy(WORDS, tmp_path / "copy.safetensors")
    assert deq_sequence.load(path).model is not None
    before = path.read_bytes()
    change(path, edit)
    assert path.read_bytes() != before
    with pytest.raises(InputError, match=part):
        deq_sequence.load(path)


@pytest.mark.parametrize(
    "wrong", [{"settings": None}, {"names": 5}, {"names": ["\ud800"]}, {"figures": []}, {"x": 1}]
)
def test_a_file_of_another_form(tmp_path, wrong):
    """Its checksum is right, as somebody wrote it so."""
    said = {"form": FORM, "kind": KIND, "settings": {}, "names": [], "figures": {}} | wrong
    text = json.dumps(said | {SUM: digest(said)})
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {KEY: text})
    with pytest.raises(InputError, match="or is damaged"):
        deq_sequence.load(tmp_path / "a.safetensors")


def test_other_files_and_kinds(tmp_path, run):
    with pytest.raises(InputError, match="no file"):
        deq_sequence.load(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="does not say what model it holds"):
        deq_sequence.load(run / "model.pt")
    with pytest.raises(InputError, match="is for language model, not for segmentation"):
        read_model_file(WORDS, "segmentation", of_run)
    with pytest.raises(InputError, match="is for language model, not for segmentation"):
        read_model_file(run, "segmentation", of_run)
    assert read_model_file(run, KIND, of_run).names[0] == "<eos>"
    with pytest.raises(InputError, match="holds no run of DEQ-Sequence: "):
        deq_sequence.load(tmp_path)
    data = bytearray(WORDS.read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        deq_sequence.load(tmp_path / "flipped.safetensors")


@pytest.mark.parametrize("name", ["cuda", "nonsense", "meta:x"])
def test_a_device_that_is_not_there(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=f"the device {name} cannot be used here"):
        deq_sequence.load(WORDS, device=name)


def test_a_run_of_state_tracking(tmp_path):
    settings = {"dataset": "state:Z2", "mem_len": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="is a run of state:Z2, not of a language model"):
        deq_sequence.load(tmp_path)


def test_text_that_is_too_short(words):
    with pytest.raises(InputError, match="text has 0 tokens"):
        words.perplexity("")
    assert words.perplexity("the") > 1  # and the end of the line
