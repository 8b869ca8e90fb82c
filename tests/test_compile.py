"""torch.compile, CUDA graphs, autocast and activation checkpointing around the operations."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import npp_kernels
from npp_kernels.embeddings import group_mean, mean_kernels, patch_mean, segments, table_gradient

OPTIONS = [
    {},
    {"reduction": "none"},
    {"normalize": "row", "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
    {"normalize": "slot", "slot_weights": (1.0, 0.5, 0.25, 2.0)},
    {"num_targets": 30},
    {"reduction": "none", "token_scaling": True},
]


def step(table, head, groups, **options):
    """Use every operation once, as a model would."""
    hidden = npp_kernels.group_mean(table, groups)
    hidden = hidden + npp_kernels.patch_mean(hidden, (2,)).repeat_interleave(2, 1)
    fused, stats = npp_kernels.linear_patch_cross_entropy(
        hidden, head, groups, chunk_rows=5, return_stats=True, **options
    )
    loss = npp_kernels.patch_cross_entropy(hidden @ head.t(), groups, inplace_backward=True, **options)
    return fused.mean() + loss.mean(), stats.lse


def gradients(function, table, head, groups, **options):
    table, head = table.clone().requires_grad_(), head.clone().requires_grad_()
    loss, lse = function(table, head, groups, **options)
    (2 * loss).backward()
    return loss, lse, table.grad, head.grad


def make_inputs(device):
    tokens = torch.randint(64, (2, 24), device=device)
    return (
        torch.randn(64, 16, device=device),
        torch.randn(64, 16, device=device),
        npp_kernels.group_tokens(tokens, (4,)),
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fullgraph_on_the_cpu(options):
    torch._dynamo.reset()
    inputs = make_inputs("cpu")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        gradients(compiled, *inputs, **options), gradients(step, *inputs, **options), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wants", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize(("per_target", "stats", "token_scaling"), [(False, False, False), (True, True, True)])
def test_the_operators_in_compiled_code_are_what_they_say(wants, per_target, stats, token_scaling, device):
    """They stand for the two halves of the loss: pure, all written, and of the shapes that they promise."""
    hidden, weight = (torch.randn(rows, 32, device=device) for rows in (20, 64))
    bias, groups = torch.randn(64, device=device), torch.randint(64, (20, 3), device=device)
    class_weight, totals = torch.rand(65, device=device), torch.ones(2, 4, device=device)
    settings = (-100, "target", 0.1, 0.01, 5.0, token_scaling)
    call = (
        hidden,
        weight,
        bias,
        groups,
        None,
        class_weight,
        totals,
        *settings,
        None,
        0,
        "",
        torch.float32,
        6,
        list(wants),
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.npp_kernels.linear_loss, (*call, per_target, stats), test_utils=checks)
    found = torch.ops.npp_kernels.linear_loss(*call, per_target, stats)
    assert len(found) == 1 + per_target + stats + token_scaling + sum(wants)
    again = torch.ops.npp_kernels.linear_loss(*call, per_target, stats)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    probabilities = found[1 + per_target] if token_scaling else None
    for upstream in (torch.tensor(2.0, device=device), torch.rand(20, 3, device=device)):
        arguments = (*call, found[0], probabilities, upstream)
        torch.library.opcheck(torch.ops.npp_kernels.linear_gradients, arguments, test_utils=checks)
        assert len(torch.ops.npp_kernels.linear_gradients(*arguments)) == sum(wants)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_that_change_on_the_cpu(dynamic, reduction):
    """One code for any number of rows, and of chunks: torch.compile gives up after eight."""

    def losses(table, head, groups):
        hidden = npp_kernels.group_mean(table, groups)
        fused = npp_kernels.linear_patch_cross_entropy(
            hidden, head, groups, label_smoothing=0.1, chunk_rows=3, reduction=reduction
        ).sum()
        loss = npp_kernels.patch_cross_entropy(hidden @ head.t(), groups, softcap=5.0, reduction=reduction).sum()
        return fused + loss, fused.detach()

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    table, head, _ = make_inputs("cpu")
    for length in range(8, 48, 4):
        groups = npp_kernels.group_tokens(torch.randint(64, (2, length)), (4,))
        for actual, expected in zip(
            gradients(compiled, table, head, groups), gradients(losses, table, head, groups), strict=True
        ):
            torch.testing.assert_close(actual, expected)


def mean_of(ignore_index=None, out_dtype=None):
    return lambda x, groups: npp_kernels.group_mean(x, groups % 12, ignore_index=ignore_index, out_dtype=out_dtype)


RESULTS = {
    "means": mean_of(),
    "means of one": lambda x, groups: npp_kernels.group_mean(x, groups[:, :1] % 12),
    "means, some ignored": mean_of(ignore_index=3),
    "means in fp32": mean_of(out_dtype=torch.float32),
    "patch means": lambda x, groups: npp_kernels.patch_mean(x[None], (2,)),
    "losses": lambda x, groups: npp_kernels.patch_cross_entropy(x, groups, reduction="none"),
    "scaled losses": lambda x, groups: npp_kernels.patch_cross_entropy(x, groups, reduction="none", token_scaling=True),
    "loss and statistics": lambda x, groups: npp_kernels.patch_cross_entropy(x, groups, return_stats=True)[0],
    "linear losses": lambda x, groups: npp_kernels.linear_patch_cross_entropy(x, x, groups % 12, reduction="none"),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_in_compiled_code(dtype, name):
    torch._dynamo.reset()
    x, groups = torch.randn(12, 64, dtype=dtype), torch.randint(64, (12, 4))
    grads = []
    for function in (RESULTS[name], torch.compile(RESULTS[name], backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        function(leaf, groups).float().square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13", reason="older graphs also return what is in between"
)
@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_result_is_what_one_operation_returned(dtype, name):
    """PyTorch 2.11 loses its gradient where a second did too: one in place, or a conversion to the same dtype."""
    torch._dynamo.reset()
    recorded = torch._dynamo.testing.EagerAndRecordGraphs()
    x, groups = torch.randn(12, 64, dtype=dtype, requires_grad=True), torch.randint(64, (12, 4))
    torch.compile(RESULTS[name], backend=recorded, fullgraph=True)(x, groups)
    bodies = [body for graph in recorded.graphs for key, body in graph.named_children() if key.startswith("fwd_body")]
    assert bodies or name == "linear losses"  # an operator, which is not looked into
    for body in bodies:
        nodes = list(body.graph.nodes)
        for result in nodes[-1].args[0][0]:
            value = result.meta["example_value"]
            assert [node for node in nodes if node.meta.get("example_value") is value] == [result]


@pytest.mark.parametrize("numbers", [(2, 3, 8, 5, 7, 11, 13, 17, 19, 23), (200, 300, 250, 500, 1000, 2000)])
def test_what_launches_kernels_takes_no_size_as_a_constant(numbers, monkeypatch):
    """Where it does, code is compiled for each number of groups, and PyTorch 2.11 cannot trace it a second time."""
    for module in (mean_kernels, table_gradient, segments, patch_mean):  # no kernel runs: what is traced is around them
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    for module in (group_mean, patch_mean):
        monkeypatch.setattr(module, "runs_kernels", lambda _: True)

    def means(table, groups):
        return npp_kernels.patch_mean(npp_kernels.group_mean(table, groups, ignore_index=3)[None], (2,)).sum()

    torch._dynamo.reset()
    compiled_frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(means, fullgraph=True, backend=compiled_frames)
    table = torch.randn(64, 16, requires_grad=True)
    for number in numbers:
        compiled(table, torch.zeros(2 * number, 4, dtype=torch.int64)).backward()
    assert compiled_frames.frame_count <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fullgraph_on_a_gpu(options):
    torch._dynamo.reset()
    inputs = make_inputs("cuda")
    before = [tensor.clone() for tensor in inputs]
    compiled = torch.compile(step, fullgraph=True)
    for actual, expected in zip(
        gradients(compiled, *inputs, **options), gradients(step, *inputs, **options), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # A kernel's input that the compiler takes for written to would be overwritten, at worst, after the step.
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(inputs, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cuda_graph_captures_forward_and_backward(options):
    table, head, groups = make_inputs("cuda")
    table.requires_grad_()
    head.requires_grad_()
    if "slot_weights" in options:
        options = {**options, "slot_weights": torch.tensor(options["slot_weights"], device="cuda")}

    def run():
        table.grad = head.grad = None
        loss, _ = step(table, head, groups, **options)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = run()
    static = loss, table.grad, head.grad
    with torch.no_grad():
        table.mul_(0.5)
        groups.copy_(groups.flip(0))
    graph.replay()
    replayed = [tensor.clone() for tensor in static]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(), table.grad, head.grad
    torch.cuda.synchronize()
    for actual, value in zip(replayed, expected, strict=True):
        assert torch.equal(actual, value)


def large_step(table, head, groups):
    """Score as many rows as exponentials take the place of logits for, where the GPU can do that."""
    loss = npp_kernels.linear_patch_cross_entropy(npp_kernels.group_mean(table, groups), head, groups, chunk_rows=4096)
    return loss, loss.detach()


def make_large_inputs(device):
    table, head = (torch.randn(4096, 64, device=device).to(torch.bfloat16) for _ in range(2))
    return table, head, torch.randint(4096, (4100, 2), device=device)


@pytest.mark.gpu
def test_cuda_graph_of_many_rows():
    table, head, groups = make_large_inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(large_step, table, head, groups)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients(large_step, table, head, groups)
    table.mul_(0.5)
    groups.copy_(groups.flip(0))
    graph.replay()
    for actual, expected in zip(captured, gradients(large_step, table, head, groups), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
def test_many_rows_under_autocast_and_compiled():
    """From fp32 weights in autocast, and inside a compiled function."""
    table, head, groups = make_large_inputs("cuda")
    expected = gradients(large_step, table, head, groups)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        autocast = gradients(large_step, table.float(), head.float(), groups)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(large_step, fullgraph=True), table, head, groups)
    for others in (autocast, compiled):
        for actual, value in zip(others, expected, strict=True):
            assert (actual.float() - value.float()).norm() <= 0.02 * value.float().norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_host_synchronisation():
    table, head, groups = make_inputs("cuda")
    many = make_large_inputs("cuda")
    gradients(step, table, head, groups)
    gradients(large_step, *many)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in OPTIONS:
            gradients(step, table, head, groups, **{k: v for k, v in options.items() if k != "slot_weights"})
        gradients(large_step, *many)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_activation_checkpointing(device):
    table, head, groups = make_inputs(device)
    plain = gradients(step, table, head, groups)
    kept = gradients(lambda *a: checkpoint(step, *a, use_reentrant=False), table, head, groups)
    for actual, expected in zip(kept, plain, strict=True):
        assert torch.equal(actual, expected)


def test_autocast_leaves_the_loss_in_fp32(device):
    table, head, groups = make_inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss, lse = step(table.requires_grad_(), head.requires_grad_(), groups)
    loss.backward()
    assert loss.dtype == lse.dtype == table.grad.dtype == head.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    inputs = make_inputs("cuda:1")
    assert gradients(step, *inputs)[0].device.index == 1
