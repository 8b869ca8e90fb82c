"""The loss on hidden states: its chunks, options and gradients against the reference, autocast, and its memory."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch

import npp_kernels
import reference.ops as reference
from npp_kernels.losses import row_kernels
from npp_kernels.losses.chunks import Layer, Plan, _Products, find_chunks
from tests.budget import assert_within_budget, rounded_scale
from tests.conftest import INTERPRETED, TORCH_2_8
from tests.inputs import LOSS_OPTIONS, make_groups
from tests.test_patch_cross_entropy import DIFFERENTIABLE, NoGradient

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16
NAMES = ("loss", "grad_hidden", "grad_weight", "grad_bias", "lse", "accuracy", "entropy")


def make_inputs(num_rows, hidden_size, vocab_size, device, dtype=torch.float32, *, bias=True):
    hidden = torch.randn(num_rows, hidden_size, device=device).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, device=device) * 3 / hidden_size**0.5).to(dtype)
    return hidden, weight, torch.randn(vocab_size, device=device).to(dtype) if bias else None


def run(function, inputs, groups, upstream, **options):
    hidden, weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in inputs)
    loss, stats = function(hidden, weight, groups, bias=bias, **options)
    loss.backward(upstream.to(loss.dtype))
    return loss, hidden.grad, weight.grad, torch.zeros(()) if bias is None else bias.grad, *stats


def rounded_logits(hidden, weight, groups, *, bias=None, **options):
    """Return the reference with the logits and their gradient rounded, as `F.linear` in the inputs' dtype does."""
    dtype = rounded_logits.dtype
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return reference.patch_cross_entropy(logits.to(dtype).to(hidden.dtype), groups, **options)


def total_weight(groups, **options):
    """Return the sum of all coefficients, or 1 for losses by target."""
    if options.get("reduction") == "none":
        return 1.0
    kept = {name: value for name, value in options.items() if name in ("normalize", "reduction", "slot_weights")}
    uniform = torch.zeros(*groups.shape[:-1], 2, dtype=torch.float64, device=groups.device)
    counted = groups.masked_fill(groups >= 0, 0)
    total = reference.patch_cross_entropy(uniform, counted, num_targets=options.get("num_targets"), **kept)[0]
    return max(total.item() / math.log(2), 1.0)


def check(inputs, groups, upstream, *, chunk_rows=None, **options):
    dtype = inputs[0].dtype
    actual = run(
        npp_kernels.linear_patch_cross_entropy,
        inputs, groups, upstream, chunk_rows=chunk_rows, return_stats=True, **options,
    )  # fmt: skip
    rounded_logits.dtype = dtype
    wide = [None if t is None else t.float() for t in inputs]
    eager = run(rounded_logits, wide, groups, upstream, **options)
    eager = (eager[0], *(t.to(dtype) for t in eager[1:4]), *eager[4:])
    exact = [None if t is None else t.double() for t in inputs]
    oracle = run(reference.linear_patch_cross_entropy, exact, groups, upstream.double(), **options)
    for what, *three in zip(NAMES, actual, eager, oracle, strict=False):
        if what == "accuracy" and dtype != torch.float32:
            continue  # rounded logits have equal maxima
        if what == "grad_bias" and inputs[2] is None:
            continue
        scale = None
        if what in ("loss", "lse", "entropy"):
            # Logits are sums as large as themselves, and rounded ones are off by their own last place.
            logits = exact[0] @ exact[1].t()
            scale = torch.maximum(rounded_scale(logits, dtype), logits.abs().max().detach())
        if what == "loss":
            scale = scale * total_weight(groups, **options)
        assert_within_budget(*three, what=what, scale=scale)


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_options(device, options):
    inputs = make_inputs(23, 16, 75, device)
    groups = make_groups(75, 23, 4, device)
    upstream = torch.rand(groups.shape, device=device) if options.get("reduction") == "none" else torch.tensor(1.7)
    check(inputs, groups, upstream.to(device), chunk_rows=10, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [None, 1, 5, 12, 100])  # one chunk, single rows, a short last one, an even cut
def test_chunks(device, dtype, chunk_rows):
    inputs = make_inputs(12, 32, 64, device, dtype, bias=False)
    check(inputs, make_groups(64, 12, 4, device), torch.tensor(1.0, device=device), chunk_rows=chunk_rows)


@pytest.mark.xfail(
    TORCH_2_8, reason="torch 2.8: F.linear of one 16-bit row with strides is wrong on the CPU", strict=True
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_single_16_bit_rows_with_strides(dtype):
    hidden, weight, _ = make_inputs(7, 16, 300, "cpu", dtype, bias=False)
    transposed = hidden.t().contiguous().t()
    check((transposed, weight, None), make_groups(300, 7, 4, "cpu"), torch.tensor(1.0), chunk_rows=1)


def test_equals_the_loss_on_logits(device):
    hidden, weight, bias = make_inputs(10, 16, 50, device)
    groups = make_groups(50, 10, 4, device).view(2, 5, 4)
    for reduction in ("mean", "none"):
        fused = npp_kernels.linear_patch_cross_entropy(
            hidden.view(2, 5, 16), weight, groups, bias=bias, reduction=reduction, chunk_rows=4
        )
        logits = torch.nn.functional.linear(hidden.view(2, 5, 16), weight, bias)
        torch.testing.assert_close(fused, npp_kernels.patch_cross_entropy(logits, groups, reduction=reduction))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_only_wanted_gradients(device, wanted):
    inputs = make_inputs(6, 8, 20, device)
    for index in wanted:
        inputs[index].requires_grad_()
    hidden, weight, bias = inputs
    groups = make_groups(20, 6, 4, device)
    for reduction in ("mean", "none"):
        loss = npp_kernels.linear_patch_cross_entropy(
            hidden, weight, groups, bias=bias, reduction=reduction, chunk_rows=4
        )
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.sum().backward()
    for index, tensor in enumerate(inputs):
        assert (tensor.grad is not None) == (index in wanted)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "label_smoothing": 0.1}, {"token_scaling": True}], ids=str
)
def test_class_weights_and_token_scaling(device, options):
    inputs = make_inputs(23, 16, 75, device)
    groups = make_groups(75, 23, 4, device)
    upstream = torch.rand(groups.shape) if options.get("reduction") == "none" else torch.tensor(1.7)
    check(inputs, groups, upstream.to(device), chunk_rows=10, class_weight=torch.rand(75, device=device), **options)


def test_a_loss_that_no_gradient_comes_to_has_none(device):
    hidden, weight, _ = (None if t is None else t.requires_grad_() for t in make_inputs(6, 8, 20, device, bias=False))
    for reduction in ("mean", "none"):
        loss = npp_kernels.linear_patch_cross_entropy(
            hidden, weight, make_groups(20, 6, 4, device), reduction=reduction
        )
        NoGradient.apply(loss).sum().backward()
    assert hidden.grad is None
    assert weight.grad is None


def test_a_gradient_that_was_handed_out_is_the_callers(device):
    hidden, weight, _ = (None if t is None else t.requires_grad_() for t in make_inputs(6, 8, 20, device, bias=False))
    loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, make_groups(20, 6, 4, device), chunk_rows=4)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    hidden.grad.zero_()
    weight.grad.zero_()
    loss.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), first)


def test_several_backwards(device):
    hidden, weight, _ = make_inputs(6, 8, 20, device)
    weight.requires_grad_()
    loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, make_groups(20, 6, 4, device), chunk_rows=4)
    upstreams = torch.tensor([2.0, 1.0, 3.0], device=device).unbind()
    grads = [torch.autograd.grad(loss, weight, upstream, retain_graph=True)[0] for upstream in upstreams]
    torch.testing.assert_close(grads[0], 2 * grads[1])
    torch.testing.assert_close(grads[2], 3 * grads[1])


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, hidden_dtype):
    hidden, weight, bias = make_inputs(12, 16, 50, device)
    hidden = hidden.to(hidden_dtype).requires_grad_()
    weight.requires_grad_()
    groups = make_groups(50, 12, 4, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, bias=bias, chunk_rows=5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == hidden_dtype
    assert weight.grad.dtype == torch.float32
    exact = weight.detach().bfloat16().double().requires_grad_()
    reference.linear_patch_cross_entropy(
        hidden.detach().bfloat16().double(), exact, groups, bias=bias.bfloat16().double()
    )[0].backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, atol=2e-3, rtol=5e-2)


def test_empty_and_all_ignored(device):
    hidden, weight, bias = (t.requires_grad_() for t in make_inputs(5, 8, 20, device))
    for rows, reduction in ((0, "mean"), (0, "none"), (5, "mean"), (5, "none")):
        groups = torch.full((rows, 4), -100, device=device)
        loss = npp_kernels.linear_patch_cross_entropy(hidden[:rows], weight, groups, bias=bias, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
        assert loss.sum() == 0
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_gradcheck():
    inputs = tuple(t.double().requires_grad_() for t in make_inputs(5, 3, 7, "cpu"))
    groups = make_groups(7, 5, 4, "cpu")
    for options in DIFFERENTIABLE:
        for function in (npp_kernels.linear_patch_cross_entropy, reference.linear_patch_cross_entropy):
            chunks = {"chunk_rows": 2} if function is npp_kernels.linear_patch_cross_entropy else {}

            def loss(hidden, weight, bias, function=function, options=options, chunks=chunks):
                result = function(hidden, weight, groups, bias=bias, **options, **chunks)
                return result[0] if isinstance(result, tuple) else result

            assert torch.autograd.gradcheck(loss, inputs)


def test_errors():
    hidden, weight, bias = make_inputs(5, 8, 20, "cpu")
    groups = torch.zeros(5, 4, dtype=torch.int64)
    call = npp_kernels.linear_patch_cross_entropy
    with pytest.raises(ValueError, match=r"hidden: expected \[..., 8\] for weight \(20, 8\), got \(5, 7\)"):
        call(hidden[:, :7], weight, groups)
    with pytest.raises(ValueError, match=r"hidden: expected \[..., 8\] for weight \(20, 8\), got \(\)"):
        call(torch.tensor(1.0), weight, groups)
    with pytest.raises(ValueError, match=r"groups: expected the leading shape of hidden, \(5,\), and K, got \(3, 4\)"):
        call(hidden, weight, groups[:3])
    with pytest.raises(TypeError, match=r"weight: expected the dtype of hidden, torch.bfloat16, outside of autocast"):
        call(hidden.bfloat16(), weight, groups)
    with pytest.raises(ValueError, match=r"bias: expected \[20\], one per row of weight"):
        call(hidden, weight, groups, bias=bias[:3])
    with pytest.raises(ValueError, match="chunk_rows: expected an int of at least 1 or None, got 0"):
        call(hidden, weight, groups, chunk_rows=0)
    with pytest.raises(ValueError, match="normalize: expected one of"):
        call(hidden, weight, groups, normalize="mean")
    with pytest.raises(IndexError, match="got 20 at position"):
        call(hidden, weight, groups + 20)


def test_double_backward_is_refused(device):
    hidden, weight, _ = make_inputs(5, 8, 20, device)
    hidden.requires_grad_()
    loss = npp_kernels.linear_patch_cross_entropy(hidden, weight, make_groups(20, 5, 4, device))
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_patch_cross_entropy: expected one backward, got a double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "chunk_rows", "spare_rows", "sizes"),
    [
        (16384, 16384, None, 1536, [4096] * 4),
        (5632, 16384, None, 1536, [5632]),  # one more chunk would need as much for the fp32 gradient
        (5633, 16384, None, 1536, [2816 + 128, 2816 - 127]),  # equal, and a multiple of 128
        (5632, 16384, None, 0, [2816, 2816]),  # the gradient is fp32 itself, or nobody wants it
        (4096, 262144, None, 0, [2048, 2048]),  # a wide vocabulary
        (300, 16384, 100, 1536, [100] * 3),  # as the caller says
        (600, 16384, 200, 1536, [200] * 3),  # no more than that
        (0, 16384, None, 0, []),
    ],
)
def test_default_chunks(num_rows, vocab_size, chunk_rows, spare_rows, sizes):
    chunks = list(find_chunks(num_rows, vocab_size, chunk_rows, spare_rows))
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))


@pytest.mark.parametrize(
    ("num_rows", "dtype", "wants_weight", "spare", "num_chunks"),
    [
        (4096 + 128, torch.bfloat16, True, True, 1),  # 128 rows of logits are as large as the weight in fp32
        (4096 + 129, torch.bfloat16, True, True, 2),
        (4096 + 1, torch.bfloat16, False, True, 2),
        (4096 + 1, torch.bfloat16, True, False, 2),
        (4096 + 1, torch.float32, True, True, 2),  # the gradient's own memory is fp32
    ],
)
def test_spare_rows_are_what_a_gradient_in_fp32_would_take(num_rows, dtype, wants_weight, spare, num_chunks):
    hidden, weight, _ = make_inputs(num_rows, 64, 8, "cpu", dtype, bias=False)
    products = _Products(Layer(hidden, weight, None), Plan(dtype, None, (True, wants_weight, False)), None, spare=spare)
    assert len(products.chunks) == num_chunks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "group_size"), [(1024, 16384, 16), (4096, 16384, 4), (512, 50257, 4)]
)
def test_full_size(num_rows, vocab_size, group_size, dtype):
    inputs = make_inputs(num_rows, 768, vocab_size, "cuda", dtype, bias=False)
    groups = make_groups(vocab_size, num_rows, group_size, "cuda")
    check(inputs, groups, torch.tensor(1.0, device="cuda"), chunk_rows=1500)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "group_size"), [(4096, 16384, 16), (4097, 16384, 1), (4096, 16381, 4)]
)
def test_exponentials_in_place_of_logits(num_rows, vocab_size, group_size, scale, monkeypatch):
    """Both ways to the same gradients, for small and large logits; that of exponentials has to be taken."""
    module = import_module("npp_kernels.losses.chunks")
    launch, taken = module.launch_exponentials, []
    monkeypatch.setattr(module, "launch_exponentials", lambda *arguments: taken.append(1) or launch(*arguments))
    hidden, weight, _ = make_inputs(num_rows, 768, vocab_size, "cuda", torch.bfloat16, bias=False)
    weight = (weight.float() * scale).bfloat16()
    groups = make_groups(vocab_size, num_rows, group_size, "cuda")

    def gradients(function, dtype, **options):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = function(*leaves, groups, **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return loss, *torch.autograd.grad(loss, leaves)

    chunked = partial(gradients, npp_kernels.linear_patch_cross_entropy, torch.bfloat16, chunk_rows=1500)
    fused = chunked()
    assert len(taken) == (num_rows + 1499) // 1500
    plain = chunked(return_stats=True)  # statistics need logits
    assert len(taken) == (num_rows + 1499) // 1500
    oracle = gradients(reference.linear_patch_cross_entropy, torch.float64)
    for what, *results, exact in zip(NAMES, fused, plain, oracle, strict=False):
        errors = [((result.double() - exact).norm() / exact.norm()).item() for result in results]
        print(f"{what}: {errors[0]:.2e} with exponentials, {errors[1]:.2e} with logits")
        # bfloat16 keeps 8 bits: every element is off by 2^-9 / sqrt(3) of itself, and so is what it is a sum of.
        assert errors[0] <= (1e-5 if what == "loss" else 2**-8)


@pytest.mark.gpu
def test_memory_is_bounded_by_a_chunk():
    hidden, weight, _ = make_inputs(16384, 256, 16384, "cuda", torch.bfloat16, bias=False)
    hidden.requires_grad_()
    weight.requires_grad_()
    groups = make_groups(16384, 16384, 4, "cuda")
    hidden[:1] @ weight.t()  # cuBLAS allocates its workspace at the first product of a process
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, chunk_rows=1024).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (hidden.numel() + weight.numel()) + 4 * weight.numel()
    vectors = 6 * 1024 * 256 + 4 * 1024 * 64  # the scaled hidden states, their gradient in fp32; sums of exponentials
    assert extra <= gradients + 2 * 1024 * 16384 + vectors + 2**20


@pytest.mark.gpu
def test_gradient_checkpointing_and_wide_rows():
    assert row_kernels.MAX_BLOCK_BYTES < 128256
    inputs = make_inputs(64, 64, 128256, "cuda", torch.bfloat16, bias=False)
    check(inputs, make_groups(128256, 64, 4, "cuda"), torch.tensor(1.0, device="cuda"), chunk_rows=40)
