"""A model's parameters and operations as a table, through torchinfo."""

import torch
from torchinfo import summary
from yacs.config import CfgNode

from mdeq_vision.model import MDEQNet


def model_summary(cfg: CfgNode, model: MDEQNet, size: tuple[int, int]) -> str:
    """Parts of the model with their parameters and multiply-adds, f being applied once.

    It is taken of a copy on the meta device: no memory, no arithmetic, no random numbers.

    Args:
        cfg: the configuration of ``model``.
        model: any MDEQ; only its class is used.
        size: (height, width) of the image.
    """
    with torch.device("meta"):
        copy = type(model)(cfg).eval()
        copy.n_layer, copy.pretrain_steps = 1, 1
        image = torch.zeros(1, 3, *size)
    table = summary(
        copy,
        input_data=image,
        train_step=0,
        compute_jac_loss=False,
        depth=1,
        device="meta",
        col_names=("output_size", "num_params", "mult_adds"),
        row_settings=("var_names",),
        verbose=0,
    )
    return str(table)
