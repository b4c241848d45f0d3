"""The DEQ-Transformer's layer f: relative attention with memory, then feed-forward.

Shapes: B batch, L segment, M memory, K = M + L, h heads, d = d_model = h * d_head. States are
(B, L, d); what is added to the queries, keys and values from outside, "us", is (B, K, 3d).

``prepare`` does everything that does not depend on z, once per forward, and returns f.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import InputError
from lib.optimization import VariationalAttnDropout, VariationalHidDropout, weight_norm


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without affine parameters, eps 1e-5."""
    return F.layer_norm(x, x.shape[-1:])


def visible_keys(qlen: int, mlen: int, local_size: int = 0, device=None) -> Tensor:
    """(L, K) bool: query i sees keys j <= i + M and, with s = local_size > 0, j > i + M - s."""
    distance = torch.arange(qlen, device=device)[:, None] + mlen
    distance = distance - torch.arange(mlen + qlen, device=device)  # of key j from query i
    visible = distance >= 0
    return visible & (distance < local_size) if local_size > 0 else visible


def relative_shift(x: Tensor) -> Tensor:
    """Align scores by distance to scores by key: out[i, j] = x[i, j + L - 1 - i].

    Column t of x (B, h, L, K) belongs to the distance K - 1 - t, and key j of query i is at the
    distance i + M - j. Entries of keys in the future are arbitrary. (Dai et al. 2019, appendix B)
    """
    *lead, qlen, klen = x.shape
    return F.pad(x, (1, 0)).view(*lead, klen + 1, qlen)[..., 1:, :].reshape(*lead, qlen, klen)


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions and memory on the left (Transformer-XL).

        score(i, j) = [(q_i + r_w_bias) . k_j + (q_i + r_r_bias) . r_{i+M-j}] / sqrt(d_head)

    with q, k, v = qkv_net(c) + us for c = [memory, z], and r = r_net(positions).
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
    ):
        super().__init__()
        if n_head * d_head != d_model:
            raise InputError(
                f"n_head * d_head must equal d_model, but {n_head} * {d_head} is not {d_model}"
            )
        self.n_head, self.d_model, self.d_head = n_head, d_model, d_head
        self.pre_lnorm, self.local_size = pre_lnorm, local_size
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

    def prepare(self, us: Tensor, memory: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """The attention block as a function of z (B, L, d), with its residual.

        Args:
            us: injected input of memory and segment, (B, K, 3d).
            memory: z0, (B, M, d); M may be 0.
            positions: (1, K, d).
        """
        (bsz, mlen, d), klen = memory.shape, us.shape[1]
        qlen, h, d_head = klen - mlen, self.n_head, self.d_head
        # A convolution of kernel size 1 is a matrix: (out, in, 1) -> (out, in).
        qkv_weight = self.qkv_net.weight.squeeze(2)
        o_weight, o_bias = self.o_net.weight.squeeze(2), self.o_net.bias
        r = F.linear(positions, self.r_net.weight.squeeze(2))
        r = r.view(klen, h, d_head).permute(1, 2, 0)  # (h, d_head, K)
        memory = layer_norm(memory) if self.pre_lnorm else memory
        memory_kv = F.linear(memory, qkv_weight[d:]) + us[:, :mlen, d:]  # (B, M, 2d)
        us = us[:, mlen:]
        hidden = ~visible_keys(qlen, mlen, self.local_size, us.device)
        self.drop.reset_mask(bsz, d, device=us.device, dtype=us.dtype)
        self.dropatt.reset_mask(bsz, h, qlen, klen, device=us.device, dtype=us.dtype)

        def heads(x: Tensor) -> Tensor:  # (B, n, d) -> (B, h, n, d_head)
            return x.view(bsz, -1, h, d_head).transpose(1, 2)

        def attend(z: Tensor) -> Tensor:
            qkv = F.linear(layer_norm(z) if self.pre_lnorm else z, qkv_weight) + us  # (B, L, 3d)
            q = qkv[..., :d].reshape(bsz, qlen, h, d_head)
            k, v = torch.cat([memory_kv, qkv[..., d:]], dim=1).split(d, dim=2)  # (B, K, d) each
            content = (q + self.r_w_bias).transpose(1, 2) @ heads(k).transpose(2, 3)
            position = relative_shift((q + self.r_r_bias).transpose(1, 2) @ r)  # (B, h, L, K)
            score = (content + position) / d_head**0.5
            weights = F.softmax(score.masked_fill(hidden, -torch.inf), dim=-1)
            weights = self.dropatt(weights).to(v.dtype)
            out = (weights @ heads(v)).transpose(1, 2).reshape(bsz, qlen, d)
            out = self.drop(F.linear(out, o_weight, o_bias)) + z
            return out if self.pre_lnorm else layer_norm(out)

        return attend


class PositionwiseFF(nn.Module):
    """out = W2 relu(W1 y + b1) + b2 with a residual; dropout after the relu and after W2.

    With pre-layer-norm y is normalised first and the residual is taken from the normalised y.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float, pre_lnorm: bool, wnorm: bool):
        super().__init__()
        self.d_model, self.d_inner, self.pre_lnorm = d_model, d_inner, pre_lnorm
        self.ff1_net = nn.Linear(d_model, d_inner)
        self.ff2_net = nn.Linear(d_inner, d_model)
        self.drop1 = VariationalHidDropout(dropout, length_first=True)
        self.drop2 = VariationalHidDropout(dropout, length_first=True)
        if wnorm:
            for net in (self.ff1_net, self.ff2_net):
                weight_norm(net, ["weight"])

    def prepare(self, bsz: int, device=None, dtype=None) -> Callable[[Tensor], Tensor]:
        """The feed-forward block as a function of y (B, L, d)."""
        first = self.ff1_net.weight, self.ff1_net.bias
        second = self.ff2_net.weight, self.ff2_net.bias
        self.drop1.reset_mask(bsz, self.d_inner, device=device, dtype=dtype)
        self.drop2.reset_mask(bsz, self.d_model, device=device, dtype=dtype)

        def feed_forward(y: Tensor) -> Tensor:
            y = layer_norm(y) if self.pre_lnorm else y
            inner = self.drop1(F.relu(F.linear(y, *first)))  # (B, L, d_inner)
            out = self.drop2(F.linear(inner, *second)) + y
            return out if self.pre_lnorm else layer_norm(out)

        return feed_forward


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
    ):
        super().__init__()
        self.dec_attn = RelativeAttention(
            n_head, d_model, d_head, dropout, dropatt, pre_lnorm, wnorm, local_size
        )
        self.pos_ff = PositionwiseFF(d_model, d_inner, dropout, pre_lnorm, wnorm)

    def prepare(self, us: Tensor, memory: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """f as a function of z (B, L, d) alone; draws the dropout masks it will use throughout.

        Args:
            us: injected input, (B, K, 3d), the memory's on the left.
            memory: (B, M, d).
            positions: (1, K, d).
        """
        attend = self.dec_attn.prepare(us, memory, positions)
        feed_forward = self.pos_ff.prepare(len(us), us.device, us.dtype)
        return lambda z: feed_forward(attend(z))
