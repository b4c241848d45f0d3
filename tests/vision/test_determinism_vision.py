"""CUDNN.DETERMINISTIC switches all kernels, not cuDNN's alone."""

import pytest
import torch

from lib.runs.determinism import CUBLAS, deterministic
from lib.runs.processes import Processes
from mdeq_vision.command import _devices
from mdeq_vision.config import config


@pytest.mark.parametrize("wanted", [False, True])
def test_switch(monkeypatch, wanted):
    monkeypatch.setenv(CUBLAS, ":4096:8")
    cfg = config.clone()
    cfg.defrost()
    cfg.CUDNN.DETERMINISTIC = wanted
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    try:
        _devices(cfg, Processes())
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert cudnn.deterministic == wanted
        assert cudnn.benchmark == (not wanted)  # BENCHMARK is True
    finally:
        deterministic(False)
        cudnn.benchmark = before
