"""The DEQ-Transformer as first written: f recomputes whatever it needs at every evaluation.

One evaluation projects memory and segment together to queries, keys and values, projects the
positions, builds the mask, and goes through the whole (B, h, L, K) scores with einsum. Only the
normalised weights and the dropout masks are made once per forward. Parameters, random draws and
results are those of :class:`deq_sequence.DEQTransformerLM`.

Inside f states are (B, d, L) and matrices are convolutions, as in the papers; at its border they
are (B, L, d), so that the Jacobian loss draws the same vectors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deq_sequence.model import JAC_VECS, DEQTransformerLM


class PlainTransformerLM(DEQTransformerLM):
    """The model with a plain forward, for training at equilibrium."""

    def forward(
        self,
        data: Tensor,
        target: Tensor,
        mems: list[Tensor],
        train_step: int = -1,
        f_thres: int = 30,
        b_thres: int = 40,
        compute_jac_loss: bool = True,
    ) -> list[Tensor]:
        """As in :class:`deq_sequence.DEQTransformerLM`."""
        qlen, bsz = data.shape
        words = self.word_emb(data.t()).transpose(1, 2)  # (B, d, L)
        u = F.conv1d(words, self.inject_conv.weight, self.inject_conv.bias)  # (B, 3d, L)
        if not mems:
            mems = [u.new_zeros(0, bsz, self.d_model), u.new_zeros(0, bsz, 3 * self.d_model)]
        z0, u0 = (m.permute(1, 2, 0) for m in mems)  # (B, d, M), (B, 3d, M)
        us = torch.cat([u0, u], dim=2)  # (B, 3d, K)
        positions = self.variational_drop(self.pos_emb(us.shape[2]), self.dropout)  # (1, K, d)
        f = plain_layer(self.func, us, z0, positions.transpose(1, 2))
        found = self.deq(
            f,
            u.new_zeros(bsz, qlen, self.d_model),
            f_thres=f_thres,
            b_thres=b_thres,
            training=self.training,
            jac_vecs=JAC_VECS * (compute_jac_loss and self.training),
        )
        hidden = self.variational_drop(found.z, self.dropout)[:, qlen - len(target) :]
        loss = self.crit(hidden.reshape(-1, self.d_model), target.t().reshape(-1))
        states = torch.cat([z0, found.z.detach().transpose(1, 2)], dim=2), us.detach()
        first = max(us.shape[2] - self.mem_len, 0)
        mems = [t[..., first:].permute(2, 0, 1).contiguous() for t in states]  # (len, B, .)
        loss = loss.view(bsz, len(target)).t()
        return [loss, found.jac_loss.view(1, 1), found.sradius, *mems]


def plain_layer(layer, us: Tensor, memory: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
    """f as a function of z (B, L, d).

    Args:
        layer: the model's ``func``, whose parameters are used and whose masks are drawn.
        us: injected input, (B, 3d, K).
        memory: z0, (B, d, M).
        positions: (1, d, K).
    """
    attention, forward = layer.dec_attn, layer.pos_ff
    (bsz, d, mlen), klen = memory.shape, us.shape[2]
    h, qlen, pre_lnorm = attention.n_head, klen - mlen, attention.pre_lnorm
    weights = {name: getattr(attention, name).weight for name in ("qkv_net", "r_net", "o_net")}
    first, second = forward.ff1_net.weight, forward.ff2_net.weight
    # In the order of the package, so that the random numbers agree.
    like = {"device": us.device, "dtype": us.dtype}
    attention.drop.reset_mask(bsz, d, **like)
    attention.dropatt.reset_mask(bsz, h, qlen, klen, **like)
    forward.drop1.reset_mask(bsz, len(first), **like)
    forward.drop2.reset_mask(bsz, d, **like)

    def attend(z: Tensor) -> Tensor:  # (B, d, L) -> (B, d, L)
        context = torch.cat([memory, z], dim=2)  # (B, d, K)
        context = _layer_norm(context) if pre_lnorm else context
        q, k, v = (F.conv1d(context, weights["qkv_net"]) + us).chunk(3, dim=1)
        q = q[..., mlen:].reshape(bsz, h, -1, qlen)
        k, v = k.reshape(bsz, h, -1, klen), v.reshape(bsz, h, -1, klen)
        r = F.conv1d(positions, weights["r_net"]).view(h, -1, klen)  # (h, d_head, K)
        content = torch.einsum("bhdi,bhdj->bhij", q + attention.r_w_bias[:, :, None], k)
        position = torch.einsum("bhdi,hdj->bhij", q + attention.r_r_bias[:, :, None], r)
        score = (content + _shift(position)) / attention.d_head**0.5  # (B, h, L, K)
        hidden = _hidden(qlen, klen, attention.local_size, z.device)
        score = score.masked_fill(hidden, -torch.inf)
        probability = attention.dropatt(F.softmax(score, dim=-1))
        out = torch.einsum("bhij,bhdj->bhdi", probability.type_as(v), v).reshape(bsz, d, qlen)
        out = F.conv1d(out, weights["o_net"], attention.o_net.bias)
        out = attention.drop(out.transpose(1, 2)).transpose(1, 2) + z
        return out if pre_lnorm else _layer_norm(out)

    def feed_forward(y: Tensor) -> Tensor:  # (B, d, L) -> (B, d, L)
        y = _layer_norm(y) if pre_lnorm else y
        inner = F.relu(F.linear(y.transpose(1, 2), first, forward.ff1_net.bias))
        out = F.linear(forward.drop1(inner), second, forward.ff2_net.bias)
        out = forward.drop2(out).transpose(1, 2) + y
        return out if pre_lnorm else _layer_norm(out)

    return lambda z: feed_forward(attend(z.transpose(1, 2))).transpose(1, 2)


def _layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, d, L), no affine parameters."""
    return F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)


def _hidden(qlen: int, klen: int, local_size: int, device) -> Tensor:
    """(L, K) bool: keys that query i may not see."""
    ones = torch.ones(qlen, klen, device=device)
    hidden = torch.triu(ones, diagonal=1 + klen - qlen) > 0
    if local_size > 0:
        hidden = hidden | (torch.tril(ones, diagonal=klen - qlen - local_size) > 0)
    return hidden


def _shift(x: Tensor) -> Tensor:
    """Scores by distance (B, h, L, K), column t at distance K - 1 - t, to scores by key."""
    bsz, h, qlen, klen = x.shape
    padded = torch.cat([x.new_zeros(bsz, h, qlen, 1), x], dim=3)
    return padded.view(bsz, h, klen + 1, qlen)[:, :, 1:].reshape(bsz, h, qlen, klen)
