"""Adaptive word embeddings and sinusoidal position embeddings."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from lib.errors import InputError


def cluster_bounds(n_token: int, cutoffs: list[int]) -> list[tuple[int, int]]:
    """Half-open id ranges of the vocabulary's clusters: [0, c_1), [c_1, c_2), ..., [c_n, n_token).

    Raises:
        InputError: the cutoffs are not increasing, or not inside the vocabulary.
    """
    edges = [0, *cutoffs, n_token]
    if any(low >= high for low, high in pairwise(edges)):
        raise InputError(
            f"cutoffs {list(cutoffs)} do not split a vocabulary of {n_token} words: they must "
            f"rise and lie strictly between 0 and {n_token}"
        )
    return list(pairwise(edges))


def cluster_widths(d_embed: int, div_val: int, n_clusters: int) -> list[int]:
    """Embedding width of each cluster i: d_embed // div_val^i.

    Raises:
        InputError: ``div_val`` is below 1, or so large that the last width is 0.
    """
    widths = [d_embed // max(div_val, 1) ** i for i in range(n_clusters)]
    if div_val < 1 or widths[-1] < 1:
        raise InputError(
            f"div_val {div_val} leaves no width for the last of {n_clusters} clusters of a "
            f"d_embed of {d_embed}: lower --div_val or give fewer cutoffs"
        )
    return widths


def cluster_of(ids: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The cluster index of each id, with the shape of ``ids``."""
    return sum(((ids >= low).long() for low, _ in bounds[1:]), torch.zeros_like(ids))


def rows_by_cluster(cluster: Tensor, n_clusters: int) -> list[Tensor]:
    """For each i below n_clusters, the indices at which ``cluster`` (N,) is i, increasing.

    All lengths are read from the device together: a GPU synchronises once, not once per cluster.
    """
    counts = torch.stack([(cluster == i).sum() for i in range(n_clusters)]).tolist()
    return list(cluster.argsort(stable=True).split(counts))


class AdaptiveEmbedding(nn.Module):
    """Adaptive input embedding (Baevski and Auli 2018, arXiv 1809.10853), times sqrt(d_proj).

    With ``div_val`` 1 there is one table of width ``d_embed``, with a projection only if
    ``d_embed`` differs from ``d_proj``. With a larger ``div_val`` cluster i has its own table of
    width d_embed // div_val^i and its own projection.

    ``d_proj`` is the width of the output; the other arguments are those of
    :class:`deq_sequence.DEQTransformerLM`.
    """

    def __init__(
        self, n_token: int, d_embed: int, d_proj: int, cutoffs: list[int], div_val: int = 1
    ):
        super().__init__()
        self.n_token, self.d_embed, self.d_proj = n_token, d_embed, d_proj
        self.div_val = div_val
        bounds = cluster_bounds(n_token, cutoffs)
        widths = cluster_widths(d_embed, div_val, len(bounds))
        self.bounds = bounds if div_val > 1 else [(0, n_token)]
        self.emb_layers = nn.ModuleList(
            nn.Embedding(high - low, width)
            for (low, high), width in zip(self.bounds, widths, strict=False)
        )
        self.emb_projs = nn.ModuleList()
        if div_val > 1 or d_embed != d_proj:
            self.emb_projs.extend(
                nn.Linear(layer.embedding_dim, d_proj, bias=False) for layer in self.emb_layers
            )

    def forward(self, ids: Tensor) -> Tensor:
        """ids of any shape -> embeddings (*ids.shape, d_proj)."""
        check_ids(ids, self.n_token)
        if len(self.bounds) == 1:
            out = self.emb_layers[0](ids)
            out = self.emb_projs[0](out) if self.emb_projs else out
        else:
            flat = ids.reshape(-1)
            out = self.emb_layers[0].weight.new_zeros(len(flat), self.d_proj)
            rows_of = rows_by_cluster(cluster_of(flat, self.bounds), len(self.bounds))
            for i, ((low, _), rows) in enumerate(zip(self.bounds, rows_of, strict=True)):
                part = self.emb_projs[i](self.emb_layers[i](flat[rows] - low))
                out = out.index_copy(0, rows, part.to(out.dtype))
            out = out.view(*ids.shape, self.d_proj)
        return out * self.d_proj**0.5


class PositionalEmbedding(nn.Module):
    """Sinusoids of the distances K-1, ..., 0: features [sin(p w); cos(p w)], w_k = 10000^(-2k/d).

    All sines come before all cosines, as in Transformer-XL (arXiv 1901.02860).
    """

    def __init__(self, d_model: int):
        super().__init__()
        if d_model % 2:
            raise InputError(f"d_model is {d_model}, but sinusoidal positions need an even number")
        # A persistent buffer, because the published state dicts contain it.
        self.register_buffer("inv_freq", 10000 ** (-torch.arange(0.0, d_model, 2.0) / d_model))

    def forward(self, length: int) -> Tensor:
        """Features (1, length, d_model); row t is for distance length - 1 - t."""
        positions = torch.arange(
            length - 1, -1, -1, device=self.inv_freq.device, dtype=self.inv_freq.dtype
        )
        angles = positions[:, None] * self.inv_freq  # (K, d/2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)[None]


def check_ids(ids: Tensor, n_token: int) -> None:
    """Refuse ids outside the vocabulary, on the CPU. On a GPU this would wait, and CUDA asserts."""
    if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < n_token:
        raise InputError(
            f"token ids run from {ids.min()} to {ids.max()}, but the vocabulary has {n_token} words"
        )
