"""Losses and means over a vocabulary that a process group shares out, against one process that has the whole.

The cases are in `vocabulary_ranks`, each run by every rank. A group is started once, for all of its cases; here each
case is a test that asks what became of it.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import npp_kernels
from tests.conftest import INTERPRETED
from tests.processes import ROOT, environment
from tests.vocabulary_ranks import CASES

MINUTES = 10
WORLDS = [2] if INTERPRETED else [2, 4]
# Errors, but for what torch.compile does itself, and what NumPy sees in elements that the interpreter masks off.
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning", *["-W", "ignore::RuntimeWarning"] * INTERPRETED]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """Return a function: what each rank of a group says of all cases, by the number of ranks and their devices."""
    known = {}

    def find(world, device):
        if (world, device) not in known:
            folder = tmp_path_factory.mktemp(f"{device}{world}")
            known[world, device] = run_ranks(world, device, folder, request.config.getoption("seed"))
        return known[world, device]

    return find


def run_ranks(world, device, folder, seed):
    variables = environment()
    if device == "cuda":
        variables.pop("CUDA_VISIBLE_DEVICES")
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            variables["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    processes = []
    try:
        for rank in range(world):
            warnings = [] if device == "cuda" else WARNINGS
            command = [sys.executable, *warnings, "-m", "tests.rank", "tests.vocabulary_ranks"]
            with (folder / f"{rank}.log").open("w") as log:
                arguments = [*command, str(rank), str(world), str(folder), str(seed), device]
                processes.append(subprocess.Popen(arguments, env=variables, cwd=ROOT, stdout=log, stderr=log))
        for process in processes:
            process.wait(timeout=60 * MINUTES)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(world)]
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def check(ranks, case):
    for rank, outcome in enumerate(ranks):
        assert case in outcome, f"rank {rank} never came to it"
        assert outcome[case] is None, f"rank {rank}:\n{outcome[case]}"


@pytest.mark.kernels
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_over_gloo(outcomes, world, case):
    check(outcomes(world, "cpu"), case)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", CASES)
def test_over_nccl(outcomes, case):
    check(outcomes(2, "cuda"), case)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="group: expected a process group, got none"):
        npp_kernels.VocabularyShard.of(8)
