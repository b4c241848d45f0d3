"""Runs that repeat bit for bit: kernels, and the states of all random generators."""

import os
import random
from collections.abc import Sequence

import torch

from lib.errors import InputError
from lib.runs.checkpoint import check_form

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # environment variable


def deterministic(wanted: bool) -> None:
    """Use kernels that give the same bits every time, at the cost of some speed and memory.

    On the same machine, with the same versions and number of processes and threads:

    - On the CPU everything repeats bit for bit, whatever ``wanted`` is.
    - On a GPU everything repeats if ``wanted``: PyTorch avoids kernels that add in random order
      (indexing and interpolation backward, some of cuDNN), and cuDNN does not select kernels by
      measured times. Otherwise runs of one seed first agree to rounding, and the difference grows.

    Call this before any GPU computation: cuBLAS reads its setting once. An operation without a
    deterministic kernel raises a RuntimeError that names it.
    """
    torch.use_deterministic_algorithms(wanted)
    # With True torch.empty would fill its memory; the solvers write their buffers before reading.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault(CUBLAS, ":4096:8")


def random_states(rng: random.Random, gpus: Sequence[int]) -> dict:
    """The states of ``rng``, PyTorch's generator, and those of ``gpus``."""
    return {
        "random": rng.getstate(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def check_random_states(states) -> None:
    """Refuse anything else than a list of what :func:`random_states` returns."""
    if not isinstance(states, list) or not states:
        raise InputError("random_states is no list of states: use another checkpoint")
    own = {
        "random": (0, (0,) * 625, ...),
        "torch_random": torch.get_rng_state(),
        "cuda_random": ...,
    }
    for rank, state in enumerate(states):
        name = f"random_states[{rank}]"
        check_form(state, own, name)
        (_, words, gauss), gpus = state["random"], state["cuda_random"]
        fits = isinstance(gauss, (float, type(None))) and isinstance(gpus, list)
        try:  # other generators refuse impossible states
            random.Random().setstate(state["random"])
            torch.Generator().set_state(state["torch_random"])
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits or max(words) >= 2**32:
            raise InputError(f"{name} is no state of random generators: use another checkpoint")


def restore_random_states(state: dict, rng: random.Random, gpus: Sequence[int]) -> list[str]:
    """Restore :func:`random_states`; return a log line if the number of GPUs differs."""
    rng.setstate(state["random"])
    torch.set_rng_state(state["torch_random"])
    saved = state["cuda_random"]
    for gpu, gpu_state in zip(gpus, saved, strict=False):
        check_form(gpu_state, torch.cuda.get_rng_state(gpu), "cuda_random")
        torch.cuda.set_rng_state(gpu_state, gpu)
    if len(saved) == len(gpus):
        return []
    here, before = (f"{len(found)} GPU(s)" if found else "the CPU" for found in (gpus, saved))
    return [
        f"{here} continue(s) what {before} began, so the run is not bit for bit what it would have "
        "been: some dropout masks come from new streams, and rounding differs"
    ]
