"""What all tests share: devices, seeds, and which tests run where.

The tests of the kernels take the fixture ``device``. They run on the PyTorch path on the CPU; on a GPU, marked ``gpu``;
and, in a process started with ``TRITON_INTERPRET=1``, as interpreted kernels on the CPU (``pytest -m kernels``).
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="the seed of each test's random numbers")
    parser.addoption("--seeds", type=int, default=1, help="run each test with so many seeds, from --seed on")


def pytest_generate_tests(metafunc):
    seeds = metafunc.config.getoption("seeds")
    if seeds > 1:
        first = metafunc.config.getoption("seed")
        metafunc.parametrize("_seed", range(first, first + seeds), indirect=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("gpu") and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="the interpreter runs on the CPU"))
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("kernels")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(getattr(request, "param", request.config.getoption("seed")))
