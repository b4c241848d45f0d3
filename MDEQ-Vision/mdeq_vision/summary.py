"""A model's parameters (counted by torchinfo) and operations (counted by PyTorch)."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchinfo import summary
from yacs.config import CfgNode

from mdeq_vision.model import MDEQNet


def model_summary(cfg: CfgNode, model: MDEQNet, size: tuple[int, int]) -> str:
    """List the parts of the model with their parameters; count multiply-adds of f and of the rest.

    Multiply-adds count convolutions and matrix products, for one image and one application of f.
    The counts come from a copy on the meta device: no memory, no arithmetic, no random numbers.
    ``size`` is (height, width) of the image.
    """
    with torch.device("meta"):
        copy = type(model)(cfg).eval()
        copy.n_layer, copy.pretrain_steps = 1, 1
        image = torch.zeros(1, 3, *size)
    options = {"train_step": 0, "compute_jac_loss": False}
    table = summary(
        copy,
        input_data=image,
        depth=1,
        device="meta",
        col_names=("output_size", "num_params"),
        row_settings=("var_names",),
        verbose=0,
        **options,
    )
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy(image, **options)
    counts = {name: sum(c.values()) // 2 for name, c in counter.get_flop_counts().items()}
    layer = counts.get(f"{type(copy).__name__}.fullstage", 0)
    # Cut off torchinfo's totals below: they miss operations outside of module calls.
    lines = str(table).splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("Non-trainable params"))
    return "\n".join(lines[: end + 1]) + (
        f"\nMultiply-adds of one image: f {layer:,} per application, "
        f"stem and head {counts['Global'] - layer:,}"
    )
