"""The package as a whole: its documented examples, and the arrows between its modules."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import npp_kernels

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "npp_kernels").with_suffix("").parts)
    for path in (ROOT / "npp_kernels").rglob("*.py")
)

# Who may import whom, as CONTRIBUTING draws it: only what stands further down, never upwards or sideways.
LAYERS = [
    {"__init__"},
    {"integrations.transformers_trainer"},
    {f"integrations.{name}" for name in ("__init__", "llamagen", "transformers", "torchtitan", "lightning")},
    {"integrations._transformers_examine", "integrations._torchtitan_losses"},
    {"integrations._layers", "integrations._packed", "integrations._transformers_batch"},
    {"modules"},
    {"losses.linear_patch_cross_entropy"},
    {"losses.patch_cross_entropy", "losses.chunks"},
    {"losses.sharded"},
    {"losses.shard_kernels"},
    {"losses.exponentials", "losses.row_kernels", "losses.gradient_kernels", "losses.torch_path"},
    {"losses.exponential_rows", "losses.wide_rows"},
    {"losses.scores"},
    {"losses.row_layout", "losses.target_math", "losses.targets"},
    {"losses.options", "losses.__init__"},
    {"embeddings.group_mean", "embeddings.patch_mean", "embeddings.__init__"},
    {"embeddings.group_order"},
    {"embeddings.table_gradient", "embeddings.torch_path"},
    {"embeddings.mean_kernels"},
    {"embeddings.segments"},
    {"schedule", "step_graph"},
    {"_recorder", "vocabulary_shard"},
    {"_triton_math", "_dispatch", "_autograd", "grouping"},
    {"_checks"},
]


def imported(path):
    """Return the modules that a file imports, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    if "torchtitan" in module:
        pytest.importorskip("torchtitan", reason="needs torchtitan, on whose classes it builds")
    name = f"npp_kernels.{module}".removesuffix(".__init__")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    layer = next(index for index, names in enumerate(LAYERS) if module in names)
    below = set().union(*LAYERS[layer + 1 :])
    for name in imported((ROOT / "npp_kernels").joinpath(*module.split(".")).with_suffix(".py")):
        top, _, rest = name.partition(".")
        assert top not in ("reference", "bench", "tests"), f"{module} imports {name}"
        if top == "npp_kernels":
            assert rest in below, f"{module} imports {name}"


# Of the training system a room may import these beside itself; what is not a room is a command.
ROOMS = {
    "tokens": {"tokenizer"},
    "network": set(),
    "sampling": {"network"},
    "training": {"network", "tokens"},
    "comparison": {"network", "tokens", "training", "tokenizer", "train", "sample", "score", "claim"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_training_system_import_no_others(room):
    names = set().union(*(imported(path) for path in (ROOT / "reference" / room).glob("*.py")))
    parts = {name.split(".")[1] for name in names if name.startswith("reference.")}
    assert parts <= ROOMS[room] | {room}


def test_the_specification_stands_alone():
    assert imported(ROOT / "reference" / "ops.py") <= {
        "__future__", "collections.abc", "typing", "torch", "torch.nn.functional", "einops",
    }  # fmt: skip


def test_public_names_are_documented():
    for name in npp_kernels.__all__:
        text = getattr(npp_kernels, name).__doc__
        assert text, name
        assert ">>>" in text or "Stats" in name or name == "Stage", f"{name} has no example"


def test_readme_snippets_run():
    text = (ROOT / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
