"""Mutation testing: does a test fail when one operator, number or condition of a module is changed?

    pip install cosmic-ray
    python -m tests.mutation grouping losses.options --sample 40     # forty mutants of each, always the same
    python -m tests.mutation losses.torch_path                       # all of them
    TRITON_INTERPRET=1 python -m tests.mutation losses.row_kernels --sample 12
    python -m tests.mutation losses.options --sample 40 --journal j  # keep verdicts in a file; only new ones are sought
    python -m tests.mutation losses.options --sample 40 --journal j --again  # and the survivors once more

Cosmic Ray makes the mutants. Without ``TRITON_INTERPRET=1`` what is outside of kernels is changed, with it what is
inside of them, and the interpreted kernels are tested. Each mutant runs the tests named below in a process that is
forked when all but this project is imported already, with the changed module in the place of the real one; no file of
the repository is touched. Tests that killed a mutant run first, then the quick ones; those that take longer than
`LONGEST` are left out. A mutant that ends in no time is killed, too.

No mutants, by rule: what differs in annotations and docstrings alone, in whether `zip` is strict, in the warps and
stages of a kernel's launch; `is` in the place of ``==``, which are one for small numbers, dtypes and Python's names.
`tests/mutants.json` lists the survivors that somebody has looked at and found equal in effect, each with the reason;
all other survivors are printed.
"""

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import json
import linecache
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and each costs every mutant its time

import pytest
import torch
import triton
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
EQUAL = ROOT / "tests" / "mutants.json"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOSS = ["tests/test_patch_cross_entropy.py"]
LINEAR = ["tests/test_linear_patch_cross_entropy.py"]
MEAN = ["tests/test_group_mean.py"]
THREADS = ["tests/test_vocabulary_threads.py"]
WIDE = "tests/test_patch_cross_entropy.py::test_three_rows_of_three_blocks"
SLICE = "tests/test_patch_cross_entropy.py::test_the_gradient_of_a_slice_follows_from_the_scores_of_the_whole"
FREQUENT = "tests/test_group_mean.py::test_frequent_ids_in_many_small_chunks"
MESSAGES = ["tests/test_error_messages.py"]
TRANSFORMERS = [
    f"tests/test_transformers_{story}.py" for story in ("families", "layers", "batches", "apply", "training")
]
LLAMAGEN = ["tests/test_llamagen.py", *(f"tests/test_llamagen_{story}.py" for story in ("layers", "apply", "training"))]
TESTS = {
    "grouping": ["tests/test_grouping.py", *MESSAGES],
    "schedule": ["tests/test_schedule.py", *MESSAGES],
    "modules": ["tests/test_modules.py", "tests/test_loss_options.py"],
    "step_graph": ["tests/test_step_graph.py", "tests/test_trainer_step.py", *MESSAGES],
    "_recorder": ["tests/test_step_graph.py"],
    "vocabulary_shard": [*THREADS, *MESSAGES],
    "_checks": ["tests/test_checks.py", *MESSAGES, "tests/test_patch_cross_entropy.py", *MEAN],
    "_dispatch": ["tests/test_dispatch.py", *MEAN],
    "_autograd": ["tests/test_transforms.py", *MEAN],
    "losses.options": ["tests/test_loss_options.py", *MESSAGES, "tests/test_patch_cross_entropy.py"],
    "losses.targets": ["tests/test_loss_options.py", "tests/test_patch_cross_entropy.py", "tests/test_modules.py"],
    "losses.target_math": LOSS,
    "losses.torch_path": [*THREADS, *LOSS],
    "losses.scores": [*THREADS, *LOSS, *LINEAR],
    "losses.chunks": [*THREADS, *LINEAR],
    "losses.patch_cross_entropy": [*THREADS, *LOSS, *MESSAGES],
    "losses.linear_patch_cross_entropy": [*THREADS, *LINEAR, *MESSAGES, "tests/test_compile.py"],
    "losses.row_layout": LOSS,
    "losses.row_kernels": LOSS,
    "losses.wide_rows": LOSS,
    "losses.gradient_kernels": LOSS,
    "losses.exponentials": [*LINEAR, "tests/test_exponentials.py"],
    "losses.exponential_rows": [*LINEAR, "tests/test_exponentials.py"],
    "losses.sharded": THREADS,
    "losses.shard_kernels": ["tests/test_vocabulary_parallel.py"],
    "embeddings.group_mean": [*THREADS, *MEAN, *MESSAGES],
    "embeddings.group_order": [*MEAN, *MESSAGES],
    "embeddings.mean_kernels": MEAN,
    "embeddings.table_gradient": MEAN,
    "embeddings.torch_path": MEAN,
    "embeddings.patch_mean": ["tests/test_patch_mean.py", *MESSAGES],
    "embeddings.segments": ["tests/test_segments.py", *MEAN],
    "integrations._layers": ["tests/test_layers.py", *MESSAGES],
    "integrations._packed": ["tests/test_packed.py"],
    "integrations._transformers_batch": TRANSFORMERS,
    "integrations._transformers_examine": TRANSFORMERS,
    "integrations.transformers": TRANSFORMERS,
    "integrations.transformers_trainer": ["tests/test_transformers_trainer.py"],
    "integrations.lightning": ["tests/test_lightning.py"],
    "integrations.llamagen": LLAMAGEN,
    "integrations.torchtitan": ["tests/test_torchtitan.py"],
    "integrations._torchtitan_losses": ["tests/test_torchtitan.py"],
}  # fmt: skip
LAUNCHERS = {  # modules of kernels, and of what launches them
    *("embeddings.mean_kernels", "embeddings.table_gradient", "embeddings.segments"),
    *("losses.row_kernels", "losses.wide_rows", "losses.row_layout", "losses.gradient_kernels"),
    *("losses.exponentials", "losses.exponential_rows", "losses.shard_kernels"),
}
PROJECT = ("npp_kernels", "tests", "reference", "bench", "examples", "conftest", "run")
IDENTITIES = {"core/ReplaceComparisonOperator_Eq_Is", "core/ReplaceComparisonOperator_NotEq_IsNot"}
WITH_ARGUMENTS = {"core/VariableInserter", "core/VariableReplacer"}  # operators for variables that one names
WITHOUT_EFFECT = {"strict", "num_warps", "num_stages"}  # keywords: of `zip` where lengths agree, of a kernel's launch
LONGEST = 1.0 if INTERPRETED else 0.15  # seconds of the processor for one test
ALL = 10 if INTERPRETED else 60  # and for all tests of a module: of more, those that come first in a drawn order
QUICK = "(not compile or operators) and not gradcheck"  # what is known to take longer is not even timed
SLOWEST = 600  # seconds of one mutant, which may wait forever


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

    def visit_keyword(self, node):
        if node.arg in WITHOUT_EFFECT:
            node.value = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def meaning(source):
    """Return what a program does, whatever its annotations and docstrings say; None where it is none."""
    try:
        return ast.dump(_Bare().visit(ast.parse(source)))
    except SyntaxError:  # a star of a parameter list, say, taken for a product
        return None


def find_places(name, source, interpreted):
    """Return what can be changed of a module's source: the operator's name, and which of its places.

    With the interpreter that is what lies inside of kernels, and all of the modules that do nothing but launch some.
    """
    kernels = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            kernels.update(range(node.decorator_list[0].lineno, node.end_lineno + 1))
    tree = get_ast(source)
    places = []
    for operator_name in sorted(set(operator_names()) - WITH_ARGUMENTS - IDENTITIES):
        operator = get_operator(operator_name)()
        positions = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for index, ((line, _), _) in enumerate(positions):
            if (name in LAUNCHERS or line in kernels) == interpreted:
                places.append((operator_name, index))
    random.Random(0).shuffle(places)
    return places


def find_mutants(source, places, limit):
    """Yield the changed sources for the first places, each with its operator, its line, and how that reads."""
    seen = {meaning(source), None}
    for name, index in places:
        changed = mutate_code(source, get_operator(name)(), index)
        if changed is None or meaning(changed) in seen:
            continue
        seen.add(meaning(changed))
        pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
        number, (before, after) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        yield name.removeprefix("core/"), number, before.strip(), after.strip(), changed
        limit -= 1
        if not limit:
            return


class _Changed(importlib.machinery.SourceFileLoader):
    """Load a module from a changed source, which tracebacks and Triton, too, take for what its file holds."""

    def __init__(self, name, path, source):
        super().__init__(name, str(path))
        self.source = source

    def find_spec(self, fullname, path=None, target=None):
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname):
        linecache.cache[self.path] = (len(self.source), None, self.source.splitlines(keepends=True), self.path)
        return compile(self.source, self.path, "exec", dont_inherit=True)


def is_named(item):
    """Return whether a test is run however long it takes."""
    return item.nodeid.startswith((WIDE, SLICE, FREQUENT))


class _Order:
    """Run first what killed mutants, then what is quick; write down what each test took, and which failed."""

    def __init__(self, record, times, kills):
        self.record, self.times, self.kills, self.spent = record, times, kills, 0.0

    def pytest_collection_modifyitems(self, items):
        if self.times is None:
            random.Random(0).shuffle(items)
            items.sort(key=is_named, reverse=True)
        else:
            timed = [item for item in items if item.nodeid in self.times]
            items[:] = [item for item in timed if is_named(item) or self.times[item.nodeid] < LONGEST]
            items.sort(key=lambda item: (-self.kills[item.nodeid], self.times[item.nodeid]))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start = time.process_time()
        result = yield
        if self.times is None:
            took = time.process_time() - start
            self.spent += min(took, LONGEST)
            self.write(took=[item.nodeid, took])
        return result

    def pytest_runtest_setup(self, item):
        if self.times is None and self.spent > ALL:
            pytest.skip("enough")

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.write(**{report.outcome: report.nodeid})

    def write(self, **line):
        with open(self.record, "a") as file:
            file.write(json.dumps(line) + "\n")


def try_tests(name, changed, tests, times=None, kills=None, seconds=None):
    """Run tests with a changed source in a module's place; return the exit status and what `_Order` wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        record.touch()
        child = os.fork()
        if child == 0:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            os.setpgid(0, 0)
            if seconds is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            path = ROOT / "npp_kernels" / (name.replace(".", "/") + ".py")
            sys.meta_path.insert(0, _Changed(f"npp_kernels.{name}", path, changed))
            status = 1
            known = set(sys.modules)
            try:
                arguments = [*tests, "-q", "-p", "no:cacheprovider", "-k", QUICK]
                arguments += ["-x"] if times is not None else []
                arguments += ["-m", "kernels"] if INTERPRETED else []
                order = _Order(record, times, kills)
                status = pytest.main(arguments, plugins=[order])
                order.write(imported=[module for module in sys.modules if module not in known])
            finally:
                os._exit(int(status))
        start = time.monotonic()
        done = 0
        while not done and time.monotonic() - start < SLOWEST:
            time.sleep(0.01)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        return status, [json.loads(line) for line in record.read_text().splitlines()]


def prepare(name, source, tests):
    """Run the tests without a change; return what each takes, after importing whatever of others' code they import."""
    status, record = try_tests(name, source, tests)
    if status:
        sys.exit(f"{name}: the tests fail without a change: {[line for line in record if 'failed' in line]}")
    skipped = {line["skipped"] for line in record if "skipped" in line}
    for module in next(line["imported"] for line in record if "imported" in line):
        if is_importable(module):
            importlib.import_module(module)
    return {test: took for test, took in (line["took"] for line in record if "took" in line) if test not in skipped}


def is_importable(module):
    """Return whether a module is not the project's own, and to be had by its name."""
    try:
        return module.split(".")[0] not in PROJECT and importlib.util.find_spec(module) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS, metavar="module", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, default=0, help="try so many mutants of each module, drawn from seed 0")
    parser.add_argument("--journal", type=Path, help="a file of verdicts, read before and added to")
    parser.add_argument("--again", action="store_true", help="try the journal's survivors once more")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    assert "npp_kernels" not in sys.modules, "a mutant must be imported anew"
    equal = {tuple(entry[:3]) for entry in json.loads(EQUAL.read_text())}
    verdicts = {}
    if options.journal and options.journal.exists():
        for line in options.journal.read_text().splitlines():
            entry = json.loads(line)
            verdicts[entry["module"], entry["operator"], entry["line"], entry["before"], entry["after"]] = entry
    for name in options.modules:
        path = ROOT / "npp_kernels" / (name.replace(".", "/") + ".py")
        source = path.read_text()
        times, kills, counts, total_places = None, Counter(), Counter(), 0
        for interpreted in (False, True) if options.again else (INTERPRETED,):
            places = find_places(name, source, interpreted)
            total_places += len(places)
            for operator, number, before, after, changed in find_mutants(source, places, options.sample):
                key = (name, operator, number, before, after)
                entry = verdicts.get(key)
                if options.again and entry is None:
                    continue
                listed = (name, before, after) in equal
                if entry is None or (options.again and not entry["killed"] and not listed):
                    if times is None:
                        times = prepare(name, source, TESTS[name])
                        if try_tests(name, source, TESTS[name], times, kills)[0]:
                            sys.exit(f"{name}: the tests fail in the order of mutants without a change")
                    seconds = 10 + 3 * sum(times.values())
                    status, record = try_tests(name, changed, TESTS[name], times, kills, seconds)
                    failed = [line["failed"] for line in record if "failed" in line]
                    kills.update(failed[:1])
                    entry = dict(zip(("module", "operator", "line", "before", "after"), key, strict=True))
                    entry |= {"killed": status != 0, "by": failed[0] if failed else status}
                    if options.journal:
                        with options.journal.open("a") as file:
                            file.write(json.dumps(entry) + "\n")
                counts["killed" if entry["killed"] else "equal" if listed else "alive"] += 1
                if not entry["killed"] and not listed:
                    print(f"{name}:{number} {operator}\n  - {before}\n  + {after}", flush=True)
        killed, total = counts["killed"], counts.total()
        print(
            f"{name}: {killed} of {total} killed ({killed / max(total, 1):.0%}), {counts['equal']} equal in effect, "
            f"{counts['alive']} others; of {total_places} places; Triton {triton.__version__}",
            flush=True,
        )


if __name__ == "__main__":
    main()
