"""Runs that repeat bit for bit on a GPU."""

import os

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # environment variable


def deterministic(wanted: bool) -> None:
    """Use kernels that give the same bits every time, at the cost of some speed and memory.

    On the same machine, with the same versions and the same number of processes and threads:

    - On the CPU everything repeats bit for bit, with ``wanted`` True or False.
    - On a GPU with ``wanted`` True everything repeats bit for bit. PyTorch avoids kernels that add
      in random order (atomic additions in the backward pass of indexing and interpolation, some
      cuDNN convolutions), and cuDNN does not select kernels by measured times.
    - On a GPU with ``wanted`` False nothing is guaranteed. Runs with the same seed first agree to
      rounding, and the difference grows.

    Call this function before any GPU computation: cuBLAS reads its setting once. An operation
    without a deterministic kernel raises a RuntimeError that names the operation.
    """
    torch.use_deterministic_algorithms(wanted)
    # With True torch.empty would fill its memory; the solvers write their buffers before reading.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault(CUBLAS, ":4096:8")
