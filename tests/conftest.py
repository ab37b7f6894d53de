"""Shared settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

# No test needs a model hub or may report usage; servers that tests start inherit this.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Kernels are chosen by what is in the source, not by a table that somebody measured here.
os.environ.setdefault("VLLM_FLUTE_TABLE", "off")

# Workers of pytest-xdist share the cores, and OpenMP's threads wait for each other by spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# First calls compile and load: a deadline for one example would measure that. In CI the examples are the same ones
# every time, so that a failure belongs to the change.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture
def one_thread():
    """Tiny layers on one thread, so that a busy machine does not wait at barriers; a test that wants more sets them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text to calibrate with, of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away. " * 300)
    return path
