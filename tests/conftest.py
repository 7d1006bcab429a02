"""Shared by all tests: one thread, the same hypothesis examples every time, little garbage
collection."""

import gc
import os

gc.disable()  # what imports make stays: nothing to collect before the first test
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws of the global generator does not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_collection_finish():
    """Each trace of a network would walk all objects of all imports, for longer than it traces."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    gc.enable()
