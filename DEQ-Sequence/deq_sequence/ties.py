"""Tied weights of the embedding and the softmax, and how they stay tied."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.errors import InputError, check

# Modes of tying a projection, and their descriptions.
TIE_PROJ_MODES = {
    "apart": "two parameters, equal at the start: as the published runs trained and saved them",
    "shared": "one parameter",
    "storage": "one array of numbers, each use with a gradient and an optimiser state of its own",
}


class Tie(NamedTuple):
    """The parameter named ``ours`` is tied to the one named ``source`` (see ``TIE_PROJ_MODES``)."""

    ours: str
    source: str
    mode: str
    way_out: str  # for messages: how to load a file in which the two differ


class TiedWeights(nn.Module):
    """A module whose ``ties`` survive copies, moves to another device or dtype, and loading.

    - ``apart``: two parameters that are equal only at the start. The first public code tied their
      ``.data``, and the move to a GPU separated them before the first step. So the published runs
      trained two projections and saved both.
    - ``shared``: one parameter with two names.
    - ``storage``: two parameters with one storage, as in the first public code on a CPU. Each has
      its own gradient and optimiser state, and both updates change the same numbers.

    State dicts hold both names. In the modes ``shared`` and ``storage`` a state dict with two
    different values is refused with an InputError: the right one is unknown.
    """

    ties: tuple[Tie, ...] = ()

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_post_hook(_join_after_loading)

    def tie(self, ties: Sequence[Tie]) -> None:
        """Set the ties and make the tied parameters equal."""
        self.ties = tuple(ties)
        self.start_equal()

    @torch.no_grad()
    def start_equal(self) -> None:
        """Make the two parameters of every tie equal, in all modes to those drawn last."""
        self._join()
        for tie in self.ties:
            self.get_parameter(tie.source).copy_(self.get_parameter(tie.ours))
        for tie in self.ties:
            self.get_parameter(tie.ours).copy_(self.get_parameter(tie.source))

    def _join(self) -> None:
        """Restore the ties that a copy or a move has separated into two arrays."""
        for tie in self.ties:
            ours, source = self.get_parameter(tie.ours), self.get_parameter(tie.source)
            if tie.mode == "shared" and ours is not source:
                owner, _, name = tie.ours.rpartition(".")
                setattr(self.get_submodule(owner), name, source)
            elif tie.mode == "storage":
                ours.data = source.data

    def _apply(self, fn, recurse=True):  # called by .to(), .cuda(), .half(), ...
        super()._apply(fn, recurse)
        self._join()
        return self

    def __setstate__(self, state):  # called by deepcopy and unpickling
        super().__setstate__(state)
        self._join()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        self._refuse_parted(state_dict, prefix, local_metadata.get("assign_to_params_buffers"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def _refuse_parted(self, state: dict[str, Tensor], prefix: str, assign: bool | None) -> None:
        """Refuse tied values that differ. Called before loading, so a refusal changes nothing."""
        for tie in self.ties:
            both = [state[prefix + n] for n in (tie.ours, tie.source) if prefix + n in state]
            if tie.mode == "apart" or not both:
                continue
            if len(both) == 1 and assign:  # the next _join() could keep the other, old value
                raise InputError(
                    f"{tie.ours} and {tie.source} are tied: assign both or neither of them"
                )
            if len(both) == 2 and _differ(*both):
                raise InputError(
                    f"{tie.ours} differs from {tie.source}, but they are tied here: {tie.way_out}"
                )


def ties_between(
    embedding: nn.Module, softmax: nn.Module, weights: bool, projections: Sequence[bool], mode: str
) -> list[Tie]:
    """List the ties of a model whose ``word_emb`` and ``crit`` have the same sizes.

    Args:
        weights: tie every output table to its embedding table, always in the mode 'shared'.
        projections: entry i ties projection i; missing entries are False. With ``div_val`` 1 all
            are tied to the embedding's single projection, if it has one.
        mode: tie mode of the projections, a key of ``TIE_PROJ_MODES``.

    Raises:
        InputError: the mode is unknown, or ``projections`` has more entries than clusters.
    """
    modes = f"one of {', '.join(TIE_PROJ_MODES)}"
    check(mode in TIE_PROJ_MODES, "tie_proj_mode", mode, modes)
    if len(projections) > len(softmax.bounds):
        raise InputError(
            f"tie_projs has {len(projections)} entries for {len(softmax.bounds)} clusters"
        )
    ties = []
    if weights:
        way_out = "load it with --not_tied (tie_weights=False), which keeps both"
        for i in range(len(softmax.out_layers)):
            ours, source = f"crit.out_layers.{i}.weight", f"word_emb.emb_layers.{i}.weight"
            ties.append(Tie(ours, source, "shared", way_out))
    way_out = "load it with --tie_proj_mode apart (tie_proj_mode='apart'), which keeps both"
    for i, (_, tied) in enumerate(zip(softmax.out_projs, projections, strict=False)):
        if tied:
            ours = f"crit.out_projs.{i}.weight"
            source = f"word_emb.emb_projs.{i % len(embedding.emb_projs)}.weight"
            ties.append(Tie(ours, source, mode, way_out))
    return ties


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta or a.shape != b.shape:  # wrong shapes are refused elsewhere
        return False
    a, b = a.detach(), b.detach().to(a)
    return not bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is refused elsewhere


def _join_after_loading(model: TiedWeights, incompatible) -> None:
    """Restore the ties: load_state_dict(assign=True) replaces every parameter by a separate one."""
    model._join()
