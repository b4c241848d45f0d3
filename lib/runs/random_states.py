"""The states of all random generators of a process, for a checkpoint."""

import random
from collections.abc import Sequence

import torch


def random_states(rng: random.Random, gpus: Sequence[int]) -> dict:
    """The states of all generators that a step uses: ``rng``, PyTorch's, and those of ``gpus``."""
    return {
        "random": rng.getstate(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def restore_random_states(state: dict, rng: random.Random, gpus: Sequence[int]) -> list[str]:
    """Restore what :func:`random_states` returned, for the GPUs that exist both then and now.

    Returns:
        One log line if the number of GPUs differs, else none.
    """
    rng.setstate(state["random"])
    torch.set_rng_state(state["torch_random"])
    saved = state["cuda_random"]
    for gpu, gpu_state in zip(gpus, saved, strict=False):
        torch.cuda.set_rng_state(gpu_state, gpu)
    if len(saved) == len(gpus):
        return []
    here, before = (f"{len(found)} GPU(s)" if found else "the CPU" for found in (gpus, saved))
    return [
        f"{here} continue(s) what {before} began, so the run is not bit for bit what it would have "
        "been: some dropout masks come from new streams, and rounding differs"
    ]
