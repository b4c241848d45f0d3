"""Number formats: bfloat16 autocast and TF32."""

from contextlib import nullcontext

import torch

from lib.errors import InputError

AMP = ("none", "bf16")  # what the switches of both trainers accept


def autocast(amp: str, device: torch.device):
    """The context of mixed precision: bfloat16 inside f; solver states stay float32.

    Raises:
        InputError: ``amp`` is not in :data:`AMP`.
    """
    if amp not in AMP:
        raise InputError(f"mixed precision {amp!r}: choose from {', '.join(AMP)}")
    return torch.autocast(device.type, torch.bfloat16) if amp == "bf16" else nullcontext()


def allow_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions on the GPU round their factors to TF32.

    TF32 has the 10 mantissa bits of half precision and the range of float32; products are summed
    in float32. It has no effect on the CPU, nor on GPUs before Ampere.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
