"""Mutation testing: does a test fail when one operator, number or condition of a module is changed?

    pip install cosmic-ray
    python -m tests.mutation grouping losses.options               # all mutants of some modules of npp_kernels
    python -m tests.mutation losses.torch_path --sample 100        # a hundred of them, always the same
    TRITON_INTERPRET=1 python -m tests.mutation losses.target_math # kernels, in Triton's interpreter

Cosmic Ray makes the mutants. Each runs the tests named below in a process that is forked when PyTorch is imported
already, with the changed module in the place of the real one; no file of the repository is touched. What differs in
annotations and docstrings alone is no mutant. Survivors are printed with their lines, for somebody to look at.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import triton
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
LOSSES = [
    "tests/test_patch_cross_entropy.py",
    "tests/test_linear_patch_cross_entropy.py",
    "tests/test_loss_exactness.py",
]
TESTS = {
    "grouping": ["tests/test_grouping.py", "tests/test_patch_mean.py"],
    "schedule": ["tests/test_schedule.py"],
    "modules": ["tests/test_modules.py"],
    "_checks": [
        *("tests/test_checks.py", "tests/test_patch_cross_entropy.py", "tests/test_group_mean.py"),
        "tests/test_grouping.py",
    ],
    "_autograd": ["tests/test_transforms.py", "tests/test_group_mean.py"],
    "losses.options": ["tests/test_patch_cross_entropy.py", "tests/test_modules.py"],
    "losses.targets": [*LOSSES, "tests/test_modules.py"],
    "losses.target_math": LOSSES,
    "losses.torch_path": LOSSES,
    "losses.scores": LOSSES,
    "losses.chunks": LOSSES,
    "losses.patch_cross_entropy": LOSSES,
    "losses.linear_patch_cross_entropy": LOSSES,
    "losses.row_kernels": LOSSES,
    "losses.gradient_kernels": LOSSES,
    "embeddings.group_mean": ["tests/test_group_mean.py"],
    "embeddings.mean_kernels": ["tests/test_group_mean.py"],
    "embeddings.table_gradient": ["tests/test_group_mean.py"],
    "embeddings.torch_path": ["tests/test_group_mean.py"],
    "embeddings.patch_mean": ["tests/test_patch_mean.py"],
    "embeddings.segments": ["tests/test_segments.py", "tests/test_group_mean.py"],
}  # fmt: skip
WITH_ARGUMENTS = {"core/VariableInserter", "core/VariableReplacer"}  # operators for variables that one names
SLOWEST = 120  # seconds: a mutant may loop forever


class _Bare(ast.NodeTransformer):
    """Leave out what has no effect when the program runs."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def meaning(source):
    """Return what a program does, whatever its annotations and docstrings say; None where it is none."""
    try:
        return ast.dump(_Bare().visit(ast.parse(source)))
    except SyntaxError:  # a star of a parameter list, say, taken for a product
        return None


def find_mutants(path):
    """Return the changed sources of a module, each with the name of its operator and the lines that differ."""
    source = path.read_text()
    seen, mutants = {meaning(source), None}, []
    for name in sorted(set(operator_names()) - WITH_ARGUMENTS):
        operator = get_operator(name)()
        tree = get_ast(source)
        places = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(tree))
        for place in range(places):
            changed = mutate_code(source, operator, place)
            if changed is None or meaning(changed) in seen:
                continue
            seen.add(meaning(changed))
            pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
            number, lines = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            mutants.append((name.removeprefix("core/"), number, lines, changed))
    return mutants


class _Finder(importlib.abc.MetaPathFinder):
    """Find one module in another file."""

    def __init__(self, name, path):
        self.name, self.path = name, path

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_file_location(fullname, self.path) if fullname == self.name else None


def survives(name, changed, tests):
    """Return whether the tests pass with the changed source in the place of a module's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name.split('.')[-1]}.py"
        path.write_text(changed)
        child = os.fork()
        if child == 0:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            sys.meta_path.insert(0, _Finder(f"npp_kernels.{name}", path))
            status = 1
            try:
                status = pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"])
            finally:
                os._exit(int(status))
        start = time.monotonic()
        while time.monotonic() - start < SLOWEST:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS, metavar="module", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, help="try so many mutants of each module, drawn from seed 0")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    assert "npp_kernels" not in sys.modules, "a mutant must be imported anew"
    for name in options.modules:
        path = ROOT / "npp_kernels" / (name.replace(".", "/") + ".py")
        tests = [test for test in TESTS[name] if Path(test).exists()]
        if not survives(name, path.read_text(), tests):
            sys.exit(f"{name}: the tests fail without a change")
        mutants = find_mutants(path)
        total = len(mutants)
        if options.sample and options.sample < total:
            mutants = random.Random(0).sample(mutants, options.sample)
        alive = 0
        for operator, number, (before, after), changed in mutants:
            if survives(name, changed, tests):
                alive += 1
                print(f"{name}:{number} {operator}\n  - {before.strip()}\n  + {after.strip()}", flush=True)
        killed = len(mutants) - alive
        share = killed / max(len(mutants), 1)
        print(
            f"{name}: {killed} of {len(mutants)} killed, {share:.0%} ({total} mutants; Triton {triton.__version__})",
            flush=True,
        )


if __name__ == "__main__":
    main()
