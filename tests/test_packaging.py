"""What a release says of itself, and which parts of it are checked for types. `tests/distribution.py` builds one."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

import npp_kernels

ROOT = Path(__file__).parents[1]
METADATA = (ROOT / "setup.py").read_text()


def settings():
    """Return pyproject.toml. Python 3.10 has no reader of its own; pytest brings one there."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())


def functions(path):
    """Yield the functions of a file, however deep, and whether each is a kernel or a part of one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node, any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def has_types(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = {argument.arg for argument in named if argument and argument.annotation is None} - {"self", "cls"}
    bare = function.name == "__init__" and len(arguments.args) > 1  # mypy knows what that returns, if it takes anything
    return not missing and (function.returns is not None or bare)


def test_one_version():
    version = npp_kernels.__version__
    assert f'version="{version}"' in METADATA
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[1] == version
    newest = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest[1] == version
    assert newest[2] == "Unreleased" or re.fullmatch(r"\d{4}-\d{2}-\d{2}", newest[2])


def test_only_the_library_is_installed_and_all_of_it():
    found = set(find_packages(ROOT, include=["npp_kernels", "npp_kernels.*"]))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "npp_kernels").rglob("*.py")}
    assert found == {".".join(folder.parts) for folder in folders}
    assert 'find_packages(include=["npp_kernels", "npp_kernels.*"])' in METADATA
    assert (ROOT / "npp_kernels" / "py.typed").exists()
    for name in ("LICENSE", "README.md"):
        assert name in METADATA
        assert (ROOT / name).read_text().strip()


def test_the_oldest_versions_agree():
    """What setup.py allows is what `python run.py oldest` runs."""
    oldest = re.search(r'"torch>=(\d+\.\d+)"', METADATA)[1]
    assert f"torch=={oldest}.0" in (ROOT / "constraints-oldest.txt").read_text().splitlines()
    python = re.search(r'python_requires=">=(\d+\.\d+)"', METADATA)[1]
    assert settings()["tool"]["mypy"]["python_version"] == python
    assert settings()["tool"]["ruff"]["target-version"] == f"py{python.replace('.', '')}"


def test_only_kernels_have_no_types():
    """mypy cannot tell a kernel from its launcher: where a module has kernels, this looks at the rest of it."""
    with_kernels = {}
    for top in ("npp_kernels", "reference", "bench"):
        for path in (ROOT / top).rglob("*.py"):
            found = list(functions(path))
            if any(is_kernel for _, is_kernel in found):
                with_kernels[".".join(path.relative_to(ROOT).with_suffix("").parts)] = found
    (exempt,) = [
        override["module"]
        for override in settings()["tool"]["mypy"]["overrides"]
        if override.get("disallow_untyped_defs") is False
    ]
    assert set(exempt) == set(with_kernels)
    untyped = [
        f"{module}.{function.name}"
        for module, found in with_kernels.items()
        for function, is_kernel in found
        if not is_kernel and not has_types(function)
    ]
    assert not untyped


@pytest.mark.parametrize("job", ["bench", "test", "check", "coverage", "oldest", "build"])
def test_every_job_is_described(job):
    import run

    assert run.commands(job, [])
    assert f"    python run.py {job} " in run.__doc__
    assert all((ROOT / versions).exists() for _, _, versions in run.ENVIRONMENTS.values())
    extras = set(re.findall(r"[a-z]+", run.ENVIRONMENTS[job][1]))
    assert extras <= set(re.findall(r'^        "(\w+)": ', METADATA, flags=re.MULTILINE))
