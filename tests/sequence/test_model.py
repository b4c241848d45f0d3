"""How the language model behaves: phases, memory, ties, initialisation, errors, what it keeps."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from lib.errors import InputError
from lib.solvers import SOLVERS, anderson, broyden
from measures import saved_bytes
from small_model import EQUILIBRIUM, STACKED, VOCABULARIES, build, words

by_phase = pytest.mark.parametrize("step", [STACKED, EQUILIBRIUM], ids=["stacked", "equilibrium"])


# --- What comes out ---------------------------------------------------------------------------


@by_phase
@pytest.mark.parametrize("training", [True, False])
def test_shapes(step, training):
    model = build().train(training)
    data, target = words()
    mems = []
    for length in (5, 7, 7):  # of the memory: mem_len at most
        loss, jac_loss, sradius, *mems = model(data, target, mems, step)
        assert loss.shape == (5, 3)
        assert jac_loss.shape == (1, 1)
        assert sradius.shape == (3, 1)
        assert [m.shape for m in mems] == [(length, 3, 8), (length, 3, 24)]
        assert not any(m.requires_grad for m in mems)
        # Estimated in training at the equilibrium only.
        assert (jac_loss.item() > 0) == (training and step == EQUILIBRIUM)
        assert not sradius.any()


@pytest.mark.parametrize(
    ("step", "stacks"), [(0, True), (9, True), (10, False), (500, False), (-1, False)]
)
def test_border_of_the_phases(step, stacks):
    model = build()
    model(*words(), [], step)
    assert model.deq.stats.forward.solves == (0 if stacks else 1)


def test_number_of_stacked_layers():
    """n_layer in training, eval_n_layer in evaluation."""
    same = {"seed": 3, "n_layer": 4, "eval_n_layer": 2}
    first, second = build(seed=3), build(**same)
    data, target = words()
    assert torch.equal(first.eval()(data, target, [], 0)[0], second(data, target, [], 0)[0])
    assert torch.equal(first.train()(data, target, [], 0)[0], second.eval()(data, target, [], 0)[0])
    assert not torch.equal(first(data, target, [], 0)[0], second.train()(data, target, [], 0)[0])


@by_phase
def test_losses_in_token_order(step):
    """Every loss is -log p of its own token, whichever cluster that is in."""
    model = build().double().eval()
    data = words(batch=1)[0].expand(5, 17)
    # Of clusters 2, 0, 1, 2, 0.
    target = torch.tensor([16, 0, 5, 12, 3])[:, None].expand(5, 17)
    losses = model(data, target, [], step)[0]
    for t in range(5):
        changed = target.clone()
        changed[t] = torch.arange(17)  # sample w has the word w here
        found = model(data, changed, [], step)[0]
        same = torch.arange(5) != t
        torch.testing.assert_close(found[same], losses[same], rtol=0, atol=1e-12)
        # The probabilities of all words at one place sum to one.
        assert found[t].neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_log_prob_is_consistent_with_the_loss(name):
    model = build(**VOCABULARIES[name]).double().eval()
    hidden = torch.randn(17, 8, dtype=torch.float64)
    log_p = model.crit.log_prob(hidden)
    assert log_p.shape == (17, 17)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(17).double(), rtol=0, atol=1e-12)
    target = torch.arange(17)
    nll = model.crit(hidden, target)
    torch.testing.assert_close(nll, -log_p[target, target], rtol=0, atol=1e-12)


def test_log_prob_of_the_next_word():
    model = build().double().eval()
    data, target = words()
    _, _, _, *mems = model(data, target, [])
    log_p, found_mems = model.log_prob(data, mems)
    losses, _, _, *expected_mems = model(data, target, mems)
    expected = -log_p.gather(1, target[-1][:, None]).squeeze(1)
    torch.testing.assert_close(losses[-1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_mems, expected_mems)
    assert not log_p.requires_grad


@by_phase
def test_log_probs_at_every_position(step):
    model = build().double().eval()
    data, target = words()
    log_p = model.log_probs(data, step)
    losses = model(data, target, [], train_step=step)[0]
    assert log_p.shape == (*data.shape, 17)
    expected = -log_p.gather(2, target[..., None]).squeeze(2)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    assert not log_p.requires_grad


def test_own_injection_needs_as_many_evaluations_as_words():
    """A window of two: the left neighbour's state and the own word decide, so nothing is left."""
    model = strong(build(inject="own", local_size=2, f_solver="fixed_point_iteration"))
    data, target = words(length=7)
    model.double().eval()(data, target, [], f_thres=40)
    last = model.deq.stats.forward.last
    assert last["nfe"] == 7 + 1
    assert last["rel_residual"] < 1e-15


@pytest.mark.parametrize("changes", [{"inject": "some"}, {"local_size": 1, "inject": "own"}])
def test_bad_options_of_state_tracking(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        build(**changes)


# --- Memory -----------------------------------------------------------------------------------


@by_phase
@pytest.mark.parametrize("training", [True, False])
def test_memory_of_the_caller_is_not_changed(step, training):
    model = build().train(training)
    data, target = words()
    _, _, _, *mems = model(data, target, [], step)
    before, objects = [m.clone() for m in mems], list(mems)
    model(data, target, mems, step)[0].sum().backward()
    assert len(mems) == 2
    assert all(a is b for a, b in zip(mems, objects, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mems, before, strict=True))
    empty = []
    model(data, target, empty, step)
    assert empty == []


@by_phase
@pytest.mark.parametrize("mem_len", [0, None])
def test_no_memory(step, mem_len):
    model = build(mem_len=mem_len).eval()
    data, target = words()
    first, _, _, *mems = model(data, target, [], step)
    assert [m.shape for m in mems] == [(0, 3, 8), (0, 3, 24)]
    assert torch.equal(model(data, target, mems, step)[0], first)


def strong(model, std=0.2):
    """Weights that make words depend on each other visibly."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, std)
    return model


@by_phase
def test_memory_is_the_context_of_one_longer_segment(step):
    """Where a segment's end sees the memory's states, long memory stands in for a longer data.

    Exact only at the equilibrium and without a second pass: z of the earlier words depends on
    nothing to their right.
    """
    model = strong(build(mem_len=20, f_solver=partial(broyden, eps=1e-12))).double().eval()
    data, target = words(length=10)
    loss = model(data, target, [], step, f_thres=200)[0]
    first, _, _, *mems = model(data[:6], target[:6], [], step, f_thres=200)
    second = model(data[6:], target[6:], mems, step, f_thres=200)[0]
    torch.testing.assert_close(first, loss[:6], rtol=0, atol=1e-9)
    if step == EQUILIBRIUM:
        torch.testing.assert_close(second, loss[6:], rtol=0, atol=1e-9)
    else:  # while stacked, the memory is the last state: further on than the layers of before
        assert not torch.allclose(second, loss[6:])


@by_phase
@pytest.mark.parametrize("local_size", [0, 1, 3])
def test_what_a_position_sees(step, local_size):
    """Loss t depends on the words up to t; with a local size s, f alone reaches s - 1 back."""
    model = strong(build(local_size=local_size, n_layer=1)).double()
    embedded = model.word_emb(words(length=9, batch=1)[0].t()).detach().requires_grad_()
    model.word_emb = nn.Module()
    model.word_emb.forward = lambda ids: embedded
    data, target = words(length=9, batch=1)
    loss = model(data, target, [], step, f_thres=60, b_thres=60)[0]
    reach = torch.zeros(9, 9, dtype=torch.bool)
    for t in range(9):
        (grad,) = torch.autograd.grad(loss[t].sum(), embedded, retain_graph=True)
        reach[t] = grad[0].abs().sum(1) > 0
    t, j = torch.arange(9)[:, None], torch.arange(9)[None]
    expected = j <= t
    if local_size and (step == STACKED or local_size == 1):  # one application; or each to itself
        expected = expected & (j > t - local_size)
    assert torch.equal(reach, expected)


def test_reset_length():
    model = build().eval()
    model.reset_length(4, 2)
    data, target = words()
    _, _, _, *mems = model(data, target, [])
    assert [len(m) for m in mems] == [2, 2]


# --- Evaluation -------------------------------------------------------------------------------


def test_spectral_radius_mode_leaves_the_output_alone():
    model = build(dropout=0.2, dropatt=0.2).eval()
    data, target = words()
    _, _, _, *mems = model(data, target, [])
    plain = model(data, target, mems)
    with torch.no_grad():
        measured = model(data, target, mems, spectral_radius_mode=True)
    for i in (0, 1, 3, 4):
        assert torch.equal(plain[i], measured[i])
    assert (measured[2] > 0).all()


@by_phase
def test_evaluation_without_autograd(step):
    model = build(dropout=0.3, dropatt=0.3, wnorm=True).eval()
    data, target = words()
    with_graph = model(data, target, [], step)
    with torch.no_grad():
        without = model(data, target, [], step)
    for a, b in zip(with_graph, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not without[0].requires_grad
    model.train()(data, target, [], step)[0].sum().backward()  # nothing held is left over
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("wnorm", [False, True])
def test_deepcopy_after_forward(wnorm):
    model = build(wnorm=wnorm, dropout=0.1)
    data, target = words()
    model(data, target, [])[0].sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(data, target, [])[0], model.eval()(data, target, [])[0])
    # Ties are tied within the copy, and to nothing outside.
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    assert twin.crit.out_layers[1].weight is twin.word_emb.emb_layers[1].weight
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(twin(data, target, [])[0], model(data, target, [])[0])


def test_dropout_mask_is_constant_over_positions():
    """After the equilibrium: one mask per sample and channel, the same at all positions."""
    model = build(dropout=0.5)
    seen = []
    model.crit.forward = lambda hidden, target: seen.append(hidden) or hidden[:, 0]
    model(*words(), [], STACKED)
    dropped = (seen[0].view(3, 5, 8) == 0).float()
    assert torch.equal(dropped, dropped[:, :1].expand(3, 5, 8))
    assert 0 < dropped.mean() < 1


# --- Ties and initialisation ------------------------------------------------------------------


def test_no_ties():
    model = build(tie_weights=False, tie_projs=[])
    assert len({id(p) for p in model.parameters()}) == sum(
        key != "pos_emb.inv_freq" for key in model.state_dict()
    )


@pytest.mark.parametrize("wnorm", [False, True])
def test_initialisation(wnorm):
    """N(0, 0.01) everywhere, biases zero; weight-normalised matrices keep PyTorch's default.

    A standard deviation estimated from n draws is good to 1 / sqrt(2 n): four of these.
    """
    model = build(
        **{"wnorm": wnorm, "n_token": 600, "cutoffs": [100, 300], "d_model": 64, "n_head": 8},
        **{"d_head": 8, "d_inner": 96},
    )
    normalised = ("qkv_net", "r_net", "o_net", "ff1_net", "ff2_net")
    for name, parameter in model.named_parameters():
        n, values = parameter.numel(), parameter.detach()
        if wnorm and any(net in name for net in normalised) and not name.endswith("bias"):
            if name.endswith("_v"):
                fan_in = parameter.shape[1]
                # The default of Linear and Conv1d: uniform within 1 / sqrt(fan_in).
                assert values.abs().max() <= 1 / math.sqrt(fan_in)
                assert values.std() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)
            else:
                weight_v = dict(model.named_parameters())[name[:-1] + "v"]
                torch.testing.assert_close(values.flatten(), weight_v.flatten(1).norm(dim=1))
        elif name.endswith(("r_w_bias", "r_r_bias")) or not name.endswith("bias"):
            assert values.std() == pytest.approx(0.01, rel=4 / math.sqrt(2 * n)), name
            assert abs(values.mean()) < 4 * 0.01 / math.sqrt(n), name
        else:
            assert not values.any(), name


# --- Memory in bytes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anderson", "broyden"])
@pytest.mark.parametrize("wnorm", [False, True])
def test_saved_bytes_do_not_grow_with_f_thres(name, wnorm):
    """One training step with the Jacobian loss, its saved tensors counted."""
    model = build(wnorm=wnorm, dropout=0.1, f_solver=partial(SOLVERS[name], eps=0.0))
    data, target = words()
    _, _, _, *mems = model(data, target, [])
    found, nfe = [], []
    for f_thres in (10, 20, 40, 80):
        step = partial(model, data, target, mems, f_thres=f_thres, b_thres=5)
        found.append(saved_bytes(step))
        nfe.append(model.deq.stats.forward.last["nfe"])
    print(f"{name}, f_thres 10, 20, 40, 80: {found} bytes saved, {nfe} evaluations")
    assert len(set(found)) == 1
    assert nfe[0] < nfe[1]


# --- Solvers, statistics, precision ----------------------------------------------------------


def test_solvers_are_attributes():
    model = strong(build())
    assert model.f_solver is model.b_solver is anderson
    model.f_solver = own = partial(broyden, eps=1e-5)
    model.b_solver = "anderson"
    assert (model.f_solver, model.b_solver) == (own, anderson)
    model(*words(), [], f_thres=100)
    assert model.deq.stats.forward.last["rel_residual"] < 1e-5
    with pytest.raises(InputError, match="newton"):
        model.f_solver = "newton"


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name] = (value, step)


def test_a_solver_without_traces_may_be_written_of():
    def bare(f, x0, **options):
        return {"result": anderson(f, x0, **options)["result"]}

    model, writer = build(f_solver=bare), Writer()
    model(*words(), [], 12, writer=writer)[0].sum().backward()
    assert math.isnan(writer.scalars["forward/rel_residual"][0])


def test_writer_is_given_both_passes():
    model, writer = build(), Writer()
    model(*words(), [], 12, writer=writer)[0].sum().backward()
    assert set(writer.scalars) == {
        f"{which}/{what}"
        for which in ("forward", "backward")
        for what in ("abs_residual", "rel_residual", "nfe")
    }
    assert {step for _, step in writer.scalars.values()} == {12}
