"""Transfers from the host to a device."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, like: Tensor | torch.device) -> Tensor:
    """Copy an array to a device, or to the device and dtype of a tensor.

    The host does not wait for a GPU: before the call returns, CUDA copies the data out of pageable
    memory. On the CPU the tensor is a view of the array if the dtype is the same.
    """
    return torch.from_numpy(array).to(like, non_blocking=True)
