"""What a process makes of the others."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lib.errors import InputError
from lib.runs.processes import (
    TIMEOUT,
    Processes,
    _timeout,
    end_at_once,
    lost_contact,
)
from pretended_machine import pretended_machine

_GLOO = "[/a/b/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # Of torch 2.13, from tests/scale.
        (
            RuntimeError(
                f"{_GLOO}pair.cc:537] Read error [10.77.0.2]:83: Connection reset by peer. This is "
                "typically caused by a remote worker hanging or bugs in the application. Check ..."
            ),
            "Read error [10.77.0.2]:83: Connection reset by peer",
        ),
        (
            RuntimeError(f"{_GLOO}unbound_buffer.cc:78] Timed out waiting 6000ms for recv"),
            "Timed out waiting 6000ms for recv",
        ),
        (dist.DistNetworkError("failed to recv\nException raised from"), "failed to recv"),
        (dist.DistStoreError(""), "DistStoreError"),
        (RuntimeError("shape '[2]' is invalid"), ""),
        (ValueError("gloo"), ""),
    ],
)
def test_lost_contact(error, said):
    assert lost_contact(error) == said


@pytest.mark.parametrize(("text", "minutes"), [(None, 15), ("0.5", 0.5), ("10000", 10_000)])
def test_timeout(monkeypatch, text, minutes):
    monkeypatch.delenv(TIMEOUT, raising=False)
    if text is not None:
        monkeypatch.setenv(TIMEOUT, text)
    assert _timeout() == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e9", "ten"])
def test_bad_timeout(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(InputError, match=f"{TIMEOUT} is '{text}', but must be a number"):
        _timeout()


def test_alone():
    """A single process has no group, leads itself, and is never ended behind its back."""
    with Processes.joined() as processes:
        assert processes == Processes()
        assert processes.lead_keeps(lambda: 3) == 3
        end_at_once(1)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("RANK", "a", "0 to 1"),
        ("RANK", "2", "0 to 1"),
        ("LOCAL_RANK", "-1", "0 to 1"),
        ("WORLD_SIZE", "two", "0 to 999999"),
        ("MASTER_PORT", "http", "0 to 65535"),
    ],
)
def test_a_launcher_that_sets_no_number(monkeypatch, name, value, accepted):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for key, text in (variables | {"MASTER_ADDR": "nowhere", name: value}).items():
        monkeypatch.setenv(key, text)
    words = f"^{name} is '{value}', but must be an integer from {accepted}, as torchrun sets it$"
    with pytest.raises(InputError, match=words), Processes.joined():
        pass


# ---- a GPU for each ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "local", "world", "local_rank"), [(2, "2", 2, 1), (2, "2", 8, 0), (3, None, 2, 1)]
)
def test_a_gpu_for_each_process(monkeypatch, gpus, local, world, local_rank):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    with pretended_machine(gpus):
        torch.cuda.set_device(local_rank)
        found = Processes(local_rank, world, local_rank).gpu()
        assert found == torch.device("cuda", local_rank)


@pytest.mark.parametrize(("local", "local_rank"), [("4", 0), ("4", 3), (None, 3)])
def test_more_processes_than_gpus(monkeypatch, local, local_rank):
    """Also those that would have one refuse: the run could not begin."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    words = "4 processes were started on this machine, but it has 2 GPU.*at most 2"
    with pretended_machine(2), pytest.raises(InputError, match=words):
        Processes(local_rank, 4, local_rank).gpu()


def test_one_process_takes_the_current_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pretended_machine(2):
        torch.cuda.set_device(1)
        assert Processes().gpu() == torch.device("cuda:1")
