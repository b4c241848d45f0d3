"""What the language model refuses, each in one clear line."""

import pytest
import torch

from lib.errors import InputError
from small_model import STACKED, VOCABULARIES, build, words


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_head": 5}, r"n_head \* d_head .* 2 \* 5 is not 8"),
        ({"n_head": 1, "d_model": 7, "d_head": 7}, "d_model is 7"),
        ({"cutoffs": [4, 17]}, r"\[4, 17\].* 17 words"),
        ({"cutoffs": [9, 4]}, r"\[9, 4\]"),
        ({"cutoffs": [0, 4]}, r"\[0, 4\]"),
        ({"cutoffs": [4, 30]}, r"\[4, 30\]"),
        ({"div_val": 4}, "div_val 4"),
        ({"div_val": 0}, "div_val 0"),
        ({"tie_projs": [True] * 4}, "tie_projs has 4 entries for 3 clusters"),
        ({"local_size": -1}, "local_size is -1"),
        ({"mem_len": -1}, "mem_len is -1"),
        ({"tgt_len": -3}, "tgt_len is -3"),
        ({"stop_mode": "both"}, "stop_mode is 'both'"),
        ({"f_solver": "newton"}, "'newton'.*anderson, .*broyden"),
        ({"b_solver": "newton"}, "'newton'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropatt": -0.5}, "dropout is -0.5"),
        ({"load": "missing.pt"}, "missing.pt"),
    ],
    ids=str,
)
def test_constructor_refuses(changes, named):
    with pytest.raises(InputError, match=named) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [17, -1, -100])
@pytest.mark.parametrize("where", ["data", "target"])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_word_outside_the_vocabulary(bad, where, name):
    model = build(**VOCABULARIES[name])
    data, target = words()
    (data if where == "data" else target)[2, 1] = bad
    with pytest.raises(InputError, match="vocabulary has 17 words"):
        model(data, target, [], STACKED)


@pytest.mark.parametrize(
    ("data", "target"), [((5, 3), (6, 3)), ((5, 3), (5, 2))], ids=["longer", "batch"]
)
def test_target_must_fit_data(data, target):
    with pytest.raises(InputError, match=r"target \(\d, \d\)"):
        build()(torch.zeros(data).long(), torch.zeros(target).long(), [])


def test_memory_must_fit():
    model = build()
    _, _, _, *mems = model(*words(batch=2), [])
    with pytest.raises(InputError, match="a batch of 3 needs"):
        model(*words(batch=3), mems)
