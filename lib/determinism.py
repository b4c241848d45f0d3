"""Runs that repeat bit for bit on a GPU."""

import os

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # environment variable


def deterministic(wanted: bool) -> None:
    """Choose kernels that give the same bits every time, at the cost of some speed and memory.

    What repeats bit for bit, on the same machine, versions and number of processes and threads:

    - on the CPU everything, whether or not this is switched on;
    - on a GPU with this switched on: kernels that add in an order of chance (atomic additions in
      the backward of indexing and interpolation, some of cuDNN's convolutions) are left out, and
      cuDNN does not choose by measured times;
    - on a GPU without it, nothing: runs with the same seed agree to rounding, which grows.

    Call it before anything is computed on a GPU: cuBLAS reads its setting once. An operation that
    has no such kernel raises a RuntimeError that names it.
    """
    torch.use_deterministic_algorithms(wanted)
    # Else torch.empty would fill what it gives, and solvers' buffers are written before they are
    # read.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault(CUBLAS, ":4096:8")
