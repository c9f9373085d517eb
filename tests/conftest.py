"""Chooses the device once for the whole suite: the GPU where there is one, else Triton's interpreter.

Tests that take the `device` get the marker of that name: `pytest tests -m device` runs what a GPU can say something
about.
"""

import os

import torch

# "0" on a GPU, so that no test of a run on the CPU can turn the interpreter on for those that come after it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, see the `poisoned` fixture
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest

from gptlib import backends
from gptlib.errors import UserError

KEPT_BYTES = 2**30  # of a GPU's memory, by one of several test processes


def pytest_addoption(parser):
    parser.addoption("--attn", help="an attention, such as my.kernel:attend, to run tests/test_your_kernel.py on alone")
    parser.addoption(
        "--hopper", action="store_true", help="run tests/test_hopper_on_gpu.py, where a fault may be a hang"
    )


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
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--attn") and collection_path.is_file():
        return collection_path.name != "test_your_kernel.py" or None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        needs_gpu = item.get_closest_marker("gpu")  # not item.keywords, which hold the names of folders too
        if needs_gpu or "device" in item.fixturenames:
            item.add_marker("device")
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(skip)


# ---- a GPU that a kernel has crashed ---------------------------------------------------------------------------------

_crashed = False


@pytest.hookimpl(trylast=True)  # after the report was sent
def pytest_runtest_logreport(report):
    """After an illegal access a process can use the GPU no more. A worker of pytest-xdist ends itself then, so that
    another takes over, instead of failing all tests that are left to it."""
    global _crashed
    if report.failed and torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _crashed = True
    if _crashed and report.when == "teardown":
        os._exit(1)
