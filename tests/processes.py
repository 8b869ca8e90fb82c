"""Runs in processes of their own, which a test starts, and may kill."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def environment(device="cpu"):
    # As many threads as here: with another number, sums on the CPU end in other bits.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return variables if device == "cuda" else variables | {"CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes, program, *arguments):
    """Return the command that runs a module, or a file, in so many processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "tests.rank"]
    return [sys.executable, "-m", *launcher, str(program), *map(str, arguments)]


def run_in(processes, program, *arguments, device="cpu", timeout=240):
    """Run a module, or a file, in so many processes; return what they said."""
    command = torchrun(processes, program, *arguments)
    result = subprocess.run(command, env=environment(device), capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@contextmanager
def started(*arguments, start_new_session=False):
    """Run ``python -m arguments`` in a process of its own, which never outlives the test."""
    command = [sys.executable, "-m", *arguments]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment(), start_new_session=start_new_session, **quiet)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(condition, process):
    """Wait until a condition holds, within a minute, while the process goes on."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when(condition, *arguments):
    """Start ``python -m arguments``, and kill it without a warning once the condition holds, within a minute."""
    with started(*arguments) as process:
        wait_until(condition, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
