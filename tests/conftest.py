"""What tests of several rooms share."""

import pytest

from deq_sequence.demo_corpus import build_demo_corpus


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The embedded corpus, built once (some seconds). Do not write to it: copy it."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    build_demo_corpus(folder)
    return folder
