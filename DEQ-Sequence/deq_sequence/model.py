"""The DEQ-Transformer language model (arXiv 1909.01377, 2106.14342)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deq_sequence.embedding import AdaptiveEmbedding, PositionalEmbedding
from deq_sequence.initialization import initialize
from deq_sequence.layer import INJECTIONS, TransformerLayer
from deq_sequence.linear import linear
from deq_sequence.softmax import ProjectedAdaptiveLogSoftmax
from deq_sequence.start import STARTS, LearnedStart, distance
from deq_sequence.ties import TiedWeights, ties_between
from lib.deq import DEQ, SAME, SRADIUS_ITERS, SolverAttributes, stacked
from lib.errors import InputError, check
from lib.gradients import Gradient
from lib.gradients.iterations import Iteration
from lib.optimization import VariationalDropout
from lib.runs.checkpoint import load_weights
from lib.solvers import anderson
from lib.solvers.maps import Map
from lib.solvers.stats import scalars_to

EVAL_STATES = ("point", "value")
JAC_VECS = 1  # random vectors of the Jacobian loss, as in the published runs


@dataclass
class _Segment:
    """Results for one segment: states z (B, L, d), Jacobian figures, and memory for the next."""

    z: Tensor
    jac_loss: Tensor  # (1, 1)
    sradius: Tensor  # (B, 1)
    mems: list[Tensor]  # (len, B, d), (len, B, 3d)
    residuals: Tensor | None = None  # ||f(z) - z|| / ||f(z)|| of each position, (B, L)
    start_loss: Tensor | None = None  # of the learned start, 0-dim


class DEQTransformerLM(SolverAttributes, TiedWeights):
    """Language model whose hidden states are the fixed point of one transformer layer.

    u = inject_conv(word_emb(data)); z* = f(z*; u, memory); loss = crit(dropout(z*), target).

    In the first ``pretrain_steps`` training steps (the stacked phase) there is no solver: f is
    applied ``n_layer`` times with ordinary autograd. The memory holds the last ``mem_len`` states
    and injections of the previous segments, detached.

    Args:
        n_token: vocabulary size.
        n_layer, eval_n_layer: applications of f in the stacked phase, in training and evaluation.
        n_head, d_model, d_head, d_inner: sizes of the layer; d_model = n_head * d_head.
        dropout, dropatt: probabilities for hidden states and attention weights.
        tie_weights: share embedding and output tables.
        d_embed: embedding width, d_model by default.
        div_val: factor by which the embedding width falls from one vocabulary cluster to the next.
        tie_projs: for each cluster, whether to tie the embedding projection and the output
            projection; missing entries are False.
        pre_lnorm: layer norm before attention and feed-forward instead of after.
        wnorm: weight normalisation of the layer's matrices.
        tgt_len, mem_len: segment and memory lengths (mem_len 0 or None: no memory).
        local_size: number of positions that a query sees, including its own; 0 means all.
        pretrain_steps: length of the stacked phase.
        cutoffs: first word id of every vocabulary cluster except the first.
        load: path of a state dict to start from; '' means none.
        f_solver, b_solver: names or callables (see :class:`lib.deq.DEQ`).
        stop_mode: residual that stops the forward solver, 'rel' or 'abs'; the adjoint uses 'rel'.
        logging: function that receives one line after ``load``; None for no output.
        grad: how to differentiate the equilibrium (see :mod:`lib.gradients`).
        tie_proj_mode: how ``tie_projs`` ties (see :class:`deq_sequence.ties.TiedWeights`):
            'apart', two parameters that start equal, as published; 'shared', one parameter; or
            'storage', one array of numbers with two optimiser states.
        inject: 'all', as published: a word is added to the query, key and value of its position, so
            the positions to its right see it at once. 'own': it is added to the query, and to the
            output of the attention in the place of the state. Its position sees the states of other
            positions alone; without memory, a state of zeros stands left of the first position.
        f_start: where a solve begins: 'zero', or 'learned', from the words at each position and
            before it (:class:`deq_sequence.start.LearnedStart`).
        eval_state: the state in evaluation: 'point', the point at which the solver ends, or
            'value', f there, as in training. The solver has evaluated it already.

    Raises:
        InputError: sizes do not match, or a solver, ``stop_mode`` or the file ``load`` is bad.
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
        inject: str = "all",
        f_start: str = "zero",
        eval_state: str = "point",
    ):
        super().__init__()
        d_embed = d_model if d_embed is None else d_embed
        cutoffs = list(cutoffs)
        self.n_token, self.d_model, self.d_embed = n_token, d_model, d_embed
        self.n_layer, self.eval_n_layer = n_layer, eval_n_layer
        self.pretrain_steps = pretrain_steps
        self.reset_length(tgt_len, mem_len)
        check(local_size >= 0, "local_size", local_size, "0 (all positions) or more")
        check(inject in INJECTIONS, "inject", inject, f"one of {', '.join(INJECTIONS)}")
        if inject == "own":
            check(local_size != 1, "local_size", local_size, "0 or above 1 with inject 'own'")
        for name, value, known in (
            ("f_start", f_start, STARTS),
            ("eval_state", eval_state, EVAL_STATES),
        ):
            check(value in known, name, value, f"one of {', '.join(known)}")
        self.inject, self.eval_state = inject, eval_state
        self.deq = DEQ(
            f_solver, b_solver or SAME, stop_mode=stop_mode, b_stop_mode="rel", grad=grad
        )

        self.word_emb = AdaptiveEmbedding(n_token, d_embed, d_model, cutoffs, div_val)
        self.inject_conv = nn.Conv1d(d_model, 3 * d_model, 1)
        self.pos_emb = PositionalEmbedding(d_model)
        self.func = TransformerLayer(
            n_head, d_model, d_head, d_inner, dropout, dropatt, pre_lnorm, wnorm, local_size, inject
        )
        self.crit = ProjectedAdaptiveLogSoftmax(n_token, d_embed, d_model, cutoffs, div_val)
        self.tie(ties_between(self.word_emb, self.crit, tie_weights, tie_projs, tie_proj_mode))
        self.start = LearnedStart(d_model) if f_start == "learned" else None
        self.dropout = dropout
        self.variational_drop = VariationalDropout()
        initialize(self)
        if load:
            load_weights(self, load)
            if logging is not None:
                logging(f"weights loaded from {load}")

    @property
    def ties_projections(self) -> bool:
        """Whether any projections are tied, so that ``tie_proj_mode`` has an effect."""
        return any(tie.ours.startswith("crit.out_projs.") for tie in self.ties)

    def reset_length(self, tgt_len: int | None, mem_len: int | None) -> None:
        """Set the segment and memory lengths, for example for evaluation."""
        for name, value in (("tgt_len", tgt_len), ("mem_len", mem_len)):
            check(value is None or value >= 0, name, value, "0 or more")
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
        """Compute the loss of a segment.

        Args:
            data: (seq_len, B) word ids; longer than ``target`` if it begins with extra context.
            target: (tgt_len, B) next words, aligned with the last positions of ``data``.
            mems: ``[]`` at first, then the last two results of the previous call; not modified.
            train_step: from 0 to ``pretrain_steps`` - 1 the model is stacked; any other value,
                such as -1, solves for the equilibrium.
            f_thres, b_thres: thresholds of the forward and backward solver.
            compute_jac_loss: estimate the Jacobian loss (only in training at equilibrium).
            spectral_radius_mode: compute the spectral radius (only in evaluation at equilibrium).
            writer: a SummaryWriter that receives the residuals and nfe of both passes.

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
            jac_vecs=JAC_VECS * compute_jac_loss,
            sradius_iters=SRADIUS_ITERS * spectral_radius_mode,
            on_solve=None if writer is None else scalars_to(writer, train_step),
        )
        tgt_len, bsz = target.shape
        # One dropout mask per sample and channel. The first public code applied the mask over
        # positions, by a mistake in the tensor layout.
        hidden = self.variational_drop(segment.z, self.dropout)
        hidden = hidden[:, len(data) - tgt_len :]  # (B, tgt_len, d)
        loss = self.crit(hidden.reshape(-1, self.d_model), target.t().reshape(-1))
        loss = loss.view(bsz, tgt_len).t()
        if segment.start_loss is not None:  # changes no value, and gives the start its gradient
            loss = loss + (segment.start_loss - segment.start_loss.detach())
        return [loss, segment.jac_loss, segment.sradius, *segment.mems]

    @torch.no_grad()
    def log_prob(
        self, data: Tensor, mems: list[Tensor], f_thres: int = 30, *, warm_start: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities (B, n_token) of the word after ``data`` (seq_len, B), and memory.

        With ``warm_start`` the solve begins at the last state of the memory, not at ``f_start``. If
        f has several fixed points, it may find another one.
        """
        how = {"f_thres": f_thres, "b_thres": 1, "warm_start": warm_start}
        segment = self._carry(data, mems, -1, **how)
        return self.crit.log_prob(segment.z[:, -1]), segment.mems

    @torch.no_grad()
    def token_figures(
        self, data: Tensor, target: Tensor, mems: list[Tensor], f_thres: int = 30
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of each position of ``data`` (L, B): -log p(target), its residual, both (L, B); memory.

        A residual is ||f(z) - z|| / ||f(z)|| of the state of this position alone.
        """
        segment = self._carry(data, mems, -1, f_thres=f_thres, b_thres=1, residuals=True)
        loss = self.crit(segment.z.flatten(0, 1), target.t().reshape(-1))
        return loss.view(target.shape[::-1]).t(), segment.residuals.t(), segment.mems

    @torch.no_grad()
    def log_probs(self, data: Tensor, train_step: int = -1, f_thres: int = 30) -> Tensor:
        """Log-probabilities (L, B, n_token) at every position of ``data`` (L, B), without memory.

        ``train_step`` selects the phase, as in :meth:`forward`.
        """
        z = self._carry(data, [], train_step, f_thres=f_thres, b_thres=1).z
        return self.crit.log_prob(z.flatten(0, 1)).unflatten(0, z.shape[:2]).transpose(0, 1)

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
        warm_start: bool = False,
        residuals: bool = False,
    ) -> _Segment:
        """Embed a segment, compute its states, and build the memory for the next segment."""
        qlen, bsz = data.shape
        start = self.pos_emb.inv_freq.new_zeros(bsz, qlen, self.d_model)  # (B, L, d)
        words = self.word_emb(data.t())  # (B, L, d)
        u = linear(words, self.inject_conv.weight.squeeze(2), self.inject_conv.bias)
        z0, u0 = self._memory(mems, start)
        us = torch.cat([u0, u], dim=1)  # (B, K, 3d)
        positions = self.variational_drop(self.pos_emb(us.shape[1]), self.dropout)  # (1, K, d)
        f = self.func.prepare(us, z0, positions)
        guess = None if self.start is None else self.start(us, qlen).to(start.dtype)

        if 0 <= train_step < self.pretrain_steps:
            z = stacked(f, start, self.n_layer if self.training else self.eval_n_layer)
            jac_loss, sradius = start.new_zeros(()), start.new_zeros(bsz, 1)
        else:
            start = start if guess is None else guess.detach()
            if warm_start and z0.shape[1]:
                start = z0[:, -1:].expand_as(start)
            values = not self.training and self.eval_state == "value"
            solution = self.deq(
                seen := _Seen(f) if values else f,
                start,
                f_thres=f_thres,
                b_thres=b_thres,
                training=self.training,
                jac_vecs=jac_vecs if self.training else 0,
                sradius_iters=0 if self.training else sradius_iters,
                on_solve=on_solve,
            )
            z, jac_loss, sradius = solution.z, solution.jac_loss, solution.sradius
            z = seen.value_at(z) if values else z
        mems = [self._keep(z0, z), self._keep(u0, u)]
        segment = _Segment(z, jac_loss.view(1, 1), sradius, mems)
        if self.training and guess is not None:
            segment.start_loss = distance(guess, z)
        if residuals:
            fz = f(z)
            segment.residuals = (fz - z).norm(dim=2) / fz.norm(dim=2)
        return segment

    def _memory(self, mems: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """The caller's memory as z (B, M, d) and u (B, M, 3d).

        Without memory M is 0; with ``inject`` 'own' it is 1, for the first position to see zeros.
        """
        bsz, d = len(like), self.d_model
        if not mems:
            mlen = int(self.inject == "own")
            return like.new_zeros(bsz, mlen, d), like.new_zeros(bsz, mlen, 3 * d)
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


class _Seen:
    """f, and the last point z at which a solver evaluated it, with its value f(z).

    It offers no ``source``: in an evaluation by f(z), f runs without CUDA graphs.
    """

    def __init__(self, f: Map):
        self._f, self._last = f, None
        self.plain = f.plain

    def __call__(self, z: Tensor) -> Tensor:
        fz = self._f(z)
        if not torch.is_grad_enabled():  # a solver's
            self._last = z, fz.detach().clone()
        return fz

    def select(self, rows: Tensor) -> Map:
        """f on the samples ``rows``, of which the last points are those seen here."""
        part = self._f.select(rows)

        def evaluated(z: Tensor) -> Tensor:
            fz = part(z)
            if self._last is not None and not torch.is_grad_enabled():
                point, value = self._last
                self._last = point.index_copy(0, rows, z), value.index_copy(0, rows, fz.detach())
            return fz

        evaluated.plain, evaluated.select = part.plain, part.select
        return evaluated

    def value_at(self, z: Tensor) -> Tensor:
        """f(z) where z is a sample's last point, else z: the solver found a better one before."""
        if self._last is None:  # all evaluations were recorded by autograd
            return z
        point, value = self._last
        same = (point == z).flatten(1).all(1)[:, None, None]
        value = torch.where(same, value, z.detach())
        return value + (z - z.detach()) if z.requires_grad else value
