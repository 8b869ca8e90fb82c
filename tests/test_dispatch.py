"""Which implementation runs, and how a kernel is launched: on GPUs that stand-ins pretend to be."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from packaging.version import Version

from npp_kernels import _dispatch


def on_gpu(index=0, dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=SimpleNamespace(type="cuda", index=index))


ON_CPU = torch.zeros(1)


@pytest.fixture
def capability(monkeypatch):
    """Return a function that sets the compute capability of every GPU."""
    monkeypatch.setattr(_dispatch, "TRITON_OVERLAPS", True)

    def set_capability(*value):
        monkeypatch.setattr(_dispatch, "_cuda_capability", lambda index: value)

    return set_capability


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 9, 1000, 1024, 1025, 2**31 + 1])
def test_sizes(size):
    power = _dispatch.next_power_of_2(size)
    assert power >= size > power // 2
    assert bin(power).count("1") == 1
    for step in (1, 2, 7, 1024):
        steps = _dispatch.cdiv(size, step)
        assert isinstance(steps, int)
        assert (steps - 1) * step < size <= steps * step


def test_float64_and_the_cpu_take_the_pytorch_path(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    assert _dispatch.runs_kernels(on_gpu())
    assert not _dispatch.runs_kernels(on_gpu(dtype=torch.float64))
    assert not _dispatch.runs_kernels(ON_CPU)
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    assert _dispatch.runs_kernels(ON_CPU)
    assert not _dispatch.runs_kernels(ON_CPU.double())


@pytest.mark.parametrize(
    ("value", "hopper", "overlaps"),
    [
        ((8, 0), False, False),
        ((8, 9), False, False),
        ((9, 0), True, True),
        ((10, 0), False, True),
        ((0, 0), False, False),
    ],
)
def test_what_depends_on_the_gpu(capability, monkeypatch, value, hopper, overlaps):
    capability(*value)
    assert _dispatch.is_hopper(on_gpu()) is hopper
    assert _dispatch.can_overlap(on_gpu()) is overlaps
    assert not _dispatch.is_hopper(ON_CPU)
    assert not _dispatch.can_overlap(ON_CPU)
    monkeypatch.setattr(_dispatch, "TRITON_OVERLAPS", False)
    assert not _dispatch.can_overlap(on_gpu())


def test_traced_code_orders_kernels_itself(capability, monkeypatch):
    capability(9, 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not _dispatch.can_overlap(on_gpu())


def test_triton_can_overlap_from_3_5_on():
    assert _dispatch.TRITON_OVERLAPS is (Version(triton.__version__).release[:2] >= (3, 5))


def test_multiprocessors_are_those_of_the_tensors_gpu(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=100 + index)
    )
    _dispatch._read_multiprocessors.cache_clear()
    try:
        assert [_dispatch.num_multiprocessors(on_gpu(index)) for index in (0, 3, 3)] == [100, 103, 103]
        assert _dispatch.num_multiprocessors(ON_CPU) == 1
    finally:
        _dispatch._read_multiprocessors.cache_clear()


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_rocm_has_no_capability_of_nvidias(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    _dispatch._read_capability.cache_clear()
    try:
        assert _dispatch._read_capability(2) == ((9, 2) if cuda else (0, 0))
    finally:
        _dispatch._read_capability.cache_clear()


class Launches(list):
    """A kernel that notes how it is launched."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.append((grid, arguments, options, tuple(self.entered)))

    entered = ()


@pytest.fixture
def launches(monkeypatch, capability):
    kernel, entered = Launches(), []
    kernel.entered = entered

    @contextmanager
    def device(of):
        entered.append(of.index)
        yield
        entered.pop()

    capability(9, 0)
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return kernel


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_kernel_runs_on_the_gpu_of_its_first_argument(launches, index):
    tensor = on_gpu(index)
    _dispatch.launch(launches, (3, 2), tensor, 7, BLOCK=4)
    assert list(launches) == [((3, 2), (tensor, 7), {"BLOCK": 4}, () if index == 1 else (index,))]


@pytest.mark.parametrize(
    ("value", "early", "expected"),
    [
        ((9, 0), True, {"OVERLAP": True, "launch_pdl": True}),
        ((9, 0), False, {"OVERLAP": False}),
        ((9, 0), None, {}),
        ((8, 0), True, {"OVERLAP": False}),
    ],
)
def test_a_kernel_is_launched_early_where_it_waits(launches, capability, value, early, expected):
    capability(*value)
    _dispatch.launch(launches, (1,), on_gpu(1), early=early)
    assert [options for _, _, options, _ in launches] == [expected]


def test_a_limit_of_registers_is_for_nvidia_alone(launches, monkeypatch):
    _dispatch.launch(launches, (1,), on_gpu(1), max_registers=64)
    monkeypatch.setattr(torch.version, "cuda", None)
    _dispatch.launch(launches, (1,), on_gpu(1), max_registers=64)
    assert [options for _, _, options, _ in launches] == [{"maxnreg": 64}, {}]
