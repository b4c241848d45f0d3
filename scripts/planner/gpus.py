"""GPUs: rates of their data sheets, and what was measured on them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.errors import InputError, did_you_mean

RATES = Path(__file__).parents[2] / "docs/data/gpu_rates.json"  # scripts/benchmarks/gpu_rates.py
MEASURED = "h100"  # the GPU of that file
FORMATS = ("f32", "tf32", "bf16")


@dataclass(frozen=True)
class GPU:
    """Peak rates of dense products in FLOP/s by number format, bytes of memory, and bytes/s to the
    other GPUs of a machine in one direction. Formats that the GPU lacks are left out."""

    title: str
    peak: dict[str, float]
    memory: float
    link: float
    source: str


def _gpu(title: str, f32, tf32, bf16, gigabytes: float, link: float, source: str) -> GPU:
    rates = {"f32": f32, "tf32": tf32, "bf16": bf16}
    peak = {kind: 1e12 * rate for kind, rate in rates.items() if rate}
    return GPU(title, peak, 1e9 * gigabytes, 1e9 * link, source)


_SITE = "https://www.nvidia.com/en-us"
# TFLOP/s without sparsity, GB, GB/s.
GPUS = {
    "h100": _gpu("NVIDIA H100 SXM", 67, 494.5, 989, 80, 450, f"{_SITE}/data-center/h100/"),
    "h200": _gpu("NVIDIA H200 SXM", 67, 494.5, 989, 141, 450, f"{_SITE}/data-center/h200/"),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", 19.5, 156, 312, 80, 300, f"{_SITE}/data-center/a100/"),
    "v100": _gpu("NVIDIA V100 SXM2 32 GB", 15.7, 0, 0, 32, 150, f"{_SITE}/data-center/v100/"),
    "l40s": _gpu("NVIDIA L40S", 91.6, 183, 362, 48, 32, f"{_SITE}/data-center/l40s/"),
    "rtx4090": _gpu(
        "NVIDIA GeForce RTX 4090", 82.6, 82.6, 165.2, 24, 32,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/"
        "nvidia-ada-gpu-architecture.pdf",
    ),
}  # fmt: skip


def find_gpu(name: str, number_format: str) -> GPU:
    """The GPU of this name, which has the number format.

    Raises:
        InputError: there is none.
    """
    if name not in GPUS:
        hint = did_you_mean(name.lower(), GPUS, otherwise=f": choose from {', '.join(GPUS)}")
        raise InputError(f"--gpu: no rates of {name!r} are known{hint}")
    gpu = GPUS[name]
    if number_format not in gpu.peak:
        listed = ", ".join(gpu.peak)
        raise InputError(f"--gpu {name} has no {number_format}: it computes in {listed}")
    return gpu


@cache
def measured_rates() -> dict:
    """What scripts/benchmarks/gpu_rates.py wrote."""
    return json.loads(RATES.read_text(encoding="utf-8"))
