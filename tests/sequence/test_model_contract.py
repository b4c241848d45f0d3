"""The published settings have the published weights' names and shapes, and load them.

``tests/data/lm_contract.json`` holds, per setting, the constructor's arguments, the state dict's
keys and shapes, which of them are tied (tables as one parameter, projections as two that start
equal), the number of parameters in the published optimiser, and of distinct ones if a tie counts
once.
"""

import json
from pathlib import Path

import pytest
import torch

from deq_sequence import DEQTransformerLM
from lib.errors import InputError
from lib.runs.checkpoint import load_state, load_weights, save_atomic

CONTRACT = json.loads((Path(__file__).parents[1] / "data/lm_contract.json").read_text("utf-8"))
by_setting = pytest.mark.parametrize("setting", CONTRACT.values(), ids=CONTRACT)


def on_meta(setting, **changes) -> DEQTransformerLM:
    with torch.device("meta"):
        return DEQTransformerLM(**setting["constructor"], **changes)


@by_setting
def test_keys_and_shapes(setting):
    model = on_meta(setting)
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == setting["state_dict"]
    assert all(value.is_meta and value.dtype == torch.float32 for value in state.values())


@by_setting
def test_order_of_parameters(setting):
    """By which the state of a published optimiser is indexed."""
    assert [name for name, _ in on_meta(setting).named_parameters()] == setting["parameter_order"]


@by_setting
@pytest.mark.parametrize("mode", ["apart", "shared", "storage"])
def test_ties(setting, mode):
    model = on_meta(setting, tie_proj_mode=mode)
    state = model.state_dict(keep_vars=True)
    groups = {}
    for key, value in state.items():
        place = value.untyped_storage()._cdata if mode == "storage" else id(value)
        groups.setdefault(place, set()).add(key)
    found = {frozenset(group) for group in groups.values() if len(group) > 1}
    tied = {frozenset(pair) for pair in setting["tied"]}
    assert {frozenset(tie[:2]) for tie in model.ties} == tied
    tables = {pair for pair in tied if any("out_layers" in name for name in pair)}
    assert found == (tables if mode == "apart" else tied)


@by_setting
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_names_load(setting, prefix):
    """By key and shape: the values are on the meta device too."""
    state = {
        prefix + key: torch.empty(shape, device="meta")
        for key, shape in setting["state_dict"].items()
    }
    load_state(on_meta(setting), state, "published weights")


@by_setting
def test_wrong_names_are_listed(setting):
    state = {key: torch.empty(shape, device="meta") for key, shape in setting["state_dict"].items()}
    del state["inject_conv.bias"]
    state["func.dec_attn.extra"] = torch.empty(3, device="meta")
    state["crit.cluster_weight"] = torch.empty(2, 700, device="meta")
    with pytest.raises(InputError) as caught:
        load_state(on_meta(setting), state, "weights.pt")
    message = str(caught.value)
    assert "weights.pt" in message
    assert "missing inject_conv.bias" in message
    assert "unexpected func.dec_attn.extra" in message
    assert "crit.cluster_weight has shape (2, 700) instead of (3, 700)" in message
    assert "\n" not in message


def test_settings_do_not_fit_each_other():
    """The three differ in no shape; a model without weight normalisation does."""
    setting = next(iter(CONTRACT.values()))
    with torch.device("meta"):
        model = DEQTransformerLM(**{**setting["constructor"], "wnorm": False})
    with pytest.raises(InputError, match=r"missing func\.dec_attn\.qkv_net\.weight;"):
        load_state(model, on_meta(setting).state_dict(), "published weights")


# --- Real weights, at a size that fits a test -------------------------------------------------


def small(**changes) -> DEQTransformerLM:
    setting = CONTRACT["wt103_deq_transformer"]["constructor"]
    sizes = {"n_token": 50, "cutoffs": [10, 20, 30], "n_head": 2, "d_model": 64, "d_head": 32}
    return DEQTransformerLM(**{**setting, **sizes, "d_embed": 64, "d_inner": 20, **changes})


@pytest.fixture
def published():
    """A model as published: tied projections have gone their own ways, and both are stored."""
    torch.manual_seed(1)
    model = small()
    with torch.no_grad():
        for i in (1, 2, 3):
            model.crit.out_projs[i].weight.add_(
                torch.randn(model.word_emb.emb_projs[i].weight.shape)
            )
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("how", ["constructor", "load_weights"])
def test_loaded_model_computes_the_same(published, tmp_path, prefix, how):
    path = tmp_path / "weights.pkl"
    state = {prefix + key: value.clone() for key, value in published.state_dict().items()}
    save_atomic(state, path)
    lines = []
    torch.manual_seed(2)
    if how == "constructor":
        model = small(load=str(path), logging=lines.append).eval()
        assert len(lines) == 1
        assert str(path) in lines[0]
    else:
        model = small().eval()
        load_weights(model, path)
    words = torch.randint(50, (7, 2))
    data, target = words[:-1], words[1:]
    assert torch.equal(model(data, target, [])[0], published(data, target, [])[0])
    assert not torch.equal(model.crit.out_projs[1].weight, model.word_emb.emb_projs[1].weight)


def test_constructor_refuses_other_weights(published, tmp_path):
    path = tmp_path / "weights.pt"
    save_atomic(published.state_dict(), path)
    with pytest.raises(InputError, match=r"pos_ff.*has shape \(20, 1\) instead of \(24, 1\)"):
        small(load=str(path), d_inner=24)
