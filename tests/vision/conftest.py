"""What the tests of MDEQ-Vision share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads():
    """A run may set the number of threads, which is of the whole process: put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
