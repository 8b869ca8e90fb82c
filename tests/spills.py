"""Every kernel, compiled for every GPU that we name, with the Triton that is installed: registers, and what spills.

    python -m tests.spills                                  # a table of what does not compile or fit, or spills
    PYTHONPATH=FOLDER python -m tests.spills --json FILE    # with the Triton of pip install --no-deps --target FOLDER

No GPU is needed. The cases and the targets are those of `test_ahead_of_time.py`.
"""

import argparse
import json
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


def examine(case, target, folder):
    """Return what a kernel takes of a GPU, or the error that its compiler ends with."""
    try:
        compiled = compile_kernel(*(ALL_CASES[case][0], target, ALL_CASES[case][1]))
    except Exception as error:  # a compiler's, of any kind: to be reported
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    found = {"shared": compiled.metadata.shared, "fits": compiled.metadata.shared <= SHARED_MEMORY[target]}
    if target.startswith("sm_"):
        found["registers"], found["stack"], found["local"] = resources(compiled, folder)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=[*TARGETS, *MORE_TARGETS], choices=[*TARGETS, *MORE_TARGETS])
    parser.add_argument("--json", type=Path, help="write everything that was found to this file")
    options = parser.parse_args()
    pairs = list(product(CASES | OPAQUE_CASES, options.targets))
    pairs += [(case, "sm_90") for case in HOPPER_CASES if "sm_90" in options.targets]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, target in pairs:
            found = results[f"{case} | {target}"] = examine(case, target, Path(folder))
            spilled = found.get("stack") or found.get("local")
            if "error" in found or not found["fits"] or spilled:
                print(f"{target:7} {case:40} {found}", flush=True)
    bad = [found for found in results.values() if "error" in found or not found["fits"]]
    spills = [found for found in results.values() if found.get("stack") or found.get("local")]
    print(f"Triton {triton.__version__}: {len(results)} compiled, {len(spills)} spill, {len(bad)} fail or do not fit")
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "results": results}, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
