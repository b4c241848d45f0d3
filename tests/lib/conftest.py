"""What the tests of lib share."""

import pytest

from toy_layers import Fragile


@pytest.fixture
def fragile(monkeypatch):
    """Switch between what the layer ``Fragile`` does."""

    def switch(mode):
        monkeypatch.setattr(Fragile, "mode", mode)

    switch("fine")
    return switch
