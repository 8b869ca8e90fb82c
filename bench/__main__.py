"""Run the benchmarks and make their report, from the repository's root.

    python -m bench                                  # measure, then report into runs/bench-DATE/
    python -m bench report RESULTS --out FOLDER      # tables and plots of results made before
    python -m bench readme                           # README's table and pictures, from the committed results
    python -m bench training                         # the tables of docs/training.md, from docs/step_time/
    python -m bench accuracy --device cpu            # errors beside PyTorch's, for docs/accuracy.md; --help says more

RESULTS is a file ``results.json`` or, of a run that was cut off, ``journal.jsonl``. Other arguments go to pytest:
``python -m bench --device=cpu -k group_mean``.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

import pytest

from bench import accuracy
from bench.reporting.readme import RESULTS, ROOT, STEPS, write_readme
from bench.reporting.records import read_results
from bench.reporting.report import write_report
from bench.reporting.training_page import PAGE, write_page

HERE = ROOT / "bench"


def measure(arguments: list[str]) -> int:
    """Run pytest over the benchmarks, then write the report of whatever was measured."""
    folder = ROOT / "runs" / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    results, journal = folder / "results.json", folder / "journal.jsonl"
    options = ["--benchmark-only", "--benchmark-columns=median,iqr,rounds", "--progress", "--no-header", "-q"]
    status = pytest.main([str(HERE), *options, f"--benchmark-json={results}", f"--journal={journal}", *arguments])
    made = results if results.exists() and results.stat().st_size else journal
    if made.exists():
        print(f"report: {write_report(read_results(made), folder)}")
    return int(status)


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    if arguments[:1] == ["accuracy"]:
        return accuracy.main(arguments[1:])
    if not arguments or arguments[0] not in ("report", "readme", "training", "-h", "--help"):
        return measure(arguments)
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="tables and plots of results")
    report.add_argument("results", type=Path)
    report.add_argument("--out", type=Path, required=True)
    readme = commands.add_parser("readme", help="README's table and pictures, from the committed results")
    readme.add_argument("--results", type=Path, default=RESULTS, help="of the operations (default: %(default)s)")
    readme.add_argument("--steps", type=Path, default=STEPS, help="of training steps (default: %(default)s)")
    readme.add_argument("--page", type=Path, default=ROOT / "README.md", help="where the markers are")
    training = commands.add_parser("training", help="the tables of training steps, from docs/step_time/")
    training.add_argument("--page", type=Path, default=PAGE, help="where the markers are (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "report":
        print(write_report(read_results(options.results), options.out))
    elif options.command == "training":
        write_page(options.page)
    else:
        write_readme(options.page, options.results, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
