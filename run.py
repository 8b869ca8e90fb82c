"""One command for each job, with an environment of its own: nothing is needed but Python 3.10+ and git.

    python run.py bench     # benchmarks at every stage on real tokens, then the report (GPU if there is one, else CPU)
    python run.py test      # the tests, then the kernels again in Triton's interpreter; `gpu` tests need a GPU
    python run.py check     # lint, format and types
    python run.py docs      # the documentation as a site, in site/; `docs serve` shows it while you edit
    python run.py coverage  # the tests once more, slower, and which lines no test runs
    python run.py oldest    # tests of the operations with the oldest PyTorch that is supported; it takes 7 GB of disk
    python run.py build     # sdist and wheel in dist/, their contents checked, and the wheel tried by itself

Arguments after the job go to pytest, or to mkdocs: ``python run.py test -k group_mean`` (the interpreter is then left
out). With ``--here`` before the job, it runs in the current Python environment instead, and installs nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
# The job's environment, what is installed there, and the versions of that. The checks need what the tests need: types
# come from packages.
TESTS = (".venv-test", ".[test,check,build,integrations]", "constraints.txt")
ENVIRONMENTS = {
    "bench": (".venv-bench", ".[bench]", "constraints.txt"),
    "test": TESTS,
    "check": TESTS,
    "coverage": TESTS,
    "oldest": (".venv-oldest", ".[test]", "constraints-oldest.txt"),
    "build": TESTS,
    # The site is made from sources that are read and not imported: neither the package nor torch is installed.
    "docs": (".venv-docs", "docs", "constraints.txt"),
}
# One thread for each worker: the workers are as many as the cores, and more only get in each other's way.
TEST_VARIABLES = {"OMP_NUM_THREADS": "1"}
WORKERS = ["-n", "auto", "--maxprocesses", "4"]
# What the oldest PyTorch is tried with: the operations, and what PyTorch does with them.
OLDEST = ["group_mean", "patch_mean", "grouping", "segments", "schedule", "modules", "patch_cross_entropy"]
OLDEST += ["linear_patch_cross_entropy", "loss_exactness", "compile", "composition", "transforms", "step_graph", "fuzz"]


class Command(NamedTuple):
    """A Python command line, and what it sees in its environment beside the caller's."""

    arguments: list[str]
    variables: dict[str, str]


def environment(job: str) -> str:
    """Return the Python of the job's virtual environment, made or brought up to date where needed."""
    name, package, versions = ENVIRONMENTS[job]
    home = ROOT / name
    python = str(home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    stamp = home / "installed"
    inputs = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / versions]
    if stamp.exists() and all(stamp.stat().st_mtime > path.stat().st_mtime for path in inputs):
        return python
    print(f"setting up {name}, once", flush=True)
    venv.create(home, with_pip=True, clear=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", versions]
    wanted = ["-e", package] if package.startswith(".") else requirements(package)
    subprocess.run([*install, *wanted], cwd=ROOT, check=True)
    stamp.touch()
    return python


def requirements(name: str) -> list[str]:
    """Return a list of packages that setup.py has under a name of its own."""
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return [str(package) for package in ast.literal_eval(statement.value)]
    raise ValueError(f"setup.py: expected a list {name}, found none")


def commands(job: str, arguments: list[str]) -> list[Command]:
    """Return the commands of a job, in order."""
    if job == "bench":
        return [Command(["-m", "bench", *arguments], {})]
    if job == "docs":
        return [Command(["-m", "mkdocs", *(arguments or ["build", "--strict"])], {"NO_MKDOCS_2_WARNING": "1"})]
    if job == "check":
        tools = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]]
        return [Command(["-m", *tool], {}) for tool in tools]
    if job == "build":
        return [Command(["-m", "tests.distribution", *arguments], {})]
    compiled = {**TEST_VARIABLES, "TRITON_INTERPRET": "0"}
    if job == "oldest":
        files = [f"tests/test_{name}.py" for name in OLDEST]
        return [Command(["-m", "pytest", *WORKERS, *files, *arguments], compiled)]
    if arguments:
        return [Command(["-m", "pytest", *arguments], compiled)]
    # Triton reads the variable when it is imported, so the interpreter takes a process of its own.
    interpreted = {**TEST_VARIABLES, "TRITON_INTERPRET": "1"}
    if job == "coverage":
        measured = ["-m", "pytest", *WORKERS, "--cov", "--cov-report="]
        return [
            Command([*measured, "tests"], compiled),
            Command([*measured, "--cov-append", "-m", "kernels", "tests"], interpreted),
            Command(["-m", "coverage", "report"], {}),
        ]
    return [
        Command(["-m", "pytest", *WORKERS, "tests"], compiled),
        Command(["-m", "pytest", *WORKERS, "-m", "kernels", "tests"], interpreted),
    ]


def main() -> int:
    """Run the job that the command line names; return the first failure's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="use the current Python environment; install nothing")
    parser.add_argument("job", choices=ENVIRONMENTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the job")
    options = parser.parse_args(sys.argv[1:] or ["--help"])
    python = sys.executable if options.here else environment(options.job)
    for command in commands(options.job, options.arguments):
        status = subprocess.run([python, *command.arguments], cwd=ROOT, env=os.environ | command.variables).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
