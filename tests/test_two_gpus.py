"""Two GPUs over NCCL: what `test_data_parallel` asks of gloo, with the step in a graph."""

import signal

import pytest
import torch

from reference.training.checkpoint import load_latest
from tests.processes import run_in
from tests.test_data_parallel import (
    arguments_of,
    assert_close,
    assert_others_stop,
    assert_resumed,
    assert_same,
    half_of,
    results_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

WAYS = [
    "sharded", "replicated", "bf16 sharded", "bf16 replicated", "bf16 without a graph", "bf16 compiled",
    "bf16 fp32 gradients", "bf16 sharded parts", "bf16 replicated parts", "fsdp",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("two"), 2, WAYS, device="cuda")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    ways = ["sharded", "bf16 sharded", "bf16 sharded parts", "fsdp"]
    return results_of(tmp_path_factory.mktemp("one"), 1, ways, device="cuda")


# In fp32 products are TF32, of halves of the batch; in bf16 each half's gradient is rounded.
@pytest.mark.parametrize(
    ("way", "other", "gradients", "losses"),
    [
        ("sharded", "sharded", 5e-3, 1e-3),
        ("replicated", "sharded", 5e-3, 1e-3),
        ("fsdp", "sharded", 5e-3, 1e-3),
        ("bf16 sharded", "bf16 sharded", 3e-2, 1e-2),
        ("bf16 compiled", "bf16 sharded", 3e-2, 1e-2),
        ("bf16 fp32 gradients", "bf16 sharded", 3e-2, 1e-2),
        ("bf16 sharded parts", "bf16 sharded parts", 3e-2, 1e-2),
    ],
)
def test_two_gpus_train_like_one(two, one, way, other, gradients, losses):
    assert_close(two[way][0], one[other][0], gradients=gradients, losses=losses)


def test_steps_were_captured(two):
    """The graph of the last stage is there; that of the stage before it was released."""
    assert {way: results[0]["captured"] for way, results in two.items()} == {
        way: 0 if way in ("fsdp", "bf16 without a graph") else 1 for way in WAYS
    }


def test_fsdp_in_one_process_has_no_graph_either(one):
    assert one["fsdp"][0]["captured"] == 0
    assert_close(one["fsdp"][0], one["sharded"][0], gradients=5e-3, losses=1e-3)


@pytest.mark.parametrize(
    "pair",
    [
        ("bf16 sharded", "bf16 without a graph"),
        ("sharded", "replicated"),  # two numbers have one sum, in whatever order NCCL adds them
        ("bf16 sharded", "bf16 replicated"),
        ("bf16 sharded parts", "bf16 replicated parts"),
    ],
)
def test_the_same_bit_for_bit(two, pair):
    assert_same(*(two[way][0] for way in pair))


def test_the_same_again_is_the_same(two, tmp_path):
    again = results_of(tmp_path, 2, ["bf16 sharded", "bf16 compiled"], device="cuda")
    for way, results in again.items():
        assert_same(results[0], two[way][0])


def test_both_gpus_have_the_same_weights(two):
    for way, (first, second) in two.items():
        for name, weight in first["weights"].items():
            assert torch.equal(second["weights"][name], weight), f"{way}: {name}"


def on_gpus(folder, *others):
    return arguments_of(folder, "--compile", "off", *others)


def test_a_run_goes_on_in_any_number_of_processes(tmp_path):
    whole = tmp_path / "whole"
    run_in(2, "reference.train", *on_gpus(whole), device="cuda")
    for processes in (2, 1):
        folder = half_of(whole, tmp_path / str(processes))
        run_in(processes, "reference.train", *on_gpus(folder), device="cuda")
        assert_resumed(folder, whole, exactly=processes == 2, rtol=2e-2)


# Killed, its memory is gone from under the other's kernels; stopped, they wait for it for ever.
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_is_lost_the_other_says_so_within_a_minute(tmp_path, number):
    arguments = on_gpus(tmp_path, "--epochs", "20")
    said = assert_others_stop(tmp_path, 1, number, *arguments, device="cuda")
    assert "stopped: process 1 has given no sign of life for 20 s" in said
    saved = load_latest(tmp_path)["step"]
    assert 8 <= saved < 1600
    result = run_in(2, "reference.train", *arguments, device="cuda")
    assert f"training from step {saved} of 1600 steps" in result.stdout
