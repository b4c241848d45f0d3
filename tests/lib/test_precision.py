"""Mixed precision and TF32 switches."""

import pytest
import torch

from lib.errors import InputError
from lib.solvers.precision import allow_tf32, autocast

CPU = torch.device("cpu")


def test_bf16_computes_products_in_bfloat16():
    a = torch.randn(4, 4)
    with autocast("bf16", CPU):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("none", CPU):
        assert (a @ a).dtype == torch.float32


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match=r"fp8.*none, bf16"):
        autocast("fp8", CPU)


def test_tf32_is_switched_for_products_and_convolutions():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed, precision in ((True, "high"), (False, "highest")):
            allow_tf32(allowed)
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
