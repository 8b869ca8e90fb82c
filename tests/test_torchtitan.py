"""TorchTitan's own package on the CPU: parts here, its trainer in processes of their own (`torchtitan_runs.py`)."""

import dataclasses
import importlib
import itertools
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torchtitan", reason="needs torchtitan, of the extra 'integrations', and Python 3.11")

from filelock import FileLock
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.config.manager import ConfigManager
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from npp_kernels import PatchSchedule
from npp_kernels.integrations.torchtitan import (
    LinearPatchLoss,
    PatchEmbedding,
    PatchLoss,
    PatchTrainer,
    group_batch,
    with_patches,
)
from tests.processes import ROOT, environment

VOCAB_SIZE, HIDDEN_SIZE = 60, 16


def random_targets(*shape):
    return torch.randint(VOCAB_SIZE, shape).masked_fill(torch.rand(shape) < 0.2, -100)


def repeated_cross_entropy(logits, targets):
    """Return the sum over all targets, of logits that are repeated for each."""
    repeated = logits.unsqueeze(-2).expand(*targets.shape, -1)
    return F.cross_entropy(repeated.flatten(0, -2).float(), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_single_tokens_is_torchtitans(dtype):
    pred = torch.randn(2, 12, VOCAB_SIZE, dtype=dtype, requires_grad=True)
    labels = random_targets(2, 12)
    count = (labels != -100).sum()
    for divisor in (count, None):  # the trainer's call, and the validator's
        own, _ = CrossEntropyLoss.Config().build()(pred, labels, divisor)
        ours, metrics = PatchLoss.Config().build()(pred, labels, divisor, positions=torch.arange(12).expand(2, 12))
        torch.testing.assert_close(ours, own)
        torch.testing.assert_close(*(torch.autograd.grad(loss, pred)[0] for loss in (ours, own)))
        assert metrics == {}


@pytest.mark.parametrize("patch", [1, 4])
@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_chunks_of_the_loss_add_up(num_chunks, patch):
    hidden, head = torch.randn(2, 16, HIDDEN_SIZE, requires_grad=True), nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    targets = random_targets(2, 16, patch)
    count = (targets != -100).sum()
    expected = repeated_cross_entropy(head(hidden), targets) / count
    expected_grads = torch.autograd.grad(expected, [hidden, head.weight])

    chunked = ChunkedLossWrapper.Config(num_chunks=num_chunks, loss_fn=PatchLoss.Config()).build()
    chunked.set_lm_head(head)
    loss, _ = chunked(hidden, targets, count, positions=torch.arange(16).expand(2, 16))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((hidden.grad, head.weight.grad), expected_grads)
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden.detach(), targets)[0], expected * count)


def test_the_loss_can_be_compiled():
    compiled = PatchLoss.Config().build(
        compile_config=CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    )
    for shape in ((2, 12, 4), (2, 48)):  # a stage of patches, then of tokens
        pred, targets = torch.randn(2, *shape[1:2], VOCAB_SIZE, requires_grad=True), random_targets(*shape)
        results = [loss_fn(pred, targets, torch.tensor(7))[0] for loss_fn in (compiled, PatchLoss.Config().build())]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(loss, pred)[0] for loss in results))


def test_the_loss_refuses_labels_of_other_rows():
    loss_fn = PatchLoss.Config().build()
    with pytest.raises(ValueError, match=r"labels: expected the rows of pred, \(2, 8\), .* got \(2, 32\)"):
        loss_fn(torch.randn(2, 8, VOCAB_SIZE), random_targets(2, 32))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        loss_fn(torch.randn(2, 8, VOCAB_SIZE), random_targets(2, 4, 4))


def test_a_step_without_targets_is_zero():
    pred = torch.randn(2, 8, VOCAB_SIZE, requires_grad=True)
    loss, _ = PatchLoss.Config().build()(pred, torch.full((2, 8, 4), -100), torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not pred.grad.any()


def linear_loss_of(head, **options):
    loss_fn = LinearPatchLoss.Config(**options).build()
    loss_fn.set_lm_head(head)
    return loss_fn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("patch", [None, 1, 4])  # None: labels [B, L]
def test_output_layer_and_loss_in_one_are_both(patch, bias):
    hidden, head = torch.randn(2, 16, HIDDEN_SIZE, requires_grad=True), nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=bias)
    targets = random_targets(2, 16) if patch is None else random_targets(2, 16, patch)
    count = (targets != -100).sum() + 3  # other ranks and micro-batches have targets too
    wanted = [hidden, *head.parameters()]
    expected = repeated_cross_entropy(head(hidden), targets.view(2, 16, -1)) / count
    expected_grads = torch.autograd.grad(expected, wanted)
    compiling = CompileConfig(enable=True, components=["loss"])
    for loss_fn in (LinearPatchLoss.Config().build(compile_config=compiling), linear_loss_of(head, chunk_rows=5)):
        loss_fn.set_lm_head(head)
        loss, metrics = loss_fn(hidden, targets, count, positions=torch.arange(16).expand(2, 16))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, wanted), expected_grads)
        assert metrics == {}
        with torch.no_grad():  # the validator's call
            torch.testing.assert_close(loss_fn(hidden, targets)[0], expected * count)
    assert "forward" not in vars(head)
    assert head(hidden).shape == (2, 16, VOCAB_SIZE)


def test_output_layer_and_loss_in_one_with_a_tied_embedding_over_micro_batches():
    embedding = PatchEmbedding.Config(num_embeddings=VOCAB_SIZE, embedding_dim=HIDDEN_SIZE).build()
    head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    embedding.weight = head.weight
    tokens, targets = torch.randint(VOCAB_SIZE, (3, 2, 8, 4)), random_targets(3, 2, 8, 4)
    count = (targets != -100).sum()
    rows = F.embedding(tokens, head.weight).mean(-2).tanh()
    (repeated_cross_entropy(F.linear(rows, head.weight), targets) / count).backward()
    expected, head.weight.grad = head.weight.grad, None
    loss_fn = linear_loss_of(head, chunk_rows=6)
    for micro_tokens, micro_targets in zip(tokens, targets, strict=True):
        loss_fn(embedding(micro_tokens).tanh(), micro_targets, count)[0].backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_output_layer_and_loss_in_one_without_targets_is_zero():
    hidden, head = torch.randn(2, 8, HIDDEN_SIZE, requires_grad=True), nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    loss, _ = linear_loss_of(head)(hidden, torch.full((2, 8, 4), -100), torch.tensor(0))
    loss.backward()
    assert loss == 0
    assert not any(tensor.grad.any() for tensor in (hidden, *head.parameters()))


def lora_head(**options):
    model = LoRAConverter(LoRAConverter.Config(rank=2, **options)).convert(llama3_debugmodel().model_spec.model)
    head = model.lm_head.build()
    head.init_states()
    return head


def test_a_frozen_output_layer_gets_no_gradient():
    head = lora_head(target_modules=["wq"])
    hidden = torch.randn(2, 8, head.in_features, requires_grad=True)
    targets = torch.randint(head.out_features, (2, 8, 4))
    loss, _ = linear_loss_of(head)(hidden, targets, torch.tensor(targets.numel()))
    loss.backward()
    (expected,) = torch.autograd.grad(repeated_cross_entropy(head(hidden), targets) / targets.numel(), hidden)
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def test_an_output_layer_that_does_more_is_refused():
    muse = importlib.import_module("torchtitan.models.muse_glimmer.config_registry").muse_glimmer_debugmodel()
    for head, what in ((lora_head(), "LoRALinear"), (muse.model_spec.model.lm_head.build(), "SoftCappedLinear")):
        with pytest.raises(TypeError, match=rf"lm_head: expected a torch.nn.Linear .*{what} with a forward of its own"):
            linear_loss_of(head)
    with pytest.raises(TypeError, match=r"got a torch\.nn\.modules\.container\.Sequential; ChunkedLossWrapper"):
        linear_loss_of(nn.Sequential(nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)))

    head, batch = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE), (torch.randn(2, 8, HIDDEN_SIZE), random_targets(2, 8, 4))
    loss_fn = linear_loss_of(head)
    hook = head.register_forward_hook(lambda module, inputs, output: 2 * output)  # it would double the loss
    with pytest.raises(TypeError, match=r"got a .*Linear with forward_hooks"):
        loss_fn(*batch)
    hook.remove()
    head.forward = lambda hidden: 2 * F.linear(hidden, head.weight)
    with pytest.raises(TypeError, match=r"got a .*Linear with a forward of its own"):
        loss_fn(*batch)
    with pytest.raises(ValueError, match=r"labels: expected the rows of pred, \(2, 8\), .* got \(2, 32\)"):
        linear_loss_of(nn.Linear(HIDDEN_SIZE, VOCAB_SIZE))(batch[0], random_targets(2, 32))
    cut = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)
    cut.weight = nn.Parameter(cut.weight[:40])  # as TorchTitan's spmd_types cut it
    with pytest.raises(ValueError, match=r"tensor_parallel_degree: expected 1, .* got 40 of its 60 rows"):
        linear_loss_of(cut)(*batch)
    assert "forward" not in vars(cut)


def test_the_embedding_averages_patches_and_nothing_else():
    embedding = PatchEmbedding.Config(num_embeddings=VOCAB_SIZE, embedding_dim=HIDDEN_SIZE).build()
    tokens = torch.randint(VOCAB_SIZE, (2, 8, 4))
    expected = F.embedding(tokens, embedding.weight).mean(2)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(embedding(tokens), expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, embedding.weight, upstream)[0] for out in (embedding(tokens), expected))
    )
    assert torch.equal(embedding(tokens.flatten(1)), F.embedding(tokens.flatten(1), embedding.weight))
    embedding.tp_group = object()
    with pytest.raises(ValueError, match="tensor_parallel_degree: expected 1"):
        embedding(tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_built_and_initialised_as_torchtitans(tied):
    def built(config):
        config = dataclasses.replace(config, layers=config.layers[:1], enable_weight_tying=tied)
        with torch.device("meta"):
            model = config.build()
        model.verify_module_protocol()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
            torch.manual_seed(3)
            model.init_weights(buffer_device=None)
        return model

    plain = llama3_debugmodel()
    patched = with_patches(plain, PatchSchedule([(4, 10)])).model_spec.model
    ours, own = built(patched), built(plain.model_spec.model)
    assert type(ours.tok_embeddings) is PatchEmbedding
    assert ours.state_dict().keys() == own.state_dict().keys()
    for name, value in own.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_recipe_is_left_as_it_was():
    config = llama3_debugmodel()
    before = config.to_dict()
    ours = with_patches(config, PatchSchedule([(4, 3), ((1,), 10)]))
    assert config.to_dict() == before
    assert ours.patches == [(4, 3), (1, 10)]
    changed = {name for name, value in ours.to_dict().items() if before.get(name) != value}
    assert changed <= {"patches", "loss", "model_spec"}  # the last two hold classes by name
    json.dumps(ours.to_dict())


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ("llama3.llama3_debugmodel", None),
        ("qwen3.qwen3_debugmodel", None),
        ("gpt_oss.gpt_oss_debugmodel", None),
        ("deepseek_v3.deepseek_v3_debugmodel", None),
        ("muse_glimmer.muse_glimmer_debugmodel", "model: expected a decoder whose forward"),
        ("deepseek_v3.deepseek_v3_debugmodel_mtp", "model: expected a decoder whose forward"),
    ],
)
def test_models_that_do_more_with_their_tokens_are_refused(recipe, error):
    module, name = recipe.split(".")
    config = getattr(importlib.import_module(f"torchtitan.models.{module}.config_registry"), name)()
    schedule = PatchSchedule([(4, config.training.steps)])
    if error is None:
        assert type(with_patches(config, schedule).model_spec.model.tok_embeddings) is PatchEmbedding.Config
    else:
        with pytest.raises(ValueError, match=error):
            with_patches(config, schedule)


def test_what_a_config_cannot_have():
    def patched(schedule=((4, 5), (1, 10)), **changes):
        config = llama3_debugmodel()
        for path, value in changes.items():
            section, _, name = path.partition("__")
            if name:
                setattr(getattr(config, section), name, value)
            else:
                setattr(config, section, value)
        return with_patches(config, PatchSchedule(schedule))

    with pytest.raises(ValueError, match=r"patches: expected stages up to training\.steps, 10, got 9"):
        patched(((4, 9),))
    with pytest.raises(ValueError, match=r"patches: expected one axis, as text has, got \(2, 2\)"):
        patched((((2, 2), 10),))
    with pytest.raises(ValueError, match=r"patches: .* divide training.seq_len, 2048, .* 8 chunks, got 512"):
        patched(((512, 10),))
    for name in ("tensor", "context", "pipeline"):
        with pytest.raises(ValueError, match=f"parallelism.{name}_parallel_degree: expected 1 .* got 2"):
            patched(**{f"parallelism__{name}_parallel_degree": 2, "training__disable_cuda_graphs": True})
    with pytest.raises(ValueError, match=r"parallelism\.spmd_backend: expected spmd_types or partial_dtensor"):
        patched(parallelism__spmd_backend="full_dtensor")
    with pytest.raises(ValueError, match=r"debug\.spmd_typechecking: expected False"):
        patched(debug__spmd_typechecking=True, activation_checkpoint=None)
    with pytest.raises(TypeError, match=r"loss: expected a CrossEntropyLoss\.Config, chunked or not"):
        patched(loss=ChunkedLossWrapper.Config(loss_fn=PatchLoss.Config()))
    with pytest.raises(TypeError, match=r"config: expected a torchtitan.trainer.Trainer.Config, got PatchTrainer"):
        with_patches(patched(), PatchSchedule([(1, 10)]))
    with pytest.raises(ValueError, match="config: expected a model_spec, got None"):
        with_patches(Trainer.Config(), PatchSchedule([(1, 10)]))

    scaled = llama3_debugmodel()
    values = {
        field.name: getattr(scaled.model_spec.model.tok_embeddings, field.name)
        for field in dataclasses.fields(scaled.model_spec.model.tok_embeddings)
    }
    scaled.model_spec.model.tok_embeddings = PatchEmbedding.Config(**values)  # any class but TorchTitan's own
    with pytest.raises(TypeError, match=r"model\.tok_embeddings: expected an Embedding\.Config, got PatchEmbedding"):
        with_patches(scaled, PatchSchedule([(1, 10)]))


def test_the_command_line_changes_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "patch_recipes.py").write_text(
        "from npp_kernels import PatchSchedule\n"
        "from npp_kernels.integrations.torchtitan import LinearPatchLoss, with_patches\n"
        "from torchtitan.models.llama3.config_registry import llama3_debugmodel\n"
        "def patches():\n"
        "    return with_patches(llama3_debugmodel(), PatchSchedule([(4, 5), (1, 10)]))\n"
        "def linear_loss():\n"
        "    config = llama3_debugmodel()\n"
        "    config.loss = LinearPatchLoss.Config()\n"
        "    return with_patches(config, PatchSchedule([(512, 10)]))\n"  # as many as have no chunk of 8 each
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = ["--module", "patch_recipes", "--config", "patches"]
    assert ConfigManager().parse_args(recipe).patches == [(4, 5), (1, 10)]
    longer = [*recipe, "--training.steps", "20", "--patches", "8", "6", "1", "20"]
    config = ConfigManager().parse_args(longer)
    assert isinstance(config, PatchTrainer.Config)
    assert config.patches == [(8, 6), (1, 20)]
    assert type(config.loss.loss_fn) is PatchLoss.Config
    config = ConfigManager().parse_args(["--module", "patch_recipes", "--config", "linear_loss"])
    assert config.loss == LinearPatchLoss.Config(chunk_rows=None)
    recipe[-1] = "linear_loss"
    assert ConfigManager().parse_args([*recipe, "--loss.chunk_rows", "512"]).loss.chunk_rows == 512


def test_inputs_that_cannot_be_grouped_are_refused():
    tokens = torch.randint(VOCAB_SIZE, (2, 9))
    batch = {"input": tokens[:, :-1], "pixel_values": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"inputs: expected input and positions, .* got pixel_values as well"):
        group_batch(batch, tokens[:, 1:], 4)
    inputs, labels = group_batch(batch, tokens[:, 1:], 1)
    assert inputs is batch
    assert torch.equal(labels, tokens[:, 1:])
    inputs, _ = group_batch({"input": tokens[:, :-1]}, tokens[:, 1:], 4)
    assert inputs.keys() == {"input"}


def trained(scenarios, results, *, ranks=1, device_count=""):
    """Run scenarios of `torchtitan_runs` on some ranks, and return the results."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {
        **environment(), "CUDA_VISIBLE_DEVICES": device_count, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
        "MASTER_PORT": port, "PYTHONWARNINGS": "default",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.rank", "tests.torchtitan_runs", ",".join(scenarios), str(results)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors[-3000:]
    return torch.load(results, weights_only=True)


def trained_once(tmp_path_factory, scenarios, ranks):
    """Return the results of scenarios, run by the first of pytest's workers that asks for them."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # what all workers see
    results = folder / f"torchtitan-{ranks}.pt"
    with FileLock(f"{results}.lock"):
        return torch.load(results, weights_only=True) if results.exists() else trained(scenarios, results, ranks=ranks)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    scenarios = [
        "loader", "against_plain", "against_reference", "chunks", "linear_loss", "linear_loss_sharded", "resumed",
        "validated", "graphs",
    ]  # fmt: skip
    return trained_once(tmp_path_factory, scenarios, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    scenarios = ["against_plain", "against_reference", "linear_loss", "linear_loss_sharded", "linear_loss_of_a_slice"]
    return trained_once(tmp_path_factory, scenarios, ranks=2)


@pytest.fixture(params=["one_rank", "two_ranks"])
def results(request):
    return request.getfixturevalue(request.param)


def logged(run, name="loss"):
    return torch.tensor([values[name] for values in run["steps"].values()], dtype=torch.float64)


def assert_same_run(ours, other):
    """Assert that two runs from the same weights, in fp32, went the same way but for rounding."""
    for name, value in other["first"].items():
        assert torch.equal(ours["first"][name], value)
    assert ours["steps"].keys() == other["steps"].keys()
    for name in ("loss", "max_loss", "grad_norm", "lr/AdamW", "n_tokens_seen"):
        torch.testing.assert_close(logged(ours, name), logged(other, name), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours["last"], other["last"], rtol=1e-5, atol=1e-5)
    assert max((ours["last"][name] - value).abs().max() for name, value in ours["first"].items()) > 5e-3


def test_a_hundred_steps_of_single_tokens_are_torchtitans(results):
    ours, plain = results["against_plain"]["ours"], results["against_plain"]["plain"]
    assert len(ours["steps"]) == 100
    assert logged(ours)[-1] < logged(ours)[0] - 0.5
    assert_same_run(ours, plain)


def test_patches_then_tokens_are_what_plain_torch_does(results):
    # Document by document, without packing, masks or chunks; two micro-batches a step, over the targets of all ranks.
    ours, losses = results["against_reference"]["ours"], results["against_reference"]["losses"]
    expected = torch.tensor(list(losses.values()), dtype=torch.float64)
    assert len(expected) == 30
    assert expected[-1] < expected[0] - 0.3
    torch.testing.assert_close(logged(ours), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours["last"], results["against_reference"]["last"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["own", "patches", "tied"])
def test_runs_with_output_layer_and_loss_in_one_are_those_in_chunks(results, recipe):
    ours, chunked = results["linear_loss"][recipe]["ours"], results["linear_loss"][recipe]["chunked"]
    assert len(ours["steps"]) == 12
    assert_same_run(ours, chunked)
    assert list(ours["validation"]) == ([1, 3, 6, 9, 12] if recipe == "patches" else [])
    for step, loss in chunked["validation"].items():
        assert ours["validation"][step] == pytest.approx(loss, rel=1e-6)


def test_output_layer_and_loss_in_one_under_fsdp_alone(results):
    found = results["linear_loss_sharded"]
    torch.testing.assert_close(found["ours"], found["expected"])
    assert found["sharded_after"] == [True, True]  # the backward, and a loss without one


def test_output_layer_and_loss_in_one_refuse_tensor_parallelism(two_ranks):
    assert "tensor_parallel_degree: expected 1, " in two_ranks["linear_loss_of_a_slice"]["error"]


def test_operations_are_counted_by_the_stage(one_rank):
    flops = [int(value) for value in logged(one_rank["against_reference"]["ours"], "flops_per_token")]
    plain = int(logged(one_rank["against_plain"]["plain"], "flops_per_token")[0])
    assert flops[20:] == [plain] * 10  # TorchTitan's own count
    assert flops[:20] == [flops[0]] * 20
    assert 0.9 * plain < 4 * flops[0] < plain  # a fourth of the rows, which attend to fewer


def test_the_loaders_labels_are_shifted_inside_each_document(one_rank):
    inputs, labels = one_rank["loader"]["batch"]
    stream = [
        (place, *pair)
        for document in one_rank["loader"]["documents"]
        for place, pair in enumerate(itertools.pairwise(document))
    ]
    length = labels.shape[1]
    for row in range(len(labels)):
        places, tokens, following = zip(*stream[row * length : (row + 1) * length], strict=True)
        assert inputs["input"][row].tolist() == list(tokens)
        assert labels[row].tolist() == list(following)
        starts = [index for index, place in enumerate(places) if place == 0]
        assert (inputs["positions"][row] == 0).nonzero().flatten().tolist() == sorted({0, *starts})


def test_chunks_do_not_change_the_run(one_rank):
    for chunks in (8, 2):
        assert_same_run(one_rank["chunks"][chunks], one_rank["chunks"][0])


def test_a_run_goes_on_inside_either_stage(one_rank):
    once, parts = one_rank["resumed"]["once"], one_rank["resumed"]["parts"]
    assert [list(part["steps"]) for part in parts] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14]]
    assert torch.equal(torch.cat([logged(part) for part in parts]), logged(once))
    for name, value in once["last"].items():
        assert torch.equal(parts[-1]["last"][name], value)


def test_validation_is_on_single_tokens(one_rank):
    ours, expected = one_rank["validated"]["ours"], one_rank["validated"]["expected"]
    assert ours["validation"][7] == pytest.approx(expected, rel=1e-6)


def test_a_stage_begins_its_own_cuda_graph(one_rank):
    # Under the check that TorchTitan does before a replay; the graphs themselves need a GPU, below.
    events = one_rank["graphs"]["events"]
    assert events == ["wrapped", "torn down", "wrapped", "torn down", "wrapped", "torn down"]
    assert len(one_rank["graphs"]["ours"]["steps"]) == 8
    assert "CUDA graph tensor inputs must keep the same shape" in one_rank["graphs"]["without"]


@pytest.mark.gpu
def test_cuda_graphs_over_a_stages_end(tmp_path):
    results = trained(["graphs_on_gpu"], tmp_path / "gpu.pt", device_count=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    for runs in results["graphs_on_gpu"].values():
        graphs, eager = runs[False], runs[True]
        torch.testing.assert_close(logged(graphs), logged(eager), rtol=1e-3, atol=1e-3)  # in bf16
        assert graphs["validation"].keys() == eager["validation"].keys() == {1, 3, 6, 9, 12}
        for step, loss in eager["validation"].items():
            assert graphs["validation"][step] == pytest.approx(loss, rel=1e-3)


@pytest.mark.gpu
def test_memory_of_output_layer_and_loss_in_one():
    rows, vocab_size, hidden_size, chunk_rows = 8192, 32768, 1024, 1024
    like = {"device": "cuda", "dtype": torch.bfloat16}
    head = nn.Linear(hidden_size, vocab_size, bias=False, **like)
    hidden = torch.randn(4, rows // 4, hidden_size, **like, requires_grad=True)
    targets = torch.randint(vocab_size, (4, rows // 4, 4), device="cuda")
    count = torch.tensor(targets.numel(), device="cuda")

    def peak_bytes(loss_fn):
        loss_fn.set_lm_head(head)
        for _ in range(2):  # the first compiles
            hidden.grad = head.weight.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss_fn(hidden, targets, count)[0].backward()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    chunked = peak_bytes(ChunkedLossWrapper.Config(num_chunks=rows // chunk_rows, loss_fn=PatchLoss.Config()).build())
    linear = peak_bytes(LinearPatchLoss.Config(chunk_rows=chunk_rows).build())
    weights, chunk = vocab_size * hidden_size, chunk_rows * (2 * vocab_size + 6 * hidden_size)
    by_formula = 2 * rows * hidden_size + max(6 * weights, 4 * weights + chunk)
    assert linear < 1.05 * by_formula < chunked


EXAMPLE = """
import torch
from examples import torchtitan_bags as example

torch.compiler.set_stance("force_eager")  # compiling the mask takes longer than these steps
example.STEPS = 8
example.main()
"""


def test_the_example_prints_both_runs():
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE],
        cwd=ROOT, env={**environment(), "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "patch", "loss", "on", "single", "tokens", "plain", "run"]
    assert [line.split()[:2] for line in lines[1:6]] == [["1", "4"], ["2", "4"], ["4", "4"], ["6", "1"], ["8", "1"]]
    assert lines[6].endswith("0.625 of the positions")
