"""Decoding by kernels: each against PyTorch, the filters id by id, and the same images as without them."""

import pytest
import torch
import torch.nn.functional as F

from reference.network.attention import rotary_embedding, rotate
from reference.network.model import ModelConfig
from reference.sample import Sampler
from reference.sampling import decode_kernels, decoding
from reference.sampling.choosing import Drawing, choose, filter_logits
from reference.sampling.decode_kernels import attend_to_cache, choose_splits, embed, multiply
from tests.conftest import INTERPRETED
from tests.test_sample import seeded, trained_model

pytestmark = pytest.mark.kernels
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter truncates bfloat16


def assert_near(actual, exact, dtype):
    """As near as one rounding to the dtype leaves it, of a sum in fp32 of a hundred terms of about 1 and less."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=eps / 4 + 32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "channels"), [(2, 96, 40), (70, 64, 33)])  # 96: no multiple of 64
def test_products(kernel_device, rows, dim, channels, dtype):
    x = torch.randn(rows, dim, device=kernel_device).to(dtype)
    weight, gate = (torch.randn(2, channels, dim, device=kernel_device) / dim**0.5).to(dtype)
    norm = torch.nn.RMSNorm(dim, eps=1e-5, device=kernel_device, dtype=dtype)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    out = x.new_empty((rows, channels))
    residual = torch.randn(rows, channels, device=kernel_device).to(dtype)
    with torch.no_grad():
        wide = x.double()
        scale = (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        # The norm's weight is multiplied in and rounded before the product, the rest of the norm is not.
        normed = (x.float() * norm.weight.float()).to(dtype).double() * scale

        multiply(x, weight, out, norm=norm)
        assert_near(out, normed @ weight.double().t(), dtype)
        multiply(x, weight, out, norm=norm, gated=gate)
        assert_near(out, F.silu(normed @ weight.double().t()) * (normed @ gate.double().t()), dtype)
        expected = residual.double() + wide @ weight.double().t()
        multiply(x, weight, residual, residual=residual)  # in place, as in the residual stream
        assert_near(residual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("position", [0, 1, 32, 33, 149])  # nothing filled, one, a block, a block and one, all
def test_attention_to_what_is_filled(kernel_device, position, splits, dtype):
    rows, heads, positions, head_dim = 2, 3, 150, 32
    qkv = torch.randn(rows, 3 * heads * head_dim, device=kernel_device).to(dtype)
    keys, values = torch.randn(2, rows, heads, positions, head_dim, device=kernel_device).to(dtype)
    keys[:, :, position:] = float("nan")  # of an image before, say: not to be read
    values[:, :, position:] = float("nan")
    rotary = rotary_embedding(torch.arange(positions, device=kernel_device), 10, head_dim)
    out = qkv.new_empty((rows, heads * head_dim))
    attend_to_cache(qkv, rotary, torch.tensor(position, device=kernel_device), (keys, values), out, splits)

    split = qkv.view(rows, 1, 3, heads, head_dim)
    query, key = rotate(split[:, :, :2], [part[position : position + 1] for part in rotary]).transpose(1, 3).unbind(2)
    torch.testing.assert_close(keys[:, :, position], key[:, :, 0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(values[:, :, position], split[:, 0, 2])
    seen = slice(position + 1)
    expected = F.scaled_dot_product_attention(
        *(part.double() for part in (query, keys[:, :, seen], values[:, :, seen]))
    )
    assert_near(out, expected.flatten(1), dtype)
    assert keys[:, :, position + 1 :].isnan().all()


def test_splits_fill_the_gpu(kernel_device, monkeypatch):
    monkeypatch.setattr(decode_kernels, "num_multiprocessors", lambda like: 132)
    like = torch.empty(1, device=kernel_device)
    assert choose_splits(128 * 12, 256, like) == 1  # 64 images of LlamaGen-B with guidance
    assert choose_splits(2 * 12, 256, like) == 8  # one: no more than there are blocks of keys
    assert choose_splits(2 * 12, 576, like) == 16


def test_embedding_of_the_condition_and_of_ids(kernel_device):
    tokens, classes = torch.randn(5, 96, device=kernel_device), torch.randn(3, 96, device=kernel_device)
    ids, labels = torch.tensor([4, 0], device=kernel_device), torch.tensor([1, 0, 2, 2], device=kernel_device)
    out = torch.empty(4, 96, device=kernel_device)
    embed(ids, labels, torch.tensor(0, device=kernel_device), (tokens, classes), out)
    assert torch.equal(out, classes[labels])
    embed(ids, labels, torch.tensor(3, device=kernel_device), (tokens, classes), out)
    assert torch.equal(out, tokens[ids.repeat(2)])


def kept_by_the_kernel(row, drawing):
    """Return which ids of one row of logits can be drawn: the one that the noise is small for is, if it is kept."""
    device, number = row.device, len(row)
    noise = torch.ones(number, number, device=device).fill_diagonal_(1e-30)
    ids = torch.zeros(number, dtype=torch.int64, device=device)
    tokens = torch.zeros(number, 4, dtype=torch.int64, device=device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    position = torch.tensor(2, device=device)
    choose(row.repeat(number, 1), noise, position, drawing, ids, tokens, is_finite)
    assert is_finite
    assert torch.equal(tokens[:, 2], ids)
    assert not tokens[:, [0, 1, 3]].any()
    return ids == torch.arange(number, device=device)


ROWS = {
    "peaked": lambda: 3 * torch.randn(13),
    "equal": lambda: torch.full((10,), -7.25),
    "few values": lambda: torch.randint(-2, 3, (11,)).float(),
    "zeros of both signs": lambda: torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0]),
    "one": lambda: torch.tensor([2.5]),
    "far apart": lambda: torch.tensor([30.0, 29.0, -3e4, 28.0, -1e-30, 1e-30]),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (None, 0.3), (None, 0.999999), (100, 0.6)])
def test_filters_keep_what_sorting_keeps(kernel_device, rows, top_k, top_p):
    row = ROWS[rows]().to(kernel_device)
    filtered = filter_logits(row, top_k=top_k, top_p=top_p)
    # what has no probability in fp32 cannot be drawn, whatever is kept
    expected = filtered.isfinite() & (filtered.softmax(-1) / 1e-30 > 1)
    assert torch.equal(kept_by_the_kernel(row, Drawing(1.0, 1.0, top_k, top_p)), expected)


def test_a_logit_that_is_not_finite_is_reported(kernel_device):
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(2, 9, device=kernel_device)
        logits[1, 4] = bad
        ids = torch.zeros(2, dtype=torch.int64, device=kernel_device)
        tokens, is_finite = ids[:, None].clone(), torch.ones((), dtype=torch.bool, device=kernel_device)
        noise, position = (
            torch.ones(2, 9, device=kernel_device),
            torch.zeros((), dtype=torch.int64, device=kernel_device),
        )
        choose(logits, noise, position, Drawing(1.0, 1.0, 5, 0.9), ids, tokens, is_finite)
        assert not is_finite
        assert ((ids >= 0) & (ids < 9)).all()  # what is embedded next is in the table


@pytest.mark.parametrize(
    ("splits", "options"),
    [(1, {"guidance": 2.5, "temperature": 0.8}), (2, {"top_k": 7}), (1, {"guidance": 1.5, "top_p": 0.7})],
    ids=str,
)
def test_same_images_as_without_kernels(kernel_device, options, splits, monkeypatch):
    """The same noise draws the same ids: in fp32 the logits differ in their last places only."""
    monkeypatch.setattr(decoding, "choose_splits", lambda *_: splits)
    model = trained_model(ModelConfig.named("tiny", vocab_size=30, grid=(2, 3), num_classes=10)).to(kernel_device)
    labels = torch.tensor([1, 4, 9], device=kernel_device)
    ours, plain = (Sampler(model, batch_size=2, fast=fast, **options) for fast in (True, False))
    assert ours.kernels is not None
    assert plain.kernels is None
    tokens = ours(labels, seeded(device=kernel_device))
    assert torch.equal(tokens, plain(labels, seeded(device=kernel_device)))
    assert len(tokens.unique()) > 4


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "images"), [("B", 3), ("B", 64)])  # split attention, and whole
def test_bf16_logits_of_each_position(size, images):
    """At every position the kernels' logits are as near to fp32's as PyTorch's own bf16 ones."""
    torch.manual_seed(0)
    config = ModelConfig.named(size, vocab_size=1000, grid=(8, 8), num_classes=10)
    model = trained_model(config).cuda().eval()
    exact_model = trained_model(config).cuda().eval()
    model.to(torch.bfloat16)
    exact_model.load_state_dict(model.state_dict())
    sampler = Sampler(model, batch_size=images, guidance=2.0)
    assert sampler.kernels is not None
    labels = torch.randint(10, (2 * images,), device="cuda")
    sampler.labels.copy_(labels)
    caches = [m.make_cache(2 * images, m.output.weight.dtype, "cuda") for m in (model, exact_model)]
    with torch.no_grad():
        for index in range(16):
            position = torch.tensor(index, device="cuda")
            sampler.position.fill_(index)
            fed = sampler.ids.repeat(2)
            sampler.noise.exponential_()
            sampler.kernels.step(sampler.drawing, sampler.noise, sampler.ids, sampler.tokens, sampler.is_finite)
            given = (None, labels) if index == 0 else (fed, None)
            plain, exact = (
                m.decode(*given, position, cache) for m, cache in zip((model, exact_model), caches, strict=True)
            )
            error = (sampler.kernels.logits.float() - exact).norm() / exact.norm()
            assert error <= 1.5 * (plain - exact).norm() / exact.norm() + 1e-3
