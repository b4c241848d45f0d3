"""Tied projections: apart as published, one parameter, or one storage with two optimiser states."""

import copy
import io
import shutil
from argparse import Namespace

import pytest
import torch
from torch import nn

from deq_sequence.command import main
from deq_sequence.initialization import initialize
from deq_sequence.schedules import make_optimizer
from deq_sequence.ties import TIE_PROJ_MODES
from export_weights import export_file
from lib.errors import InputError
from lib.runs.checkpoint import load, load_weights, save_atomic
from lib.runs.optimizers import clip_gradients
from lib.runs.run_folder import CHECKPOINT, LOG, WEIGHTS
from small_model import STACKED, build, words

OURS, SOURCE = "crit.out_projs.1.weight", "word_emb.emb_projs.1.weight"
ONE_ARRAY = ("shared", "storage")
TIED = ("--adaptive", "--cutoffs", "20", "80", "--div_val", "2")
SHORT = ("--max_step", "2", "--max_eval_steps", "1", "--pretrain_steps", "9")  # stacked
by_mode = pytest.mark.parametrize("mode", TIE_PROJ_MODES)
by_one_array = pytest.mark.parametrize("mode", ONE_ARRAY)
VOCABULARIES = {
    "narrow clusters": {},
    "one projection": {"div_val": 1, "d_embed": 6, "tie_projs": [True, False, True]},
}
by_vocabulary = pytest.mark.parametrize("changes", VOCABULARIES.values(), ids=VOCABULARIES)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def both(model):
    return model.get_parameter(OURS), model.get_parameter(SOURCE)


def assert_tied(model):
    """As the mode of ``build(tie_proj_mode=...)`` says, and the tables always."""
    for tie in model.ties:
        ours, source = model.get_parameter(tie.ours), model.get_parameter(tie.source)
        assert (ours is source) == (tie.mode == "shared")
        assert (ours.data_ptr() == source.data_ptr()) == (tie.mode != "apart")
    assert model.crit.out_layers[0].weight is model.word_emb.emb_layers[0].weight


def different_state(**changes):
    """The state dict of a model whose two projections of cluster 1 have gone their own ways."""
    model = build(**changes)
    with torch.no_grad():
        model.get_parameter(OURS).add_(1)
    return {key: value.clone() for key, value in model.state_dict().items()}


# ---- the start -------------------------------------------------------------------------------


@by_vocabulary
def test_all_modes_start_alike_and_equal(changes):
    states = {}
    for mode in TIE_PROJ_MODES:
        model = build(**changes, tie_proj_mode=mode)
        assert_tied(model)
        initialize(model, proj_init_std=0.5)  # as the command does, once more
        assert_tied(model)
        states[mode] = model.state_dict()
        assert model.ties_projections
        projections = [tie for tie in model.ties if "projs" in tie.ours]
        assert len(projections) == 2
        for tie in projections:
            assert torch.equal(states[mode][tie.ours], states[mode][tie.source])
            assert states[mode][tie.ours].std() > 0.2  # the initialisation reached both
    for state in states.values():
        assert_same(state, states["apart"])


def test_apart_is_the_default():
    assert {tie.mode for tie in build().ties if "projs" in tie.ours} == {"apart"}


def test_unknown_mode():
    with pytest.raises(InputError, match="tie_proj_mode is 'glued', but must be one of apart, sh"):
        build(tie_proj_mode="glued")


# ---- training --------------------------------------------------------------------------------


def optimizer_of(model):
    return make_optimizer(Namespace(optim="Adam", lr=0.01, weight_decay=0.0), model)


def train(model, optimizer, steps=3):
    for seed in range(steps):
        optimizer.zero_grad()
        model(*words(seed=seed), [], STACKED)[0].mean().backward()
        optimizer.step()


@by_mode
def test_what_training_does_to_the_two(mode):
    model = build(tie_proj_mode=mode)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    assert_tied(model)
    assert torch.equal(*both(model)) == (mode != "apart")
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    assert len(optimizer.state) == len(listed)
    both_states = [optimizer.state[p] for p in both(model)]
    assert (both_states[0] is both_states[1]) == (mode == "shared")
    for group in optimizer.param_groups:  # updated at once: no two may be the same numbers
        places = [p.data_ptr() for p in group["params"]]
        assert len(set(places)) == len(places)


def test_only_one_storage_needs_a_second_group():
    groups = {m: len(optimizer_of(build(tie_proj_mode=m)).param_groups) for m in TIE_PROJ_MODES}
    assert groups == {"apart": 1, "shared": 1, "storage": 2}


def test_one_storage_is_the_first_public_code_on_a_cpu():
    """There ``out.weight.data = emb.weight.data``, and Adam over all parameters."""
    ours, public = build(tie_proj_mode="storage"), build()
    for tie in public.ties:
        if tie.mode == "apart":
            source = public.get_parameter(tie.source)
            public.get_parameter(tie.ours).data = source.data
    train(ours, torch.optim.Adam(ours.parameters(), lr=0.01))
    train(public, torch.optim.Adam(public.parameters(), lr=0.01))
    assert_same(ours.state_dict(), public.state_dict())
    grouped = build(tie_proj_mode="storage")
    train(grouped, optimizer_of(grouped))  # with groups, and fused
    for key, value in grouped.state_dict().items():
        torch.testing.assert_close(value, ours.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_one_parameter_is_the_sum_of_two():
    grads = {}
    for mode in TIE_PROJ_MODES:
        model = build(tie_proj_mode=mode)
        model(*words(), [], STACKED)[0].mean().backward()
        grads[mode] = [p.grad for p in both(model)]
    torch.testing.assert_close(grads["shared"][0], sum(grads["apart"]))
    assert torch.equal(grads["storage"][0], grads["apart"][0])
    assert torch.equal(grads["storage"][1], grads["apart"][1])
    assert all(grad.norm() > 0 for grad in grads["apart"])


@by_mode
@pytest.mark.parametrize("nonemb", [False, True])
def test_clipping_counts_each_gradient_once(make_trainer, mode, nonemb):
    """The embedding's own numbers are left out by --clip_nonemb under either name."""
    flags = ["--tie_proj_mode", mode, "--clip", "0.05", *["--clip_nonemb"] * nonemb]
    trainer = make_trainer(*TIED, *flags)
    trainer.model(*words(), [], STACKED)[0].mean().backward()
    named = dict(trainer.model.named_parameters())
    free = {name: p.grad.clone() for name, p in named.items()}
    norm = clip_gradients(trainer.model, trainer.clipped, trainer.care.clip)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in free.values()]).norm())
    assert (OURS in named) == (mode != "shared")
    tied = {"crit.out_projs.1.weight", "crit.out_projs.2.weight"} if mode == "storage" else set()
    left_out = {name for name in named if name.startswith("word_emb.")} | tied
    clipped = set(named) - left_out if nonemb else set(named)
    total = torch.stack([free[name].norm() for name in clipped]).norm()
    assert total > 0.06
    for name, p in named.items():
        scale = 0.05 / total if name in clipped else 1
        torch.testing.assert_close(p.grad, scale * free[name], rtol=1e-4, atol=1e-9)


# ---- copies and moves ------------------------------------------------------------------------


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(model):
    """Without data and back: every parameter is then another one."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return model


WAYS = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a wrapper": lambda model: copy.deepcopy(nn.Sequential(model))[0],
    "pickle": pickled,
    "dtype": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.float64),
    "share_memory": lambda model: model.share_memory(),
    "without data": emptied,
    "wrapper": lambda model: nn.Sequential(model).double()[0],
}


@by_mode
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ties_outlast_copies_and_moves(mode, way):
    settings = {"wnorm": way is not pickled}  # weight-normalised classes are made at run time
    model = build(tie_proj_mode=mode, **settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    moved = way(model)
    assert_tied(moved)
    assert_same({k: v.float() for k, v in moved.state_dict().items()}, before)
    if mode != "shared":
        assert len(list(moved.parameters())) == len(list(build(**settings).parameters()))
    dtype = next(moved.parameters()).dtype
    train(moved, torch.optim.SGD(moved.parameters(), lr=0.1), steps=1)
    assert_tied(moved)
    assert torch.equal(*both(moved)) == (mode != "apart")
    assert next(moved.parameters()).dtype == dtype


def test_overwritten_parameters_stay_tied():
    """A setting of PyTorch under which .to() makes new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        for mode in TIE_PROJ_MODES:
            assert_tied(build(tie_proj_mode=mode).double())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


# ---- loading ---------------------------------------------------------------------------------


@by_mode
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_equal_values_load(mode, assign, prefix):
    state = {k: v.clone() for k, v in build(seed=1).state_dict(prefix=prefix).items()}
    model = build(tie_proj_mode=mode)
    (nn.Sequential(model) if prefix else model).load_state_dict(state, assign=assign)
    assert_tied(model)
    assert_same(model.state_dict(prefix=prefix), state)


@by_vocabulary
def test_apart_keeps_both(tmp_path, changes):
    state = different_state(**changes)
    save_atomic(state, tmp_path / "weights.pt")
    model = build(load=str(tmp_path / "weights.pt"), **changes)
    assert_same(model.state_dict(), state)
    save_atomic(model.state_dict(), tmp_path / "again.pt")
    assert_same(load(tmp_path / "again.pt"), state)


def by_constructor(mode, state, folder):
    save_atomic(state, folder / "weights.pt")
    build(tie_proj_mode=mode, load=str(folder / "weights.pt"))


def by_load_weights(mode, state, folder, model=None):
    save_atomic({"model": {"module." + k: v for k, v in state.items()}}, folder / "weights.pt")
    load_weights(model or build(tie_proj_mode=mode), folder / "weights.pt")


LOADERS = {
    "load=": by_constructor,
    "load_weights": by_load_weights,
    "load_state_dict": lambda mode, state, _: build(tie_proj_mode=mode).load_state_dict(state),
    "assign": lambda mode, state, _: build(tie_proj_mode=mode).load_state_dict(state, assign=True),
    "not strict": lambda m, state, _: build(tie_proj_mode=m).load_state_dict(state, strict=False),
    "wrapped": lambda mode, state, _: nn.DataParallel(build(tie_proj_mode=mode)).load_state_dict(
        {"module." + key: value for key, value in state.items()}
    ),
}


@by_one_array
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_different_values_are_refused(mode, loader, tmp_path):
    with pytest.raises(InputError) as caught:
        loader(mode, different_state(), tmp_path)
    message = str(caught.value)
    assert f"{OURS} differs from {SOURCE}" in message
    assert "--tie_proj_mode apart (tie_proj_mode='apart')" in message
    assert "\n" not in message
    if loader in (by_constructor, by_load_weights):
        assert message.startswith(f"{tmp_path / 'weights.pt'}: ")


@by_one_array
def test_what_is_refused_changes_nothing(mode, tmp_path):
    model = build(tie_proj_mode=mode)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError):
        by_load_weights(mode, different_state(seed=1), tmp_path, model)
    assert_same(model.state_dict(), before)


@by_mode
def test_different_tables_are_refused(mode):
    """They too are one parameter, whatever the mode of the projections."""
    state = {key: value.clone() for key, value in build(tie_weights=False).state_dict().items()}
    name = "crit.out_layers.0.weight differs from word_emb.emb_layers.0.weight"
    with pytest.raises(InputError, match=f"{name}.*--not_tied"):
        build(tie_proj_mode=mode).load_state_dict(state)
    untied = build(tie_weights=False)
    untied.load_state_dict(state)
    assert_same(untied.state_dict(), state)


@by_one_array
def test_one_name_alone(mode):
    """Loading copies it for both; assigning it cannot say whose value is to hold."""
    model, value = build(tie_proj_mode=mode), torch.randn(8, 4)
    model.load_state_dict({OURS: value}, strict=False)
    assert torch.equal(model.get_parameter(SOURCE), value)
    with pytest.raises(InputError, match="assign both or neither"):
        model.load_state_dict({OURS: value + 1}, strict=False, assign=True)
    assert torch.equal(model.get_parameter(SOURCE), value)


@by_one_array
def test_values_on_no_device_are_not_compared(mode):
    with torch.device("meta"):
        model = build(tie_proj_mode=mode)
    model.load_state_dict(model.state_dict())
    model.load_state_dict(build(seed=3).state_dict(), assign=True)
    assert_tied(model)


@by_mode
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_both_names_are_exported(mode, suffix, tmp_path):
    """As they are; a storage that two parameters share is written for each."""
    model = build(tie_proj_mode=mode)
    train(model, optimizer_of(model))
    save_atomic({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    export_file(tmp_path / "checkpoint.pt", tmp_path / f"weights{suffix}")
    other = build(seed=1, tie_proj_mode=mode)
    load_weights(other, tmp_path / f"weights{suffix}")
    assert_tied(other)
    assert_same(other.state_dict(), model.state_dict())
    differ = mode == "apart"
    assert torch.equal(other.get_parameter(OURS), other.get_parameter(SOURCE)) != differ


# ---- the command -----------------------------------------------------------------------------


@by_mode
def test_the_log_says_how(flags, run_folder, mode):
    assert main([*flags, *TIED, *SHORT, "--tie_proj_mode", mode]) == 0
    log = (run_folder / LOG).read_text()
    assert f"tied projections {mode}: {TIE_PROJ_MODES[mode]}" in log
    numbers = {"apart": 5431, "shared": 5239, "storage": 5431}  # 16 * (8 + 4) fewer
    assert f"{numbers[mode]} parameters" in log
    state = load(run_folder / WEIGHTS)
    assert torch.equal(state[OURS], state[SOURCE]) == (mode != "apart")


@by_one_array
@pytest.mark.parametrize("how", [["--load"], ["--eval", "--load"]])
def test_the_command_refuses_other_weights(flags, run_folder, tmp_path, capsys, mode, how):
    assert main([*flags, *TIED, *SHORT]) == 0
    weights = tmp_path / WEIGHTS  # alone: in its run's folder it has the run's mode
    shutil.copy(run_folder / WEIGHTS, weights)
    capsys.readouterr()
    more = ["--tie_proj_mode", mode, "--name", "other", *how, str(weights)]
    assert main([*flags, *TIED, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_transformer.py: {weights}: {OURS} differs from {SOURCE}")
    assert error.count("\n") == 1
    assert not (run_folder.parent / "other").exists()
    assert main([*flags, *TIED, *SHORT, *more, "--tie_proj_mode", "apart"]) == 0


def test_a_restart_in_another_mode_is_refused(flags, run_folder, capsys):
    assert main([*flags, *TIED, *SHORT]) == 0
    capsys.readouterr()
    assert main([*flags, *TIED, "--restart", "--tie_proj_mode", "shared"]) == 2
    error = capsys.readouterr().err
    assert "was saved with --tie_proj_mode apart, and this run has shared" in error
    assert error.count("\n") == 1


def test_a_checkpoint_from_before_the_modes(flags, run_folder, capsys):
    """There a tie was one parameter: the run goes on so, and its weights load in every mode."""
    assert main([*flags, *TIED, *SHORT, "--tie_proj_mode", "shared"]) == 0
    state = load(run_folder / CHECKPOINT)
    assert state["fixed"].pop("--tie_proj_mode") == "shared"
    save_atomic(state, run_folder / CHECKPOINT)
    capsys.readouterr()
    more = [*TIED, "--restart", "--pretrain_steps", "9", "--max_step", "4"]
    assert main([*flags, *more]) == 2
    assert "saved with --tie_proj_mode shared, and this run has apart" in capsys.readouterr().err
    assert main([*flags, *more, "--tie_proj_mode", "shared"]) == 0
    for mode in TIE_PROJ_MODES:
        load_it = ["--load", str(run_folder / WEIGHTS), "--name", mode, "--tie_proj_mode", mode]
        assert main([*flags, *TIED, *SHORT, *load_it]) == 0


def test_without_tied_projections_the_mode_says_nothing(flags, run_folder, capsys):
    assert main([*flags, *SHORT]) == 0
    assert "tied projections" not in (run_folder / LOG).read_text()
    assert load(run_folder / CHECKPOINT)["fixed"]["--tie_proj_mode"] is None
    for more in ((), ("--adaptive",), ("--div_val", "2")):
        assert main([*flags, *more, "--name", "x", "--tie_proj_mode", "shared"]) == 2
        assert "--tie_proj_mode shared has no effect" in capsys.readouterr().err
    # A checkpoint from before the modes goes on, and one of another model is refused as such.
    state = load(run_folder / CHECKPOINT)
    del state["fixed"]["--tie_proj_mode"]
    save_atomic(state, run_folder / CHECKPOINT)
    more = ["--restart", "--pretrain_steps", "9"]
    assert main([*flags, *more, "--max_step", "3"]) == 0
    assert main([*flags, *TIED, *more, "--max_step", "4"]) == 2
    assert "missing word_emb.emb_layers.1.weight" in capsys.readouterr().err
