"""Builds the sdist, and the wheel from it; looks into both; and installs the wheel where nothing else is.

    python -m tests.distribution    # what `python run.py build` runs; it leaves the two files in dist/

In the clean environment README's first example has to run, from a folder elsewhere, and nothing of this repository but
`npp_kernels` may be importable.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
# What is in the sdist beside the package, and made by setuptools.
FILES = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
MADE = {"PKG-INFO", "setup.cfg"}
ELSEWHERE = """
import importlib.util, pathlib, sys
import npp_kernels
assert pathlib.Path(sys.prefix) in pathlib.Path(npp_kernels.__file__).parents, npp_kernels.__file__
for name in ("reference", "bench", "tests", "examples"):
    assert importlib.util.find_spec(name) is None, name
"""


def package_files():
    """Return what git has of the package, by path."""
    listed = subprocess.run(["git", "ls-files", "npp_kernels"], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def check_contents(sdist, wheel):
    """Compare the files of both with those that belong there."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    found = {name for name in names if not name.startswith("npp_kernels.egg-info/")}
    assert found == package_files() | FILES | MADE, sorted(found ^ (package_files() | FILES | MADE))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = {name for name in names if ".dist-info/" not in name}
    assert found == package_files(), sorted(found ^ package_files())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def check_installed(wheel):
    """Install the wheel in an environment of its own, and run README's first example there."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "venv", with_pip=True)
        python = Path(folder) / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", ROOT / "constraints.txt", wheel], check=True)
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, "-W", "error", "-c", ELSEWHERE + example], cwd=folder, env=alone, check=True)


def main():
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", DIST], cwd=ROOT, check=True)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], check=True)
    check_contents(sdist, wheel)
    check_installed(wheel)
    print(f"{sdist.name}, {wheel.name}: complete, and the wheel runs where nothing else is installed")


if __name__ == "__main__":
    main()
