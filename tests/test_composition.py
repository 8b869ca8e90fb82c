"""The operations inside what training is made of: autocast, loss scaling, hooks, shared and frozen weights, export,
threads, processes, streams and several GPUs. What torch.compile and CUDA graphs do is in `test_compile.py`."""

import itertools
import multiprocessing
import threading

import pytest
import torch
from torch import nn

import npp_kernels
from tests.conftest import INTERPRETED

VOCAB, WIDTH = 40, 16


class Model(nn.Module):
    """Every operation once, with the output layer's weight that of the embedding where it is tied."""

    def __init__(self, *, tied=False, reduction="mean"):
        super().__init__()
        self.embedding = npp_kernels.PatchEmbedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.linear_loss = npp_kernels.LinearPatchCrossEntropyLoss(chunk_rows=3, reduction=reduction)
        self.loss = npp_kernels.PatchCrossEntropyLoss(reduction=reduction)

    def forward(self, groups):
        inputs = self.embedding(groups[:, :-1])
        hidden = torch.tanh(self.body(inputs + npp_kernels.patch_mean(inputs, (1,))))
        pooled = torch.tanh(self.body(npp_kernels.patch_mean(inputs, (2,))))
        targets = groups[:, 1:]
        fused = self.linear_loss(hidden, self.head.weight, targets, bias=self.head.bias)
        return fused.mean() + self.loss(self.head(pooled), targets[:, ::2]).mean()


def make_groups(device, batch=2):
    return npp_kernels.group_tokens(torch.randint(VOCAB, (batch, 20), device=device), (4,))


def gradients(model, groups, **autocast):
    model.zero_grad()
    with torch.autocast(groups.device.type, **autocast) if autocast else torch.enable_grad():
        loss = model(groups)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "bias_dtype"),
    list(itertools.product([torch.float32, torch.float16, torch.bfloat16], repeat=3)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_autocast_takes_any_mix_of_dtypes(device, autocast, hidden_dtype, weight_dtype, bias_dtype):
    """Each gradient in its tensor's dtype, the loss in fp32, and near to the loss of the same numbers in fp32."""
    if INTERPRETED and autocast == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16")
    hidden = torch.randn(6, 8, device=device).to(hidden_dtype).requires_grad_()
    weight = torch.randn(20, 8, device=device).to(weight_dtype).requires_grad_()
    bias = torch.randn(20, device=device).to(bias_dtype).requires_grad_()
    groups = torch.randint(20, (6, 3), device=device)
    with torch.autocast(device.type, dtype=autocast):
        loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, bias=bias, chunk_rows=4)
        outside = npp_kernels.patch_cross_entropy(nn.functional.linear(hidden, weight, bias), groups)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype == outside.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [hidden_dtype, weight_dtype, bias_dtype]
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = npp_kernels.linear_patch_cross_entropy(wide[0], wide[1], groups, bias=wide[2])
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(outside, exact, rtol=0.02, atol=0.02)
    for grad, other in zip(grads, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(grad.float(), other, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_of_a_whole_model(device, reduction):
    if INTERPRETED:
        pytest.skip("the interpreter truncates bfloat16")
    model, groups = Model(reduction=reduction).to(device), make_groups(device)
    loss, plain = gradients(model, groups)
    for off_inside in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16), torch.autocast(device.type, enabled=not off_inside):
            other = model(groups)
        model.zero_grad()
        other.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert other.dtype == torch.float32
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        tolerance = 1e-6 if off_inside else 0.05
        torch.testing.assert_close(other, loss, rtol=tolerance, atol=0)
        for name, grad in grads.items():
            assert (grad - plain[name]).norm() <= tolerance * plain[name].norm() + 1e-7, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_scaling_in_float16(device, reduction):
    """What the scaler multiplies and divides by is gone from the gradients; an overflow skips the step, and no more."""
    model, groups = Model(reduction=reduction).to(device), make_groups(device)
    _, plain = gradients(model, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, growth_interval=1)
    model.zero_grad()
    with torch.autocast(device.type, dtype=torch.float16):
        loss = model(groups)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - plain[name]).norm() <= 0.01 * plain[name].norm() + 1e-6, name
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**13
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.update(new_scale=2.0**40)
    with torch.autocast(device.type, dtype=torch.float16):
        loss = model(groups)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_go_through_hooks(device, reduction):
    """What is kept for a backward may be packed away, and its copy comes back, as activation offloading has it."""
    model, groups = Model(reduction=reduction).to(device), make_groups(device)
    expected = gradients(model, groups)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().cpu().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(device)):
        found = gradients(model, groups)
    assert packed
    torch.testing.assert_close(found, expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(model, groups), expected)


def test_hooks_on_parameters_and_inputs(device):
    """Hooks see each gradient once, may change it, and one after accumulation may use it up."""
    model, groups = Model().to(device), make_groups(device)
    _, plain = gradients(model, groups)
    calls, stepped = [], []
    handles = [
        model.head.weight.register_hook(lambda grad: calls.append(1) or 2 * grad),
        model.embedding.weight.register_post_accumulate_grad_hook(
            lambda parameter: stepped.append(parameter.grad.clone()) or setattr(parameter, "grad", None)
        ),
        model.body.register_full_backward_hook(lambda *_: calls.append(2)),
    ]
    _, grads = gradients(model, groups)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == [1, 2, 2]  # the body is called twice
    torch.testing.assert_close(grads["head.weight"], 2 * plain["head.weight"])
    assert grads["embedding.weight"] is None
    torch.testing.assert_close(stepped, [plain["embedding.weight"]])


def test_tied_weights_get_the_sum_of_both_gradients(device):
    model, groups = Model(tied=True).to(device), make_groups(device)
    loss, grads = gradients(model, groups)
    split = Model().to(device)
    split.load_state_dict(model.state_dict() | {"head.bias": torch.zeros(VOCAB, device=device)})
    other, apart = gradients(split, groups)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(grads["embedding.weight"], apart["embedding.weight"] + apart["head.weight"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_that_nobody_wants_costs_no_product(device, reduction, monkeypatch):
    """One product less for a frozen output layer, one less for frozen hidden states, one alone where all is frozen."""
    products = []
    for name in ("mm", "addmm", "matmul"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: products.append(1) or original(*a, **k))
    for name in ("__matmul__", "addmm_"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, original=original, **k: products.append(1) or original(*a, **k)
        )
    groups = torch.randint(20, (6, 3), device=device)
    counts = {}
    for wanted in itertools.product([False, True], repeat=2):
        hidden, weight = torch.randn(6, 8, device=device), torch.randn(20, 8, device=device)
        hidden.requires_grad_(wanted[0])
        weight.requires_grad_(wanted[1])
        products.clear()
        loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, reduction=reduction).sum()
        if any(wanted):
            loss.backward()
        counts[wanted] = len(products)
    recomputed = int(reduction == "none")  # logits, which were not kept
    assert counts[False, False] == 1
    assert counts[True, False] == counts[False, True] == 2 + recomputed
    assert counts[True, True] == 3 + recomputed


def test_a_frozen_table_sorts_nothing(device, monkeypatch):
    groups = torch.randint(20, (6, 3), device=device)
    table, scale = torch.randn(20, 8, device=device), torch.ones(8, device=device, requires_grad=True)
    monkeypatch.setattr(npp_kernels.embeddings.group_mean, "launch_table_gradient", None)  # a call would fail
    monkeypatch.setattr(npp_kernels.embeddings.group_mean, "torch_table_gradient", None)
    (npp_kernels.group_mean(table, groups) * scale).sum().backward()
    assert scale.grad is not None


def test_frozen_parts_of_a_model(device):
    model, groups = Model().to(device), make_groups(device)
    _, plain = gradients(model, groups)
    for frozen in ("embedding", "head", "body"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        _, grads = gradients(model, groups)
        for name, grad in grads.items():
            if name.startswith(frozen):
                assert grad is None
            else:
                torch.testing.assert_close(grad, plain[name])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches(device, reduction):
    """A rank without data: a loss of 0, gradients of 0 for every parameter, and none missing."""
    model = Model(reduction="mean" if reduction == "none" else reduction).to(device)
    loss, grads = gradients(model, make_groups(device, batch=0))
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())
    with torch.no_grad():
        assert model(make_groups(device, batch=0)) == 0


def test_inference_mode_and_no_grad(device):
    model, groups = Model().to(device), make_groups(device)
    expected = model(groups).detach()
    with torch.no_grad():
        assert torch.equal(model(groups), expected)
    with torch.inference_mode():
        assert torch.equal(model(groups), expected)
    assert torch.equal(model(groups).detach(), expected)  # what inference kept does not spoil training


def test_gradient_accumulation_is_one_large_batch(device):
    """The divisor of the whole batch, in each of its parts."""
    hidden = torch.randn(12, WIDTH, device=device)
    weight = torch.randn(VOCAB, WIDTH, device=device, requires_grad=True)
    groups = torch.randint(VOCAB, (12, 4), device=device)
    groups[torch.rand(12, 4, device=device) < 0.4] = -100
    npp_kernels.linear_patch_cross_entropy(hidden, weight, groups).backward()
    whole, weight.grad = weight.grad, None
    count = (groups != -100).sum()
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        npp_kernels.linear_patch_cross_entropy(hidden[part], weight, groups[part], num_targets=count).backward()
    torch.testing.assert_close(weight.grad, whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export():
    """torch.export keeps the forward as a program of its own, which gives the same numbers for other batches."""
    if INTERPRETED:
        pytest.skip("export traces the kernels, which the interpreter has none of")
    model, groups = Model(), make_groups("cpu")
    batch = torch.export.Dim("batch", min=1, max=64)
    for dynamic_shapes in (None, ({0: batch},)):
        program = torch.export.export(model, (groups,), dynamic_shapes=dynamic_shapes, strict=True)
        assert torch.equal(program.module()(groups), model(groups))
    larger = make_groups("cpu", batch=5)
    torch.testing.assert_close(program.module()(larger), model(larger))


def test_threads(device):
    """Calls of several threads at once, each with its own options, do not disturb each other."""
    if INTERPRETED:
        pytest.skip("the interpreter patches Triton's language for the whole process while a kernel runs")
    cases = [{}, {"reduction": "none"}, {"slot_weights": [1.0, 0.5, 0.25, 2.0]}, {"label_smoothing": 0.1}]
    hidden, weight = torch.randn(12, WIDTH, device=device), torch.randn(VOCAB, WIDTH, device=device)
    groups = torch.randint(VOCAB, (12, 4), device=device)

    def run(options):
        leaf = weight.clone().requires_grad_()
        loss = npp_kernels.linear_patch_cross_entropy(hidden, leaf, groups, chunk_rows=5, **options).sum()
        mean = npp_kernels.group_mean(leaf, groups).sum()
        return torch.autograd.grad(loss + mean, leaf)[0]

    expected = [run(options) for options in cases]
    results, errors = [[] for _ in cases], []

    def work(index):
        try:
            results[index] = [run(cases[index]) for _ in range(20)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for found, value in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(one, value) for one in found)


def _in_another_process(queue, groups, state):
    torch.set_num_threads(1)
    model = Model()
    model.load_state_dict(state)
    loss, grads = gradients(model, groups)
    queue.put((loss.item(), {name: grad.tolist() for name, grad in grads.items()}))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method):
    """A process that was forked after the import, and one that imports for itself, give the same to the last bit."""
    model, groups = Model(), make_groups("cpu")
    loss, grads = gradients(model, groups)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    process = context.Process(target=_in_another_process, args=(queue, groups, state))
    process.start()
    other, others = queue.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert other == loss.item()
    assert {name: grad.tolist() for name, grad in grads.items()} == others


def test_deterministic_algorithms(device, monkeypatch):
    """Under `torch.use_deterministic_algorithms` nothing is refused, and everything is the same to the last bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch asks for it before it uses cuBLAS
    model, groups = Model().to(device), make_groups(device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [gradients(model, groups) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(grad, runs[0][1][name]) for name, grad in grads.items())


@pytest.mark.gpu
def test_several_streams():
    """Each stream's work is its own, the backward's too; the memory that a call takes is not given to another."""
    model, groups = Model().cuda(), make_groups("cuda", batch=64)
    expected = gradients(model, groups)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for index in range(40):
        stream = streams[index % len(streams)]
        with torch.cuda.stream(stream):
            own = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
            loss = torch.func.functional_call(model, own, groups)
            results.append((loss.detach(), torch.autograd.grad(loss, list(own.values()))))
    torch.cuda.synchronize()
    for loss, grads in results:
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(*pair) for pair in zip(grads, expected[1].values(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_for_batches_of_many_sizes(mode, dynamic):
    """CUDA graphs of torch.compile's own, and code for any size, give what eager code gives."""
    torch._dynamo.reset()
    model = Model().cuda()
    compiled = torch.compile(model, mode=mode, dynamic=dynamic)
    for batch in (2, 3, 8, 2, 5):
        groups = make_groups("cuda", batch=batch)
        torch.compiler.cudagraph_mark_step_begin()
        loss, grads = gradients(compiled, groups)
        loss, grads = loss.clone(), {name.removeprefix("_orig_mod."): grad.clone() for name, grad in grads.items()}
        expected, plain = gradients(model, groups)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_gpus_in_one_process():
    """Interleaved, from threads, and with weights of Python numbers, which are kept for each device."""
    options = {"slot_weights": [1.0, 0.5, 0.25, 2.0], "normalize": "slot"}
    inputs = torch.randn(12, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (12, 4))
    results = {}

    def run(index):
        device = f"cuda:{index}"
        hidden, weight, groups = inputs[0].to(device), inputs[1].to(device).requires_grad_(), inputs[2].to(device)
        for _ in range(10):
            loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, **options)
            mean = npp_kernels.group_mean(weight, groups).sum()
            results[index] = torch.autograd.grad(loss + mean, weight)[0]

    for index in (0, 1, 0, 1):
        run(index)
    alone = [results[index] for index in (0, 1)]
    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index].device.index for index in (0, 1)] == [0, 1]
    assert torch.equal(alone[0].cpu(), alone[1].cpu())
    assert all(torch.equal(results[index], alone[index]) for index in (0, 1))
