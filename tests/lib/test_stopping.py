"""When a run should stop: signals, their echoes, and the time that is left."""

import os
import signal
import threading

import pytest

from lib.runs import interrupts as stopping
from lib.runs.interrupts import Stopping


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


@pytest.fixture
def outside():
    """The signals that came through to whoever was there before."""
    came = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(n, lambda number, frame: came.append(number)) for n in numbers]
    yield came
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_wish(outside, number, code):
    with Stopping() as found:
        assert not found.wanted
        assert not found.check()
        assert found.reason == ""
        send(number)
        assert found.wanted
        assert found.check()
        assert (found.reason, found.code) == (number.name, code)
    assert outside == []
    send(number)
    assert outside == [number]  # nobody catches it outside of the block


def test_echoes_are_ignored_and_a_later_signal_is_not(outside, clock):
    with Stopping() as found:
        send(signal.SIGTERM)
        clock(4)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert outside == []
        clock(2)
        send(signal.SIGINT)
        assert outside == [signal.SIGINT]
        assert found.reason == "SIGTERM"
        send(signal.SIGTERM)
        assert outside == [signal.SIGINT, signal.SIGTERM]


def test_an_error_inside_puts_the_handlers_back(outside):
    with pytest.raises(ZeroDivisionError), Stopping():
        1 / 0  # noqa: B018
    send(signal.SIGTERM)
    assert outside == [signal.SIGTERM]


def test_in_another_thread_signals_are_left_alone(outside):
    def work():
        with Stopping() as found:
            assert not found.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    send(signal.SIGTERM)
    assert outside == [signal.SIGTERM]


def test_the_time_is_up_before_another_stretch_and_the_saving_would_not_fit(clock):
    found = Stopping(max_minutes=10)
    clock(60)  # getting ready counts, but is no stretch of work
    with found:
        for _ in range(5):
            clock(100)
            # 600 seconds in all; each stretch takes 100, and so may the saving.
            if found.check():
                break
        else:
            pytest.fail("it never stopped")
    assert 600 - (60 + 100 * 4) >= 100
    assert (found.reason, found.code) == ("the time limit", 0)


def test_a_long_stretch_is_remembered(clock):
    with Stopping(max_minutes=10) as found:
        clock(150)  # a validation
        assert not found.check()
        clock(140)
        assert not found.check()  # 310 seconds are left
        clock(20)
        assert found.check()  # 290 are left, less than two such stretches


def test_without_a_limit_time_does_not_matter(clock):
    with Stopping() as found:
        clock(1e9)
        assert not found.check()


def test_a_signal_goes_before_the_time_limit(outside, clock):
    with Stopping(max_minutes=1) as found:
        clock(100)
        assert found.check()
        send(signal.SIGTERM)
        assert (found.reason, found.code) == ("SIGTERM", 143)
