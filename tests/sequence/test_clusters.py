"""Which words belong to which cluster of the vocabulary."""

import pytest
import torch

from deq_sequence.embedding import cluster_bounds, cluster_of, rows_by_cluster


@pytest.mark.parametrize("cutoffs", [[], [4], [4, 9, 12]])
@pytest.mark.parametrize("n", [0, 1, 200])
def test_rows_of_each_cluster_in_rising_order(cutoffs, n):
    bounds = cluster_bounds(17, cutoffs)
    ids = torch.randint(17, (n,), generator=torch.Generator().manual_seed(0))
    cluster = cluster_of(ids, bounds)
    rows = rows_by_cluster(cluster, len(bounds))
    assert len(rows) == len(bounds)
    for i, (low, high) in enumerate(bounds):
        expected = ((ids >= low) & (ids < high)).nonzero().squeeze(1)
        assert torch.equal(rows[i], expected)
        assert (cluster[rows[i]] == i).all()
