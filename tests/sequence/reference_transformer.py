"""The DEQ-Transformer written out from its equations, for comparison with the package.

States are (B, d, L), as in the papers; relative positions are looked up by distance; the softmax
is the whole distribution over the vocabulary. Nothing of the package is used, and nothing is fast.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def weight_of(params: dict[str, Tensor], name: str) -> Tensor:
    """A matrix (out, in), from its plain or its weight-normalised parameters."""
    if f"{name}.weight" in params:
        w = params[f"{name}.weight"]
    else:
        v, g = params[f"{name}.weight_v"], params[f"{name}.weight_g"]
        norms = v.reshape(len(v), -1).square().sum(1).sqrt()
        w = v * g / norms.reshape(g.shape)
    return w.reshape(w.shape[0], w.shape[1])


def normalise(x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, d, L)."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


@dataclass
class Reference:
    """Parameters by their state-dict names, and the constructor's settings."""

    params: dict[str, Tensor]
    settings: dict

    def __post_init__(self):
        n_token, cutoffs = self.settings["n_token"], list(self.settings.get("cutoffs", ()))
        edges = [0, *cutoffs, n_token]
        self.clusters = list(pairwise(edges))
        self.d, self.h = self.settings["d_model"], self.settings["n_head"]
        self.div_val = self.settings.get("div_val", 1)
        self.pre_lnorm = self.settings.get("pre_lnorm", False)

    # --- Words ----------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """ids (L, B) -> (B, d, L), word by word."""
        rows = []
        for word in ids.t().flatten().tolist():
            i = 0
            if self.div_val > 1:
                i = next(n for n, (low, high) in enumerate(self.clusters) if low <= word < high)
                word -= self.clusters[i][0]
            row = self.params[f"word_emb.emb_layers.{i}.weight"][word]
            if f"word_emb.emb_projs.{i}.weight" in self.params:
                row = self.params[f"word_emb.emb_projs.{i}.weight"] @ row
            rows.append(row * math.sqrt(self.d))
        length, batch = ids.shape
        return torch.stack(rows).view(batch, length, self.d).transpose(1, 2)

    def log_distribution(self, hidden: Tensor) -> Tensor:
        """hidden (N, d) -> log p of every word, (N, n_token)."""

        def projected(i: int) -> Tensor:
            name = f"crit.out_projs.{i}.weight"
            return hidden @ self.params[name] if name in self.params else hidden

        def table(i: int) -> tuple[Tensor, Tensor]:
            low, high = self.clusters[i]
            if self.div_val > 1:
                low, high, n = 0, high - low, i
            else:
                n = 0
            weight = self.params[f"crit.out_layers.{n}.weight"][low:high]
            return weight, self.params[f"crit.out_layers.{n}.bias"][low:high]

        weight, bias = table(0)
        if len(self.clusters) > 1:
            weight = torch.cat([weight, self.params["crit.cluster_weight"]])
            bias = torch.cat([bias, self.params["crit.cluster_bias"]])
        head = torch.log_softmax(projected(0) @ weight.t() + bias, dim=1)
        parts = [head[:, : self.clusters[0][1]]]
        for i in range(1, len(self.clusters)):
            weight, bias = table(i)
            within = torch.log_softmax(projected(i) @ weight.t() + bias, dim=1)
            parts.append(head[:, -i][:, None] + within)
        return torch.cat(parts, dim=1)

    # --- The layer ------------------------------------------------------------------------

    def inject(self, ids: Tensor) -> Tensor:
        """(B, 3d, L)"""
        weight = weight_of(self.params, "inject_conv")
        u = torch.einsum("oi,bil->bol", weight, self.embed(ids))
        return u + self.params["inject_conv.bias"][None, :, None]

    def position_features(self, distance: Tensor) -> Tensor:
        """(d,) + the shape of ``distance``: all sines, then all cosines."""
        k = torch.arange(self.d // 2, dtype=torch.float64)
        angles = 10000 ** (-2 * k / self.d).view(-1, *[1] * distance.dim()) * distance
        return torch.cat([angles.sin(), angles.cos()])

    def f(self, z: Tensor, us: Tensor, z0: Tensor) -> Tensor:
        """z (B, d, L), us (B, 3d, K), z0 (B, d, M)."""
        p, d, h = self.params, self.d, self.h
        batch, _, length = z.shape
        memory = z0.shape[2]
        keys = memory + length

        context = torch.cat([z0, z], dim=2)
        if self.pre_lnorm:
            context = normalise(context)
        name = "func.dec_attn"
        qkv = torch.einsum("oi,bik->bok", weight_of(p, f"{name}.qkv_net"), context) + us
        q, k, v = (t.reshape(batch, h, d // h, keys) for t in qkv.split(d, dim=1))
        q = q[..., memory:]

        # Distances of key j from query i; those of the future are masked below.
        i = torch.arange(length)[:, None]
        j = torch.arange(keys)[None, :]
        distance = (i + memory - j).double()
        features = self.position_features(distance.clamp(min=0))  # (d, L, K)
        r = torch.einsum("oi,iqk->oqk", weight_of(p, f"{name}.r_net"), features)
        r = r.reshape(h, d // h, length, keys)
        content = torch.einsum("bhdq,bhdk->bhqk", q + p[f"{name}.r_w_bias"][None, :, :, None], k)
        position = torch.einsum("bhdq,hdqk->bhqk", q + p[f"{name}.r_r_bias"][None, :, :, None], r)
        score = (content + position) / math.sqrt(d // h)

        seen = j <= i + memory
        if self.settings.get("local_size", 0) > 0:
            seen = seen & (j > i + memory - self.settings["local_size"])
        attention = torch.softmax(torch.where(seen, score, -torch.inf), dim=3)
        out = torch.einsum("bhqk,bhdk->bhdq", attention, v).reshape(batch, d, length)
        out = torch.einsum("oi,bil->bol", weight_of(p, f"{name}.o_net"), out)
        y = out + p[f"{name}.o_net.bias"][None, :, None] + z
        if not self.pre_lnorm:
            y = normalise(y)

        name = "func.pos_ff"
        if self.pre_lnorm:
            y = normalise(y)
        inner = torch.einsum("oi,bil->bol", weight_of(p, f"{name}.ff1_net"), y)
        inner = (inner + p[f"{name}.ff1_net.bias"][None, :, None]).clamp(min=0)
        out = torch.einsum("oi,bil->bol", weight_of(p, f"{name}.ff2_net"), inner)
        out = out + p[f"{name}.ff2_net.bias"][None, :, None] + y
        return out if self.pre_lnorm else normalise(out)

    # --- The model ------------------------------------------------------------------------

    def forward(self, data: Tensor, target: Tensor, mems: list[Tensor], applications: int):
        """Loss (tgt_len, B) and the next memory, with f applied so many times from zero."""
        u = self.inject(data)
        batch, _, length = u.shape
        if mems:
            z0, u0 = (m.detach().permute(1, 2, 0) for m in mems)
        else:
            z0, u0 = u.new_zeros(batch, self.d, 0), u.new_zeros(batch, 3 * self.d, 0)
        us = torch.cat([u0, u], dim=2)
        z = u.new_zeros(batch, self.d, length)
        for _ in range(applications):
            z = self.f(z, us, z0)
        last = z[:, :, length - len(target) :]
        hidden = last.permute(2, 0, 1).reshape(-1, self.d)  # (tgt_len * B, d)
        log_p = self.log_distribution(hidden)
        loss = torch.stack([-row[t] for row, t in zip(log_p, target.flatten(), strict=True)])
        states = torch.cat([z0, z.detach()], dim=2), us.detach()
        mem_len = self.settings["mem_len"] or 0
        kept = [t[:, :, max(t.shape[2] - mem_len, 0) :].permute(2, 0, 1) for t in states]
        return loss.view(target.shape), kept
