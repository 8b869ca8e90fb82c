"""What all tests share: devices, seeds, and which tests run where.

The tests of the kernels take the fixture ``device``. They run on the PyTorch path on the CPU; on a GPU, marked ``gpu``;
and, in a process started with ``TRITON_INTERPRET=1``, as interpreted kernels on the CPU (``pytest -m kernels``).
"""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TORCH_2_8 = torch.__version__.startswith("2.8.")  # the oldest that is supported, with faults of its own


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="the seed of each test's random numbers")
    parser.addoption("--seeds", type=int, default=1, help="run each test with so many seeds, from --seed on")
    parser.addoption(
        "--fuzz-examples", type=int, help="cases of each fuzz test, other ones with each --hypothesis-seed"
    )
    parser.addoption("--fuzz-journal", help="append to this file how many cases of each fuzz test ran")


def pytest_configure(config):
    """Set how many cases Hypothesis makes up: few and always the same, or as many as asked for and always others."""
    if importlib.util.find_spec("hypothesis") is None:
        return  # tests/test_fuzz.py is skipped, visibly
    from hypothesis import HealthCheck, Phase, settings

    examples = config.getoption("fuzz_examples")
    settings.register_profile(
        "fuzz",
        max_examples=examples or (12 if INTERPRETED else 120),
        derandomize=examples is None,
        # A case is small as it is, and making it smaller takes minutes.
        phases=[Phase.generate] if examples else [Phase.generate, Phase.shrink],
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),  # of time and of fixtures; `device` is one for all cases of a test
    )
    settings.load_profile("fuzz")


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


@pytest.fixture
def kernel_device(device):
    """A device where operations are kernels: a GPU, or the CPU in the interpreter."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("without the interpreter the CPU has no kernels")
    return device


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(getattr(request, "param", request.config.getoption("seed")))
