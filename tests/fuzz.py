"""A campaign of fuzzing: as many cases as one likes, in rounds with seeds of their own, and a journal of what ran.

    python -m tests.fuzz --cases 100000                       # the PyTorch path, on the CPU
    python -m tests.fuzz --cases 3000 --device interpret      # the kernels, in Triton's interpreter
    python -m tests.fuzz --cases 40000 --device cuda -n 8     # the kernels on a GPU, in eight processes

A round that fails ends the campaign; Hypothesis has then printed the smallest case that it found. Each line of the
journal says how many cases of each operation passed in one process of a round; the sum of all is printed at the end.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Small rounds: Hypothesis remembers what it has tried, and looks around there.
ROUND = {"cpu": 1500, "interpret": 60, "cuda": 1000}


def read_journal(path):
    """Return how many cases ran of each operation, over all campaigns that wrote to the journal."""
    total = Counter()
    if path.exists():
        for line in path.read_text().splitlines():
            total.update(json.loads(line))
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, required=True, help="how many cases to run, of all operations together")
    parser.add_argument("--device", choices=ROUND, default="cpu")
    parser.add_argument("--seed", type=int, default=1, help="the seed of the first round")
    parser.add_argument("--journal", type=Path, default=Path("runs/fuzz.jsonl"))
    parser.add_argument("-n", type=int, default=1, help="processes; each takes an operation or two")
    options = parser.parse_args()
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    variables = {"TRITON_INTERPRET": "1" if options.device == "interpret" else "0", "OMP_NUM_THREADS": "1"}
    device = "cuda" if options.device == "cuda" else "cpu"
    command = [sys.executable, "-m", "pytest", "tests/test_fuzz.py", "-q", "--tb=short", "-k", device]
    command += ["--fuzz-examples", str(ROUND[options.device]), "--fuzz-journal", str(options.journal.resolve())]
    command += ["-n", str(options.n)] if options.n > 1 else []
    start, seed = read_journal(options.journal).total(), options.seed
    while read_journal(options.journal).total() < start + options.cases:
        print(f"round {seed}", flush=True)
        status = subprocess.run(
            [*command, "--hypothesis-seed", str(seed)], cwd=ROOT, env=os.environ | variables
        ).returncode
        if status:
            return status
        seed += 1
    for name, count in sorted(read_journal(options.journal).items()):
        print(f"{count:8,} {name}")
    print(f"{read_journal(options.journal).total():8,} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
