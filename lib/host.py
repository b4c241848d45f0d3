"""From the host to a device."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, like: Tensor | torch.device) -> Tensor:
    """An array on a device, or on that of a tensor and in its dtype.

    The host does not wait for a GPU: CUDA sets aside what it is given from ordinary memory before
    the call returns. On the CPU the tensor is a view of the array, if it has that dtype.
    """
    return torch.from_numpy(array).to(like, non_blocking=True)
