"""The DEQ-Transformer language model (arXiv 1909.01377, 2106.14342)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deq_sequence.embedding import AdaptiveEmbedding, PositionalEmbedding
from deq_sequence.initialization import initialize
from deq_sequence.layer import TransformerLayer
from deq_sequence.softmax import ProjectedAdaptiveLogSoftmax
from deq_sequence.ties import TiedWeights, ties_between
from lib.checkpoint import load_weights
from lib.deq import DEQ, SAME, SRADIUS_ITERS, SolverAttributes, stacked
from lib.errors import InputError
from lib.gradients import Gradient
from lib.iterations import Iteration
from lib.linear import linear
from lib.optimization import VariationalDropout
from lib.solver_stats import scalars_to
from lib.solvers import anderson


@dataclass
class _Segment:
    """One segment carried through the layer: z (B, L, d) and what the next segment needs."""

    z: Tensor
    jac_loss: Tensor  # (1, 1)
    sradius: Tensor  # (B, 1)
    mems: list[Tensor]  # (len, B, d), (len, B, 3d)


class DEQTransformerLM(SolverAttributes, TiedWeights):
    """Language model whose hidden states are the fixed point of one transformer layer.

    u = inject_conv(word_emb(data)); z* = f(z*; u, memory); loss = crit(dropout(z*), target).

    For the first ``pretrain_steps`` training steps f is applied ``n_layer`` times with ordinary
    autograd instead. The memory is the last ``mem_len`` states and injections of the segments
    before, detached.

    Args:
        n_token: vocabulary size.
        n_layer, eval_n_layer: applications of f in the stacked phase, training and evaluation.
        n_head, d_model, d_head, d_inner: sizes of the layer; d_model = n_head * d_head.
        dropout, dropatt: probabilities for hidden states and attention weights.
        tie_weights: share embedding and output tables.
        d_embed: embedding width, d_model by default.
        div_val: factor by which each cluster of the vocabulary is narrower.
        tie_projs: tie embedding and output projection, per cluster; missing entries are False.
        pre_lnorm: layer norm before attention and feed-forward instead of after.
        wnorm: weight normalisation of the layer's matrices.
        tgt_len, mem_len: segment and memory lengths (mem_len 0 or None: no memory).
        local_size: how many positions back a query sees, itself included; 0 is all.
        pretrain_steps: length of the stacked phase.
        cutoffs: first word id of every vocabulary cluster but the first.
        load: path of a state dict to start from.
        f_solver, b_solver: names or callables (see :class:`lib.deq.DEQ`).
        stop_mode: 'rel' or 'abs', for the forward solve; the adjoint stops by 'rel'.
        logging: function that is given one line after ``load``; None is silent.
        grad: how to differentiate the equilibrium (see :mod:`lib.gradients`).
        tie_proj_mode: how ``tie_projs`` ties (see :class:`deq_sequence.ties.TiedWeights`):
            'apart', two parameters that start equal, as published; 'shared', one parameter; or
            'storage', one array of numbers with two optimiser states.

    Raises:
        InputError: sizes that do not fit together, a bad solver or stop_mode, a bad ``load``.
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        eval_n_layer: int,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float,
        tie_weights: bool = True,
        d_embed: int | None = None,
        div_val: int = 1,
        tie_projs: list[bool] | tuple[bool, ...] = (False,),
        pre_lnorm: bool = False,
        wnorm: bool = False,
        tgt_len: int | None = None,
        mem_len: int | None = None,
        local_size: int = 0,
        pretrain_steps: int = 1,
        cutoffs: list[int] | tuple[int, ...] = (),
        load: str = "",
        f_solver: str | Callable = anderson,
        b_solver: str | Callable | None = None,
        stop_mode: str = "rel",
        logging: Callable[[str], None] | None = None,
        grad: str | Gradient | Iteration = "ift",
        tie_proj_mode: str = "apart",
    ):
        super().__init__()
        d_embed = d_model if d_embed is None else d_embed
        cutoffs = list(cutoffs)
        self.n_token, self.d_model, self.d_embed = n_token, d_model, d_embed
        self.n_layer, self.eval_n_layer = n_layer, eval_n_layer
        self.pretrain_steps = pretrain_steps
        self.reset_length(tgt_len, mem_len)
        if local_size < 0:
            raise InputError(f"local_size is {local_size}, but must be 0 (all positions) or more")
        if stop_mode not in ("abs", "rel"):
            raise InputError(f"stop_mode is {stop_mode!r}, but must be 'abs' or 'rel'")
        self.deq = DEQ(
            f_solver, b_solver or SAME, stop_mode=stop_mode, b_stop_mode="rel", grad=grad
        )

        self.word_emb = AdaptiveEmbedding(n_token, d_embed, d_model, cutoffs, div_val)
        self.inject_conv = nn.Conv1d(d_model, 3 * d_model, 1)
        self.pos_emb = PositionalEmbedding(d_model)
        self.func = TransformerLayer(
            n_head, d_model, d_head, d_inner, dropout, dropatt, pre_lnorm, wnorm, local_size
        )
        self.crit = ProjectedAdaptiveLogSoftmax(n_token, d_embed, d_model, cutoffs, div_val)
        self.tie(ties_between(self.word_emb, self.crit, tie_weights, tie_projs, tie_proj_mode))
        self.dropout = dropout
        self.variational_drop = VariationalDropout()
        initialize(self)
        if load:
            load_weights(self, load)
            if logging is not None:
                logging(f"weights loaded from {load}")

    @property
    def ties_projections(self) -> bool:
        """Whether ``tie_proj_mode`` makes a difference."""
        return any(tie.ours.startswith("crit.out_projs.") for tie in self.ties)

    def reset_length(self, tgt_len: int | None, mem_len: int | None) -> None:
        """Change segment and memory lengths, for evaluation say."""
        for name, value in (("tgt_len", tgt_len), ("mem_len", mem_len)):
            if value is not None and value < 0:
                raise InputError(f"{name} is {value}, but must be 0 or more")
        self.tgt_len, self.mem_len = tgt_len, mem_len or 0

    def forward(
        self,
        data: Tensor,
        target: Tensor,
        mems: list[Tensor],
        train_step: int = -1,
        f_thres: int = 30,
        b_thres: int = 40,
        compute_jac_loss: bool = True,
        spectral_radius_mode: bool = False,
        writer=None,
    ) -> list[Tensor]:
        """Loss of a segment.

        Args:
            data: (seq_len, B) word ids; longer than ``target`` if extra context stands before.
            target: (tgt_len, B) the next words, aligned with the last positions of ``data``.
            mems: ``[]`` at first, then the last two results of the call before; not changed.
            train_step: below ``pretrain_steps`` (from 0 on) stacks, otherwise (or -1) solves.
            f_thres, b_thres: thresholds of the two solvers.
            compute_jac_loss: estimate the Jacobian loss (in training at equilibrium only).
            spectral_radius_mode: compute the spectral radius (in evaluation at equilibrium only).
            writer: a SummaryWriter that is given the residuals and nfe of both passes.

        Returns:
            [loss (tgt_len, B) in nats and token order, jac_loss (1, 1), sradius (B, 1),
            z_mem (len, B, d_model), u_mem (len, B, 3 * d_model)]
        """
        if target.shape[1] != data.shape[1] or len(target) > len(data):
            raise InputError(
                f"target {tuple(target.shape)} does not fit data {tuple(data.shape)}: both are "
                "(length, batch), and target is no longer than data"
            )
        segment = self._carry(
            data,
            mems,
            train_step,
            f_thres=f_thres,
            b_thres=b_thres,
            jac_vecs=int(compute_jac_loss),
            sradius_iters=SRADIUS_ITERS * spectral_radius_mode,
            on_solve=None if writer is None else scalars_to(writer, train_step),
        )
        tgt_len, bsz = target.shape
        # One mask per sample and channel: the first public code applied it over positions, by a
        # slip of layout.
        hidden = self.variational_drop(segment.z, self.dropout)
        hidden = hidden[:, len(data) - tgt_len :]  # (B, tgt_len, d)
        loss = self.crit(hidden.reshape(-1, self.d_model), target.t().reshape(-1))
        loss = loss.view(bsz, tgt_len).t()
        return [loss, segment.jac_loss, segment.sradius, *segment.mems]

    @torch.no_grad()
    def log_prob(
        self, data: Tensor, mems: list[Tensor], f_thres: int = 30
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the word after ``data`` (seq_len, B): (B, n_token), and memory."""
        segment = self._carry(data, mems, -1, f_thres=f_thres, b_thres=1)
        return self.crit.log_prob(segment.z[:, -1]), segment.mems

    def _carry(
        self,
        data: Tensor,
        mems: list[Tensor],
        train_step: int,
        *,
        f_thres: int,
        b_thres: int,
        jac_vecs: int = 0,
        sradius_iters: int = 0,
        on_solve=None,
    ) -> _Segment:
        """Embed a segment, find its states, and make the memory for the next one."""
        qlen, bsz = data.shape
        start = self.pos_emb.inv_freq.new_zeros(bsz, qlen, self.d_model)  # (B, L, d)
        words = self.word_emb(data.t())  # (B, L, d)
        u = linear(words, self.inject_conv.weight.squeeze(2), self.inject_conv.bias)
        z0, u0 = self._memory(mems, start)
        us = torch.cat([u0, u], dim=1)  # (B, K, 3d)
        positions = self.variational_drop(self.pos_emb(us.shape[1]), self.dropout)  # (1, K, d)
        f = self.func.prepare(us, z0, positions)

        if 0 <= train_step < self.pretrain_steps:
            z = stacked(f, start, self.n_layer if self.training else self.eval_n_layer)
            jac_loss, sradius = start.new_zeros(()), start.new_zeros(bsz, 1)
        else:
            solution = self.deq(
                f,
                start,
                f_thres=f_thres,
                b_thres=b_thres,
                training=self.training,
                jac_vecs=jac_vecs if self.training else 0,
                sradius_iters=0 if self.training else sradius_iters,
                on_solve=on_solve,
            )
            z, jac_loss, sradius = solution.z, solution.jac_loss, solution.sradius
        mems = [self._keep(z0, z), self._keep(u0, u)]
        return _Segment(z, jac_loss.view(1, 1), sradius, mems)

    def _memory(self, mems: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """The caller's memory as (B, M, d) and (B, M, 3d), empty at first."""
        bsz, d = len(like), self.d_model
        if not mems:
            return like.new_zeros(bsz, 0, d), like.new_zeros(bsz, 0, 3 * d)
        z_mem, u_mem = mems
        length = len(z_mem)
        if z_mem.shape != (length, bsz, d) or u_mem.shape != (length, bsz, 3 * d):
            raise InputError(
                f"mems have shapes {tuple(z_mem.shape)} and {tuple(u_mem.shape)}, but a batch of "
                f"{bsz} needs (len, {bsz}, {d}) and (len, {bsz}, {3 * d})"
            )
        return z_mem.detach().transpose(0, 1), u_mem.detach().transpose(0, 1)

    def _keep(self, old: Tensor, new: Tensor) -> Tensor:
        """The last mem_len positions of [old, new], (len, B, channels), detached."""
        both = torch.cat([old, new.detach().to(old.dtype)], dim=1)
        first = max(both.shape[1] - self.mem_len, 0)
        return both[:, first:].transpose(0, 1).contiguous()
