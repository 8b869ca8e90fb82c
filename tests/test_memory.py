"""No kernel writes beside what it was given, or relies on what stood there; and no call leaves memory behind."""

from contextlib import contextmanager

import pytest
import torch

import npp_kernels

GUARD = 256  # elements on either side; a multiple of every alignment that a kernel may count on
VOCAB, WIDTH, ROWS = 75, 20, 13  # no multiple of any block


@contextmanager
def guarded(monkeypatch):
    """Let what is allocated empty lie between guard bands, full of NaN or of nonsense; look at the bands after."""
    made, empty_like, new_empty = [], torch.empty_like, torch.Tensor.new_empty

    def between_guards(sizes, dtype, device):
        dtype = dtype or torch.get_default_dtype()
        numel = torch.Size(sizes).numel()
        poison = float("nan") if dtype.is_floating_point else 93
        around = torch.full((numel + 2 * GUARD,), poison, dtype=dtype, device=device)
        around[:GUARD] = around[GUARD + numel :] = 57
        made.append((around, numel))
        return around[GUARD : GUARD + numel].view(sizes)

    def guarded_empty(*sizes, dtype=None, device=None):
        return between_guards(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes, dtype, device)

    def guarded_empty_like(tensor, dtype=None, memory_format=None, **others):
        if others:  # the interpreter's own
            return empty_like(tensor, dtype=dtype, memory_format=memory_format, **others)
        assert memory_format == torch.contiguous_format or tensor.is_contiguous()
        return between_guards(tensor.shape, dtype or tensor.dtype, tensor.device)

    def guarded_new_empty(tensor, *sizes, dtype=None, **others):
        if others:
            return new_empty(tensor, *sizes, dtype=dtype, **others)
        return guarded_empty(*sizes, dtype=dtype or tensor.dtype, device=tensor.device)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", guarded_empty)
        patched.setattr(torch, "empty_like", guarded_empty_like)
        patched.setattr(torch.Tensor, "new_empty", guarded_new_empty)
        yield
    assert made
    for around, numel in made:
        assert (around[:GUARD] == 57).all()
        assert (around[GUARD + numel :] == 57).all()


def same_between_guards(run, monkeypatch):
    """Compare a call, forward and backward, with the same one between guard bands, to the last bit."""
    expected = run()
    with guarded(monkeypatch):
        found = run()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def results_of(output, leaves, upstream):
    outputs = [output] if isinstance(output, torch.Tensor) else [output[0], *output[1]]
    return [*(part.detach() for part in outputs), *torch.autograd.grad(outputs[0], leaves, upstream)]


def groups_of(device, size, rows=ROWS):
    groups = torch.randint(VOCAB, (rows, size), device=device)
    groups[0], groups[-1, -1] = -100, -100
    return groups


def logits_like(*shape, device, dtype):
    return (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()


LOSSES = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "return_stats": True},
    {"normalize": "row", "label_smoothing": 0.1, "z_loss": 1e-3},
    {"softcap": 5.0, "token_scaling": True},
]


def upstream_of(options, groups):
    return torch.rand(groups.shape, device=groups.device) if options.get("reduction") == "none" else torch.tensor(1.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_group_mean(kernel_device, dtype, size, monkeypatch):
    table = torch.randn(VOCAB, WIDTH, device=kernel_device).to(dtype).requires_grad_()
    groups, upstream = groups_of(kernel_device, size), torch.randn(ROWS, WIDTH, device=kernel_device).to(dtype)
    same_between_guards(
        lambda: results_of(npp_kernels.group_mean(table, groups, ignore_index=-100), [table], upstream), monkeypatch
    )


def test_group_mean_of_a_frequent_id(kernel_device, monkeypatch):
    table = torch.randn(VOCAB, WIDTH, device=kernel_device, requires_grad=True)
    groups = torch.zeros(150, 4, dtype=torch.int64, device=kernel_device)
    groups[:3] = torch.randint(VOCAB, (3, 4), device=kernel_device)
    upstream = torch.randn(150, WIDTH, device=kernel_device)
    same_between_guards(lambda: results_of(npp_kernels.group_mean(table, groups), [table], upstream), monkeypatch)


def test_patch_mean(kernel_device, monkeypatch):
    embeddings = torch.randn(2, 6, 4, WIDTH, device=kernel_device, requires_grad=True)
    upstream = torch.randn(npp_kernels.patch_mean(embeddings, 2).shape, device=kernel_device)
    same_between_guards(lambda: results_of(npp_kernels.patch_mean(embeddings, 2), [embeddings], upstream), monkeypatch)


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize(("rows", "vocab_size", "dtype"), [(ROWS, VOCAB, torch.float32), (2, 33_001, torch.float16)])
def test_patch_cross_entropy(kernel_device, options, rows, vocab_size, dtype, monkeypatch):
    """A row that stays in registers, and one that is read twice."""
    logits, groups = logits_like(rows, vocab_size, device=kernel_device, dtype=dtype), groups_of(kernel_device, 3, rows)
    upstream = upstream_of(options, groups).to(kernel_device)
    same_between_guards(
        lambda: results_of(npp_kernels.patch_cross_entropy(logits, groups, **options), [logits], upstream), monkeypatch
    )


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_linear_patch_cross_entropy(kernel_device, options, monkeypatch):
    hidden = logits_like(ROWS, WIDTH, device=kernel_device, dtype=torch.float32)
    weight = torch.randn(VOCAB, WIDTH, device=kernel_device, requires_grad=True)
    groups = groups_of(kernel_device, 3)
    upstream = upstream_of(options, groups).to(kernel_device)
    same_between_guards(
        lambda: results_of(
            npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, chunk_rows=5, **options),
            [hidden, weight], upstream,
        ),
        monkeypatch,
    )  # fmt: skip


@pytest.mark.gpu
def test_the_exponentials_of_many_rows(monkeypatch):
    """The other way to the output layer's gradients, which a Hopper GPU takes."""
    hidden = torch.randn(4099, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.1 * torch.randn(1000, 256, device="cuda")).bfloat16().requires_grad_()
    groups = torch.randint(1000, (4099, 4), device="cuda")
    upstream = torch.tensor(1.0, device="cuda")
    same_between_guards(
        lambda: results_of(npp_kernels.linear_patch_cross_entropy(hidden, weight, groups), [hidden, weight], upstream),
        monkeypatch,
    )


def test_a_write_beside_an_output_is_seen(monkeypatch):
    def write_beside():
        with guarded(monkeypatch):
            output = torch.empty(5)
            output.as_strided((6,), (1,), output.storage_offset())[5] = 0.0

    with pytest.raises(AssertionError):
        write_beside()


@pytest.mark.gpu
def test_ten_thousand_steps_take_no_more_memory_than_one():
    table = torch.randn(VOCAB, WIDTH, device="cuda", requires_grad=True)
    groups = groups_of("cuda", 4).clamp(min=0)

    def step():
        means = npp_kernels.group_mean(table, groups)
        losses = npp_kernels.linear_patch_cross_entropy(means, table, groups, slot_weights=[1.0, 0.5, 0.25, 2.0])
        (losses + npp_kernels.patch_cross_entropy(means @ table.t(), groups)).backward()
        table.grad = None

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    for _ in range(10_000):
        step()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (held, peak)
