"""Every kernel, compiled for every GPU that we name, with the Triton that is installed: registers, and what spills.

    python -m tests.spills                        # a table of what does not compile or fit, or spills
    PYTHONPATH=FOLDER python -m tests.spills      # with the Triton of pip install --no-deps --target FOLDER
    python -m tests.spills --journal FILE         # each result is added to the file; what is there is not done again

No GPU is needed. The cases and the targets are those of `test_ahead_of_time.py`. Each kernel is compiled in a process
of its own, which a compiler may end, and which has so many seconds (``--limit``).
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton

from tests.test_ahead_of_time import (
    ALL_CASES,
    CASES,
    HOPPER_CASES,
    MORE_TARGETS,
    OPAQUE_CASES,
    SHARED_MEMORY,
    TARGETS,
    compile_kernel,
    resources,
)


def examine(case, target):
    """Return what a kernel takes of a GPU, or the error that its compiler raises."""
    try:
        compiled = compile_kernel(ALL_CASES[case][0], target, ALL_CASES[case][1])
    except Exception as error:  # a compiler's, of any kind: to be reported
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    found = {"shared": compiled.metadata.shared, "fits": compiled.metadata.shared <= SHARED_MEMORY[target]}
    if target.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            found["registers"], found["stack"], found["local"] = resources(compiled, Path(folder))
    return found


def examine_apart(case, target, limit):
    """Return the same from a process of its own, or how that ended."""

    def send():
        os.setsid()  # the assembler is a process as well, and is to end with this one
        sender.send(examine(case, target))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=send)
    process.start()
    sender.close()  # so that the end of the other process is seen here
    try:
        found = receiver.recv() if receiver.poll(limit) else {"error": f"not compiled in {limit} s"}
    except EOFError:
        process.join()
        found = {"error": f"the compiler ended its process, status {process.exitcode}"}
    if process.is_alive():
        if "error" in found:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return found


def spills(found):
    return bool(found.get("stack") or found.get("local"))


def fails(found):
    return "error" in found or not found["fits"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS, *MORE_TARGETS], choices=[*TARGETS, *MORE_TARGETS])
    parser.add_argument("--limit", type=int, default=300, help="seconds for each kernel")
    parser.add_argument("--journal", type=Path, help="lines of JSON, one for each kernel, target and Triton")
    options = parser.parse_args()
    pairs = [(case, target) for target, case in product(options.targets, CASES | OPAQUE_CASES)]
    pairs += [(case, "sm_90") for case in HOPPER_CASES if "sm_90" in options.targets]
    results = {}
    if options.journal and options.journal.exists():
        for line in map(json.loads, options.journal.read_text().splitlines()):
            if line["triton"] == triton.__version__:
                results[line["case"], line["target"]] = line["found"]
    for case, target in pairs:
        if (case, target) not in results:
            found = results[case, target] = examine_apart(case, target, options.limit)
            if options.journal:
                line = {"triton": triton.__version__, "case": case, "target": target, "found": found}
                with options.journal.open("a") as journal:
                    journal.write(json.dumps(line) + "\n")
        if fails(results[case, target]) or spills(results[case, target]):
            print(f"{target:7} {case:40} {results[case, target]}", flush=True)
    asked = [results[pair] for pair in pairs]
    bad = sum(map(fails, asked))
    print(
        f"Triton {triton.__version__}: {len(asked)} compiled, {sum(map(spills, asked))} spill, {bad} fail or do not fit"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
