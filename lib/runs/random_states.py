"""The states of all random generators of a process, for a checkpoint."""

import random
from collections.abc import Sequence

import torch

from lib.errors import InputError
from lib.runs.forms import check_form


def random_states(rng: random.Random, gpus: Sequence[int]) -> dict:
    """The states of all generators that a step uses: ``rng``, PyTorch's, and those of ``gpus``."""
    return {
        "random": rng.getstate(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": [torch.cuda.get_rng_state(gpu) for gpu in gpus],
    }


def check_random_states(states) -> None:
    """Refuse anything else than a list of what :func:`random_states` returns.

    The states are set in other generators, which refuse impossible ones.
    """
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
        try:
            random.Random().setstate(state["random"])
            torch.Generator().set_state(state["torch_random"])
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits or max(words) >= 2**32:
            raise InputError(f"{name} is no state of random generators: use another checkpoint")


def restore_random_states(state: dict, rng: random.Random, gpus: Sequence[int]) -> list[str]:
    """Restore what :func:`random_states` returned, for the GPUs that exist both then and now.

    Returns:
        One log line if the number of GPUs differs, else none.
    """
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
