"""Run the project's main jobs, each in a virtual environment of its own that it makes on first use.

    python run.py bench     # benchmarks at every stage on real tokens, then the report (GPU if there is one, else CPU)
    python run.py test      # the tests (those marked gpu are skipped where there is no GPU)
    python run.py check     # lint, format and types

Arguments after the job go to pytest: ``python run.py test -k group_mean``. With ``--here`` before the job, it runs in
the current Python environment instead, and installs nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EXTRAS = {"bench": ".[bench]", "test": ".[test,bench]", "check": ".[test,bench,check]"}


def environment(job: str) -> str:
    """Return the Python of the job's virtual environment, made or brought up to date where needed."""
    home = ROOT / f".venv-{job}"
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = home / "installed"
    inputs = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    if stamp.exists() and all(stamp.stat().st_mtime > path.stat().st_mtime for path in inputs):
        return str(python)
    print(f"setting up {home.name}, once", flush=True)
    venv.create(home, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt", "-e"]
    subprocess.run([*install, EXTRAS[job]], cwd=ROOT, check=True)
    stamp.touch()
    return str(python)


def commands(job: str, python: str, arguments: list[str]) -> list[list[str]]:
    """Return the commands of a job, in order."""
    if job == "test":
        return [[python, "-m", "pytest", "tests", *(arguments or ["-n", "2"])]]
    if job == "check":
        return [
            [python, "-m", "ruff", "check", "."],
            [python, "-m", "ruff", "format", "--check", "."],
            [python, "-m", "mypy"],
        ]
    return [[python, "-m", "bench", *arguments]]


def main() -> int:
    """Run the job that the command line names; return the first failure's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use the current Python environment; install nothing")
    parser.add_argument("job", choices=EXTRAS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the job")
    options = parser.parse_args()
    python = sys.executable if options.here else environment(options.job)
    for command in commands(options.job, python, options.arguments):
        status = subprocess.run(command, cwd=ROOT).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
