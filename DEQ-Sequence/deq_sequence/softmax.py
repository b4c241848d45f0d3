"""Projected adaptive softmax (Grave et al. 2016, arXiv 1609.04309; Dai et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deq_sequence.embedding import (
    check_ids,
    cluster_bounds,
    cluster_of,
    cluster_widths,
    rows_by_cluster,
)
from deq_sequence.linear import autocast_dtype, linear
from lib.errors import InputError


class ProjectedAdaptiveLogSoftmax(nn.Module):
    """Negative log-likelihoods of a softmax over clusters of words, from frequent to rare.

    The head has one entry for every word of cluster 0 and one entry for every further cluster.
    The entry of cluster i has index -i. A word of cluster i > 0 has

        log p(word) = head[-i] + log_softmax(cluster i)[word]

    The hidden state is projected by the transpose of projection 0 for the head and by the
    transpose of projection i for cluster i. With ``div_val`` 1 all clusters share one table, and
    there are projections only if ``d_embed`` differs from ``d_proj``.

    Args:
        n_token, d_embed, d_proj, cutoffs, div_val: as for
            :class:`deq_sequence.embedding.AdaptiveEmbedding`.
    """

    def __init__(
        self, n_token: int, d_embed: int, d_proj: int, cutoffs: list[int], div_val: int = 1
    ):
        super().__init__()
        self.n_token, self.d_embed, self.d_proj, self.div_val = n_token, d_embed, d_proj, div_val
        self.bounds = cluster_bounds(n_token, cutoffs)
        self.n_clusters = len(self.bounds) - 1  # without cluster 0, which is in the head
        widths = cluster_widths(d_embed, div_val, len(self.bounds))
        if self.n_clusters:
            self.cluster_weight = nn.Parameter(torch.zeros(self.n_clusters, d_embed))
            self.cluster_bias = nn.Parameter(torch.zeros(self.n_clusters))
        if div_val == 1:
            self.out_layers = nn.ModuleList([nn.Linear(d_embed, n_token)])
        else:
            self.out_layers = nn.ModuleList(
                nn.Linear(width, high - low)
                for (low, high), width in zip(self.bounds, widths, strict=True)
            )
        self.out_projs = nn.ModuleList()
        if div_val > 1 or d_embed != d_proj:
            self.out_projs.extend(nn.Linear(width, d_proj, bias=False) for width in widths)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """-log p(target) in nats: hidden (N, d_proj), word ids (N,) -> (N,)."""
        if len(hidden) != len(target):
            raise InputError(f"{len(hidden)} hidden states for {len(target)} targets")
        check_ids(target, self.n_token)
        if not self.n_clusters:
            return F.cross_entropy(_single(self._head_logits(hidden)), target, reduction="none")
        cluster = cluster_of(target, self.bounds)
        entry = self._entry(cluster)  # not used for words of cluster 0
        head_target = torch.where(cluster > 0, entry, target)
        nll = F.cross_entropy(_single(self._head_logits(hidden)), head_target, reduction="none")
        for i, rows in enumerate(rows_by_cluster(cluster, len(self.bounds))):
            if i == 0:
                continue  # complete: words of cluster 0 are in the head
            logits = _single(self._logits(i, hidden[rows]))
            tail = F.cross_entropy(logits, target[rows] - self.bounds[i][0], reduction="none")
            nll = nll.index_add(0, rows, tail.to(nll.dtype))
        return nll

    def log_prob(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of all words, (N, d_proj) -> (N, n_token)."""
        head = F.log_softmax(self._head_logits(hidden), dim=1)
        parts = [head[:, : self.bounds[0][1]]]
        for i in range(1, self.n_clusters + 1):
            entry = head[:, self._entry(i), None]
            parts.append(entry + F.log_softmax(self._logits(i, hidden), dim=1))
        return torch.cat(parts, dim=1)

    def _entry(self, cluster: int | Tensor) -> int | Tensor:
        """The head's column for a cluster; cluster 1 has the last column."""
        return self.bounds[0][1] + self.n_clusters - cluster

    def _table(self, i: int) -> tuple[Tensor, Tensor]:
        if self.div_val > 1:
            return self.out_layers[i].weight, self.out_layers[i].bias
        low, high = self.bounds[i]
        return self.out_layers[0].weight[low:high], self.out_layers[0].bias[low:high]

    def _project(self, i: int, hidden: Tensor) -> Tensor:
        return linear(hidden, self.out_projs[i].weight.t()) if self.out_projs else hidden

    def _logits(self, i: int, hidden: Tensor) -> Tensor:
        return linear(self._project(i, hidden), *self._table(i))

    def _head_logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self._table(0)
        if self.n_clusters:
            weight = torch.cat([weight, self.cluster_weight])
            bias = torch.cat([bias, self.cluster_bias])
        return linear(self._project(0, hidden), weight, bias)


def _single(logits: Tensor) -> Tensor:
    """Logits in float32 under autocast, whose loss would cast them too, and hold both."""
    return logits.float() if autocast_dtype(logits) else logits
