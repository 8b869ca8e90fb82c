"""The GPU suite under NVIDIA's compute-sanitizer, tool by tool, after each has shown that it sees a planted fault.

    python -m tests.sanitizers                                   # memcheck, racecheck, initcheck and synccheck
    python -m tests.sanitizers --tools memcheck -k "not large"   # whatever else stands here goes to pytest

It needs `compute-sanitizer` of the CUDA toolkit on the PATH and a GPU. Under it Triton keeps every argument of a launch
alive, so that the tests of memory and of more than 2³¹ elements are left out; they run by themselves. A fault that a
tool finds ends that tool's run with status 77. The journal says which tools ran, for how long, and what each found.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 77
LEFT_OUT = "not memory and not 2_31 and not compile and not stream and not long"

# What the tool is for, planted. Racecheck sees shared memory alone: a missing wait between two launches is out of its
# reach, and stays with the test of the compiled code (`test_an_overlapping_kernel_waits_before_it_writes`).
FAULTS = {
    "memcheck": "x = torch.zeros(4, device='cuda'); read[(1,)](x, x, 1 << 20)",
    "initcheck": "x = torch.empty(1 << 20, device='cuda'); y = torch.empty_like(x); read[(1,)](x, y, 0)",
}
PLANTED = """
import os
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
import tempfile, importlib.util
source = '''
import triton
import triton.language as tl

@triton.jit
def read(from_ptr, to_ptr, offset):
    tl.store(to_ptr, tl.load(from_ptr + offset) + 1)
'''
with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
    file.write(source)
spec = importlib.util.spec_from_file_location("planted", file.name)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
read = module.read
"""


def sanitized(tool, *arguments):
    """Return the command that runs Python under a tool."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND), "--print-limit", "20"]
    return ["compute-sanitizer", *options, sys.executable, *arguments]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("-k", default=LEFT_OUT, help="which tests, as for pytest")
    parser.add_argument("--journal", type=Path, default=Path("runs/sanitizers.jsonl"))
    parser.add_argument("--print", action="store_true", help="print the commands alone")
    options, others = parser.parse_known_args(arguments)
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    status = 0
    for tool in options.tools:
        suite = sanitized(tool, "-m", "pytest", "-q", "tests", "-m", "gpu", "-k", options.k, *others)
        if options.print:
            print(" ".join(map(repr, suite)))
            continue
        if tool in FAULTS:
            planted = subprocess.run(sanitized(tool, "-c", PLANTED + FAULTS[tool]), capture_output=True, text=True)
            if planted.returncode != FOUND:
                sys.exit(f"{tool} did not see a planted fault:\n{planted.stdout}{planted.stderr}")
        start = time.monotonic()
        done = subprocess.run(suite, capture_output=True, text=True)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*|\d+ passed.*", done.stdout)
        record = {"tool": tool, "status": done.returncode, "seconds": round(time.monotonic() - start), "found": summary}
        with options.journal.open("a") as file:
            print(json.dumps(record), file=file)
        print(record, flush=True)
        if done.returncode:
            print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
