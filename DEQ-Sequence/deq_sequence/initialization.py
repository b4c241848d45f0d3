"""Initialisation of the DEQ-Transformer's parameters."""

import torch
from torch import nn

from deq_sequence.embedding import AdaptiveEmbedding
from deq_sequence.layer import RelativeAttention
from deq_sequence.softmax import ProjectedAdaptiveLogSoftmax
from deq_sequence.ties import TiedWeights
from lib.errors import check


@torch.no_grad()
def initialize(
    model: nn.Module,
    *,
    init: str = "normal",
    init_std: float = 0.01,
    init_range: float = 0.05,
    emb_init: str = "normal",
    emb_init_range: float = 0.01,
    proj_init_std: float = 0.01,
) -> None:
    """Draw all weights of a model.

    - Weights: N(0, init_std), or U(-init_range, init_range) with ``init='uniform'``.
    - Embedding tables, and output tables tied to them: N(0, init_std), or
      U(-emb_init_range, emb_init_range) with ``emb_init='uniform'``.
    - Projections: N(0, proj_init_std). Tied projections start equal in every tie mode.
    - Biases: zero.

    The second parameter of N is the standard deviation. Weight-normalised matrices keep PyTorch's
    default initialisation: the first public code tried to initialise them but wrote to a temporary
    tensor, and the published results were obtained this way. A weight of norm 0.01 sqrt(d) would
    give another model.

    Raises:
        InputError: ``init`` or ``emb_init`` is unknown.
    """
    fill = _filler("init", init, init_std, init_range)
    fill_embedding = _filler("emb_init", emb_init, init_std, emb_init_range)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            if "weight" in module._parameters:  # absent if the module is weight-normalised
                fill(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, RelativeAttention):
            fill(module.r_w_bias)
            fill(module.r_r_bias)
        elif isinstance(module, ProjectedAdaptiveLogSoftmax) and module.n_clusters:
            fill(module.cluster_weight)
            module.cluster_bias.zero_()
    # After the loop above, because tied tables belong to Linear layers that it has filled.
    for module in model.modules():
        if isinstance(module, AdaptiveEmbedding):
            for table in module.emb_layers:
                fill_embedding(table.weight)
        if isinstance(module, (AdaptiveEmbedding, ProjectedAdaptiveLogSoftmax)):
            projections = getattr(module, "emb_projs", None) or getattr(module, "out_projs", ())
            for projection in projections:
                nn.init.normal_(projection.weight, 0.0, proj_init_std)
    for module in model.modules():
        if isinstance(module, TiedWeights):
            module.start_equal()


def _filler(name: str, kind: str, std: float, limit: float):
    fillers = {
        "normal": lambda weight: nn.init.normal_(weight, 0.0, std),
        "uniform": lambda weight: nn.init.uniform_(weight, -limit, limit),
    }
    check(kind in fillers, name, kind, f"one of {', '.join(fillers)}")
    return fillers[kind]
