"""Chooses the device once for the whole suite: the GPU where there is one, else Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, see the `poisoned` fixture
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest

from gptlib import backends
from gptlib.errors import UserError


def pytest_addoption(parser):
    parser.addoption("--attn", help="an attention, such as my.kernel:attend, to run tests/test_your_kernel.py on alone")


def pytest_configure(config):
    if config.getoption("--attn"):
        try:
            backends.attention(config.getoption("--attn"))
        except UserError as e:
            raise pytest.UsageError(str(e)) from None


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned():
    """Every torch.empty comes back full of NaN, so that an element no kernel wrote fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--attn") and collection_path.is_file():
        return collection_path.name != "test_your_kernel.py" or None


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
