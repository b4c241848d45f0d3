"""The DEQ-Transformer's layer f: relative attention with memory, then feed-forward.

Shapes: B batch, L segment, M memory, K = M + L, h heads, d = d_model = h * d_head. States are
(B, L, d). The injected input "us" (B, K, 3d) is added to the queries, keys and values.

``TransformerLayer.prepare`` computes everything that does not depend on z, once per forward pass,
and returns f. The result is two tuples of tensors, :class:`AttentionTensors` and
:class:`FeedForwardTensors`, one pair per dtype. :func:`evaluate` computes f(z) from z and these
tensors alone, so one compiled form of it serves every forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_sequence.linear import autocast_dtype, linear
from lib.errors import InputError
from lib.graphs import compiled
from lib.optimization import VariationalAttnDropout, VariationalHidDropout, weight_norm

INJECTIONS = ("all", "own")  # see RelativeAttention


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without affine parameters, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:])


def visible_keys(qlen: int, mlen: int, local_size: int = 0, device=None) -> Tensor:
    """(L, K) bool: query i sees keys j <= i + M and, with s = local_size > 0, j > i + M - s."""
    distance = torch.arange(qlen, device=device)[:, None] + mlen
    distance = distance - torch.arange(mlen + qlen, device=device)  # from query i back to key j
    visible = distance >= 0
    return visible & (distance < local_size) if local_size > 0 else visible


def own_keys(qlen: int, mlen: int, device=None) -> Tensor:
    """(L, K) bool: key j is query i's own, and the query has another key to see."""
    own = torch.eye(qlen, mlen + qlen, dtype=torch.bool, device=device).roll(mlen, dims=1)
    own[0, 0] = False
    return own


def relative_shift(x: Tensor) -> Tensor:
    """Convert scores by distance into scores by key: out[i, j] = x[i, j + L - 1 - i].

    Column t < K of x (..., L, K + 1) holds distance K - 1 - t. Key j has distance i + M - j from
    query i. Column K is spare: with it the result (..., L, K) is a view, namely the elements of x
    from element L - 1 on, in row-major order. Entries of future keys are arbitrary.
    (Dai et al. 2019, appendix B)
    """
    *lead, qlen, width = x.shape
    flat = x.reshape(*lead, qlen * width).narrow(-1, qlen - 1, qlen * (width - 1))
    return flat.view(*lead, qlen, width - 1)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's dtype if autocast is on, else x's own."""
    return autocast_dtype(x) or x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without autocast; the meta device has none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


class AttentionTensors(NamedTuple):
    """The attention block's tensors apart from z; heads come first, as in its batched products."""

    qkv_weight: Tensor  # (3d, d)
    injected: Tensor  # (B * L, 3d); r_w_bias is included in the queries' part
    memory_k: Tensor  # (h, B, M, d_head)
    memory_v: Tensor  # (h, B, M, d_head)
    positions: Tensor  # (h, d_head, K + 1), divided by sqrt(d_head); the last column is spare
    bias: Tensor  # (h, 1, L, K), added to the scores: -inf for a hidden key
    out_weight: Tensor  # (d, d)
    out_bias: Tensor  # (d,)
    drop: Tensor | None  # (B, 1, d)
    dropatt: Tensor | None  # (h, B, L, K)
    own: Tensor | None = None  # (B, L, d), in the place of the residual path

    def select(self, rows: Tensor) -> "AttentionTensors":
        """The tensors for the samples ``rows`` only; tensors shared by samples are not copied."""
        injected = self.injected.unflatten(0, (-1, self.bias.shape[2]))  # (B, L, 3d)
        return self._replace(
            injected=_select(injected, 0, rows).flatten(0, 1),
            memory_k=_select(self.memory_k, 1, rows),
            memory_v=_select(self.memory_v, 1, rows),
            drop=_select(self.drop, 0, rows),
            dropatt=_select(self.dropatt, 1, rows),
            own=_select(self.own, 0, rows),
        )


class FeedForwardTensors(NamedTuple):
    """The feed-forward block's tensors apart from its input."""

    weight1: Tensor  # (d_inner, d)
    bias1: Tensor
    weight2: Tensor  # (d, d_inner)
    bias2: Tensor
    drop1: Tensor | None  # (B, 1, d_inner)
    drop2: Tensor | None  # (B, 1, d)

    def select(self, rows: Tensor) -> "FeedForwardTensors":
        """The tensors for the samples ``rows`` only; tensors shared by samples are not copied."""
        drop1, drop2 = _select(self.drop1, 0, rows), _select(self.drop2, 0, rows)
        return self._replace(drop1=drop1, drop2=drop2)


def _select(x: Tensor | None, dim: int, rows: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(dim, rows)


def evaluate(
    z: Tensor,
    attention: AttentionTensors,
    feed_forward: FeedForwardTensors,
    pre_lnorm: bool,
    fused: bool,
) -> Tensor:
    """f(z) for z (B, L, d): matrix products in the tensors' dtype, other operations in z's dtype.

    Args:
        fused: let PyTorch choose the attention kernel, which may not support second derivatives.
    """
    passed = z if attention.own is None else attention.own
    y = attend(layer_norm(z) if pre_lnorm else z, attention, fused) + passed
    y = layer_norm(y)  # pre_lnorm: before the feed-forward; else: after the attention
    out = transform(y, feed_forward) + y
    return out if pre_lnorm else layer_norm(out)


def attend(y: Tensor, t: AttentionTensors, fused: bool) -> Tensor:
    """The attention block without its residual, (B, L, d) -> (B, L, d)."""
    (bsz, qlen, d), (h, d_head, klen) = y.shape, t.positions.shape
    klen = klen - 1
    y = y.to(t.qkv_weight.dtype).reshape(bsz * qlen, d)
    qkv = linear(y, t.qkv_weight, t.injected).view(bsz, qlen, 3, h, d_head)
    q, k, v = qkv.permute(2, 3, 0, 1, 4).unbind(0)  # (h, B, L, d_head) each
    k = torch.cat([t.memory_k, k], dim=2)  # (h, B, K, d_head)
    v = torch.cat([t.memory_v, v], dim=2)
    q = q.reshape(h, bsz * qlen, d_head)
    position = (q @ t.positions).view(h, bsz, qlen, klen + 1)
    bias = relative_shift(position) + t.bias  # (h, B, L, K)
    q = q.view(h, bsz, qlen, d_head)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        q, k, v, bias = (x.flatten(0, 1) for x in (q, k, v, bias))
        # In place, to hold the scores once. With autograd this would copy the gradient of a view.
        # (``out``, not ``baddbmm_``, whose operations PyTorch's counter leaves out.)
        out = None if torch.is_grad_enabled() else bias
        score = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d_head**-0.5, out=out)
        weights = F.softmax(score, dim=-1).view(h, bsz, qlen, klen)
        weights = weights if t.dropatt is None else weights * t.dropatt
        out = (weights.flatten(0, 1) @ v).view(h, bsz, qlen, d_head)
    out = out.permute(1, 2, 0, 3).reshape(bsz, qlen, d)
    out = linear(out, t.out_weight, t.out_bias)
    return out if t.drop is None else out * t.drop


def transform(y: Tensor, t: FeedForwardTensors) -> Tensor:
    """The feed-forward block without its residual, (B, L, d) -> (B, L, d)."""
    rows = y.to(t.weight1.dtype).flatten(0, 1)  # (B * L, d)
    # In place, to hold the layer's largest tensor once. Before view(): autograd would copy the
    # gradient of an in-place operation on a view.
    inner = F.relu(linear(rows, t.weight1, t.bias1), inplace=True)
    inner = inner.view(*y.shape[:2], -1)  # (B, L, d_inner)
    inner = inner if t.drop1 is None else inner * t.drop1
    out = linear(inner, t.weight2, t.bias2)
    return out if t.drop2 is None else out * t.drop2


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions and memory on the left (Transformer-XL).

        score(i, j) = [(q_i + r_w_bias) . k_j + (q_i + r_r_bias) . r_{i+M-j}] / sqrt(d_head)

    with q, k, v = qkv_net(c) + us for c = [memory, z], and r = r_net(positions). With ``inject``
    'own' the first third of us is added to q, the last third takes the residual path's place, and a
    position does not see itself: of its own, only the word counts.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        dropout: float,
        dropatt: float,
        pre_lnorm: bool,
        wnorm: bool,
        local_size: int,
        inject: str = "all",
    ):
        super().__init__()
        if n_head * d_head != d_model:
            raise InputError(
                f"n_head * d_head must equal d_model, but {n_head} * {d_head} is not {d_model}"
            )
        self.n_head, self.d_model, self.d_head = n_head, d_model, d_head
        self.pre_lnorm, self.local_size, self.inject = pre_lnorm, local_size, inject
        self.qkv_net = nn.Conv1d(d_model, 3 * d_model, 1, bias=False)
        self.r_net = nn.Conv1d(d_model, d_model, 1, bias=False)
        self.o_net = nn.Conv1d(d_model, d_model, 1)
        self.r_w_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.zeros(n_head, d_head))
        self.drop = VariationalHidDropout(dropout, length_first=True)
        self.dropatt = VariationalAttnDropout(dropatt)
        if wnorm:
            for net in (self.qkv_net, self.r_net, self.o_net):
                weight_norm(net, ["weight"])

    def prepare(
        self, us: Tensor, memory: Tensor, positions: Tensor
    ) -> Callable[[torch.dtype], AttentionTensors]:
        """Return a function: dtype -> the block's tensors apart from z.

        Args:
            us: injected input of memory and segment, (B, K, 3d).
            memory: z0, (B, M, d); M may be 0.
            positions: position embeddings, (1, K, d).
        """
        (bsz, mlen, d), klen = memory.shape, us.shape[1]
        qlen, h, d_head = klen - mlen, self.n_head, self.d_head
        memory = layer_norm(memory) if self.pre_lnorm else memory
        drop = self.drop.reset_mask(bsz, d, device=us.device, dtype=us.dtype)
        dropatt = self.dropatt.reset_mask(bsz, h, qlen, klen, device=us.device, dtype=us.dtype)
        dropatt = None if dropatt is None else dropatt.transpose(0, 1).contiguous()

        with without_autocast(us.device):
            r = linear(positions[0], self.r_net.weight.squeeze(2)) / d_head**0.5
            r = F.pad(r.view(klen, h, d_head).permute(1, 2, 0), (0, 1))  # (h, d_head, K + 1)
            # (q + r_r_bias) . r = (q + r_w_bias) . r + (r_r_bias - r_w_bias) . r, where the last
            # term does not depend on q.
            rest = (self.r_r_bias - self.r_w_bias)[:, None] @ r  # (h, 1, K + 1)
            bias = relative_shift(rest.expand(h, qlen, klen + 1))  # (h, L, K)
            hidden = ~visible_keys(qlen, mlen, self.local_size, us.device)
            if self.inject == "own":
                hidden |= own_keys(qlen, mlen, us.device)
            bias = bias.masked_fill(hidden, -torch.inf)[:, None]
            own = None
            if self.inject == "own":
                own, us = us[:, mlen:, 2 * d :], F.pad(us[..., :d], (0, 2 * d))
            # r_w_bias is added to the queries only, zeros to the keys and values.
            added = F.pad(self.r_w_bias.flatten(), (0, 2 * d))
            injected = (us[:, mlen:] + added).reshape(bsz * qlen, 3 * d)

        def tensors(dtype: torch.dtype) -> AttentionTensors:
            # Weights are read here: in half precision nothing keeps their float32 form. A
            # convolution of kernel size 1 is a matrix: (out, in, 1) -> (out, in).
            weight = self.qkv_net.weight.squeeze(2).to(dtype)
            out_weight = self.o_net.weight.squeeze(2)
            kv = linear(memory.to(dtype), weight[d:]) + us[:, :mlen, d:].to(dtype)
            k, v = kv.reshape(bsz, mlen, 2, h, d_head).permute(2, 3, 0, 1, 4).unbind(0)
            cast = (bias, out_weight, self.o_net.bias, drop, dropatt)
            return AttentionTensors(
                *(weight, injected.to(dtype), k, v, r.to(dtype)),
                *(_to(x, dtype) for x in cast),
                own,  # as z, not rounded: it takes z's place
            )

        return tensors


class PositionwiseFF(nn.Module):
    """out = W2 relu(W1 y + b1) + b2 of a normalised y; dropout after the relu and after W2."""

    def __init__(self, d_model: int, d_inner: int, dropout: float, wnorm: bool):
        super().__init__()
        self.d_model, self.d_inner = d_model, d_inner
        self.ff1_net = nn.Linear(d_model, d_inner)
        self.ff2_net = nn.Linear(d_inner, d_model)
        self.drop1 = VariationalHidDropout(dropout, length_first=True)
        self.drop2 = VariationalHidDropout(dropout, length_first=True)
        if wnorm:
            for net in (self.ff1_net, self.ff2_net):
                weight_norm(net, ["weight"])

    def prepare(
        self, bsz: int, device=None, dtype=None
    ) -> Callable[[torch.dtype], FeedForwardTensors]:
        """Return a function: dtype -> the block's tensors apart from its input."""
        drop1 = self.drop1.reset_mask(bsz, self.d_inner, device=device, dtype=dtype)
        drop2 = self.drop2.reset_mask(bsz, self.d_model, device=device, dtype=dtype)

        def tensors(dtype: torch.dtype) -> FeedForwardTensors:
            first = self.ff1_net.weight, self.ff1_net.bias
            parts = *first, self.ff2_net.weight, self.ff2_net.bias, drop1, drop2
            return FeedForwardTensors(*(_to(x, dtype) for x in parts))

        return tensors


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


class TransformerLayer(nn.Module):
    """The layer whose fixed point the model finds. Arguments as in :class:`DEQTransformerLM`."""

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float,
        pre_lnorm: bool = False,
        wnorm: bool = False,
        local_size: int = 0,
        inject: str = "all",
    ):
        super().__init__()
        self.dec_attn = RelativeAttention(
            n_head, d_model, d_head, dropout, dropatt, pre_lnorm, wnorm, local_size, inject
        )
        self.pos_ff = PositionwiseFF(d_model, d_inner, dropout, wnorm)
        self.pre_lnorm = pre_lnorm
        self._compiled: Callable | None = None

    def compile_evaluations(self) -> None:
        """Use torch.compile for all further evaluations of f without autograd, as in a solver.

        With autograd, f stays eager: the backward pass of a compiled function would compute the
        gradients of all weights in every vector-Jacobian product of the adjoint.

        Raises:
            InputError: torch.compile does not work here.
        """
        self._compiled = compiled(evaluate, self.dec_attn.r_w_bias.device)

    def prepare(self, us: Tensor, memory: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """Return f as a function of z (B, L, d) alone, with dropout masks drawn here and fixed.

        Under autocast, f multiplies matrices in autocast's dtype, with weights that are cast once
        per stage of a solve. Within ``torch.autocast(..., enabled=False)`` the same f computes in
        the dtype of z. f holds the tensors of one dtype at a time. The result always has the dtype
        of z. f has ``plain`` and ``select`` (:mod:`lib.solvers.maps`); the first evaluation of a
        selection in a dtype copies the tensors that differ between samples, and shares all others
        with f.

        Args:
            us: injected input, (B, K, 3d), the memory's part on the left.
            memory: states of the memory, (B, M, d).
            positions: position embeddings, (1, K, d).
        """
        attention = self.dec_attn.prepare(us, memory, positions)
        feed_forward = self.pos_ff.prepare(len(us), us.device, us.dtype)
        trained = torch.is_grad_enabled()

        @lru_cache(maxsize=1)  # a solve in stages must not hold its weights in both dtypes
        def tensors(dtype: torch.dtype) -> tuple[AttentionTensors, FeedForwardTensors]:
            # The first call may come from a solver (no_grad). Autocast would round the products
            # of tensors in full precision, which ``source`` asks for under autocast.
            with torch.set_grad_enabled(trained), without_autocast(us.device):
                return attention(dtype), feed_forward(dtype)

        usual = working_dtype(us)
        tensors(usual)  # fill the cache now: every evaluation of f does the same work
        f = self._map(tensors, usual=usual)
        dtypes = dict.fromkeys((usual, us.dtype))
        if not getattr(self, "_is_replica", False):  # DataParallel makes a new layer at each call
            f.source = lambda: (self._on, {dtype: tensors(dtype) for dtype in dtypes})
        return f

    def _on(self, held: dict) -> Callable[[Tensor], Tensor]:
        """f on other tensors, by their dtype."""
        return self._map(held.__getitem__)

    def _map(
        self,
        whole: Callable[[torch.dtype], tuple[AttentionTensors, FeedForwardTensors]],
        rows: Tensor | None = None,
        *,
        usual: torch.dtype | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Build f for the samples ``rows`` (None: all) from the tensors of the whole batch.

        ``usual`` is the dtype under the autocast of the forward pass. With it, ``whole`` has a
        cache, which tensors of another dtype leave when a graph has been recorded with them.
        """

        @lru_cache(maxsize=1)
        def selected(dtype: torch.dtype) -> tuple[AttentionTensors, FeedForwardTensors]:
            attention, feed_forward = whole(dtype)
            with torch.enable_grad():  # the selected tensors stay in the graph, also in a solver
                return attention.select(rows), feed_forward.select(rows)

        tensors = whole if rows is None else selected

        def plain(z: Tensor) -> Tensor:
            return run(evaluate, z, False)

        def f(z: Tensor) -> Tensor:
            # With autograd, fused kernels reject a trainable bias (CPU), or sum its gradients in
            # no fixed order (GPU), so that two runs with the same seed would differ.
            if torch.is_grad_enabled():
                return plain(z)
            return run(self._compiled or evaluate, z, True)

        def run(form: Callable, z: Tensor, fused: bool) -> Tensor:
            dtype = working_dtype(z)
            attention, feed_forward = tensors(dtype)
            # Fused kernels do not support a dropout mask of attention weights. On a CPU they are no
            # faster in float32 (62 ms against 63) and slower in bfloat16 (27 ms against 19):
            # medians of attention at B 4, L = M 150, d 700, one thread.
            fused &= attention.dropatt is None and z.device.type != "cpu"
            # working_dtype has chosen the dtype; autocast must not change single operations.
            with without_autocast(z.device):
                out = form(z, attention, feed_forward, self.pre_lnorm, fused)
            if usual not in (None, dtype) and torch.is_grad_enabled():
                for cached in {whole, tensors}:  # for one adjoint: its graph suffices
                    cached.cache_clear()
            return out

        def select(some: Tensor) -> Callable[[Tensor], Tensor]:
            # Selects from the whole batch, so that a selection of a selection does not keep the
            # tensors of the first selection alive.
            return self._map(whole, some if rows is None else rows[some], usual=usual)

        f.plain, f.select = plain, select
        return f
