"""The model: official names and sizes, both formulations, causality, decoding."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

import reference.network.attention
import reference.network.model
from npp_kernels import group_tokens
from reference.network.attention import rotary_embedding
from reference.network.model import ModelConfig, Transformer

SMALL = {"vocab_size": 37, "grid": (4, 8), "num_classes": 5, "dim": 24, "num_layers": 2, "num_heads": 2}


def small_model(*, fast=True, dtype=torch.float64, **others):
    """Return a model whose output layer is not zero, so that its loss depends on everything."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**SMALL, **others}), fast=fast).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def small_batch(batch_size=3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SMALL["vocab_size"], (batch_size, *SMALL["grid"]), generator=generator)
    return tokens, torch.randint(SMALL["num_classes"], (batch_size,), generator=generator)


def test_docstrings_run():
    assert doctest.testmod(reference.network.model).failed == 0


# Parameters: (vocab + classes + 1 + vocab)·dim + layers·(4·dim² + 3·dim·hidden + 2·dim) + dim; rounded, the paper's
# 111M, 343M, 775M and 1.4B.
@pytest.mark.parametrize(
    ("size", "hidden", "millions"), [("B", 2048, 111), ("L", 2816, 343), ("XL", 3584, 775), ("XXL", 4096, 1411)]
)
def test_sizes_of_the_paper(size, hidden, millions):
    config = ModelConfig.named(size)
    with torch.device("meta"):
        model = Transformer(config)
    dim, count = config.dim, sum(parameter.numel() for parameter in model.parameters())
    expected = (2 * 16384 + 1001) * dim + config.num_layers * (4 * dim**2 + 3 * dim * hidden + 2 * dim) + dim
    assert count == expected
    assert round(count / 1e6) == millions
    assert config.feed_forward_dim == hidden


def test_state_dict_of_the_official_checkpoints():
    with torch.device("meta"):
        state = Transformer(ModelConfig.named("B")).state_dict()
    expected = {
        "cls_embedding.embedding_table.weight": (1001, 768),
        "tok_embeddings.weight": (16384, 768),
        "norm.weight": (768,),
        "output.weight": (16384, 768),
    }
    for layer in range(12):
        expected |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * 768, 768),
            f"layers.{layer}.attention.wo.weight": (768, 768),
            f"layers.{layer}.feed_forward.w1.weight": (2048, 768),
            f"layers.{layer}.feed_forward.w3.weight": (2048, 768),
            f"layers.{layer}.feed_forward.w2.weight": (768, 2048),
            f"layers.{layer}.attention_norm.weight": (768,),
            f"layers.{layer}.ffn_norm.weight": (768,),
        }
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_output_layer_starts_at_zero():
    model = Transformer(ModelConfig(**SMALL))
    tokens, labels = small_batch()
    assert model.loss(group_tokens(tokens, 2), labels, 2).item() == pytest.approx(math.log(37), abs=1e-5)
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)


# Square, and higher than wide: the geometry must not be guessed from a square root.
@pytest.mark.parametrize("patch", [1, 2, 4, (2, 1)])
def test_both_formulations_agree(patch):
    tokens, labels = small_batch()
    groups = group_tokens(tokens, patch, grid=SMALL["grid"])
    results = []
    for fast in (True, False):
        model = small_model(fast=fast).eval()
        loss = model.loss(groups, labels, patch, num_targets=torch.tensor(100))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss, gradients))
    (loss, gradients), (official_loss, official_gradients) = results
    torch.testing.assert_close(loss, official_loss.double(), rtol=1e-6, atol=0)
    for gradient, official in zip(gradients, official_gradients, strict=True):
        torch.testing.assert_close(gradient, official, rtol=1e-4, atol=1e-7)  # the official logits are fp32


def test_loss_of_one_patch_by_hand():
    model = small_model().eval()
    tokens, labels = small_batch()
    groups = group_tokens(tokens, 2)
    logits = model(groups, labels, 2) @ model.output.weight.T
    expected = torch.stack([F.cross_entropy(logits.flatten(0, 1), groups[..., k].flatten()) for k in range(4)]).mean()
    torch.testing.assert_close(model.loss(groups, labels, 2), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_row_sees_only_earlier_groups(fast, patch):
    model = small_model(fast=fast).eval()
    tokens, labels = small_batch(1)
    groups = group_tokens(tokens, patch, grid=SMALL["grid"])
    before = model(groups, labels, patch)
    changed = groups.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 37
    after = model(changed, labels, patch)
    moved = (before - after).abs().amax(-1)[0] > 1e-12
    assert moved.tolist() == [row > 3 for row in range(groups.shape[1])]


@pytest.mark.gpu
def test_flash_attn_takes_over_where_it_is_installed(monkeypatch):
    """By a stand-in with flash_attn's own layout, ``[B, P, heads, head_dim]``, and signature."""
    model = small_model(dtype=torch.bfloat16).cuda()
    tokens, labels = (tensor.cuda() for tensor in small_batch())
    groups = group_tokens(tokens, 2)
    monkeypatch.setattr(reference.network.attention, "flash_attn_func", None)
    expected = model.eval()(groups, labels, 2)
    shapes = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        shapes.append(q.shape)
        scores = torch.einsum("bphd,bqhd->bhpq", q.float(), k.float()) / q.shape[-1] ** 0.5
        earlier = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        assert causal
        return torch.einsum("bhpq,bqhd->bphd", scores.masked_fill(~earlier, -torch.inf).softmax(-1), v.float()).to(
            v.dtype
        )

    monkeypatch.setattr(reference.network.attention, "flash_attn_func", flash_attn_func)
    torch.testing.assert_close(model(groups, labels, 2), expected, rtol=0.05, atol=0.05)
    assert shapes == [(3, 8, 2, 12)] * 2


def test_rotary_embedding_of_the_coarse_grid():
    cosine, sine = rotary_embedding(torch.arange(8), width=4, head_dim=8)
    assert cosine.shape == sine.shape == (8, 4)
    assert cosine[0].tolist() == sine[0].tolist() == [0.0] * 4  # the condition
    # Position 7 is cell 6: row 1, column 2; the two frequencies of a half of 4 channels are 1 and 10000^-0.5.
    angles = torch.tensor([1.0, 0.01, 2.0, 0.02])
    torch.testing.assert_close(cosine[7], angles.cos())
    torch.testing.assert_close(sine[7], angles.sin())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoding_equals_the_whole_sequence(dtype):
    model = small_model(dtype=dtype).eval()
    tokens, labels = small_batch()
    flat = tokens.flatten(1)
    with torch.no_grad():
        whole = (model(group_tokens(tokens, 1), labels, 1) @ model.output.weight.T).float()
        cache = model.make_cache(len(tokens), dtype, "cpu")
        steps = [model.decode(None, labels, torch.tensor(0), cache)]
        steps += [model.decode(flat[:, i - 1], None, torch.tensor(i), cache) for i in range(1, flat.shape[1])]
    tolerance = 1e-5 if dtype == torch.float64 else 0.15  # bf16: sums of other orders, logits of about ±5
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=tolerance, atol=tolerance)


def test_decode_takes_either_ids_or_labels():
    model = small_model()
    with pytest.raises(ValueError, match="ids: expected either"):
        model.decode(None, None, torch.tensor(0), model.make_cache(1, torch.float64, "cpu"))


def test_labels_are_dropped_only_while_training():
    model = small_model(class_dropout=1.0, dropout=0.0, token_dropout=0.0)
    tokens, labels = small_batch()
    groups = group_tokens(tokens, 2)
    no_class = torch.full_like(labels, SMALL["num_classes"])
    assert torch.equal(model(groups, labels, 2), model(groups, no_class, 2))
    model.eval()
    assert not torch.equal(model(groups, labels, 2), model(groups, no_class, 2))


def seed_of(number, device="cpu"):
    return torch.tensor(number, dtype=torch.int32, device=device)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**31 - 1, -(2**31)])
def test_hashed_numbers_are_even_and_independent(seed):
    """Of neighbours, of other rows, of other seeds; sums of 2^20 numbers that should have a variance of about 1."""
    numbers = reference.network.model.hashed(torch.Size((1024, 1024)), seed_of(seed)).double()
    assert 0 <= numbers.min() < 1e-5 < 1 - 1e-5 < numbers.max() < 1
    counts = torch.histc(numbers, 256, 0, 1)
    assert ((counts - 4096) ** 2 / 4096).sum().item() < 255 + 5 * 510**0.5

    def correlation(x, y):
        return ((x - x.mean()) * (y - y.mean())).mean().item() / (x.std() * y.std()).item() * x.numel() ** 0.5

    dropped = (numbers < 0.1).double()
    assert dropped.mean().item() == pytest.approx(0.1, abs=5 * 0.3 / 1024)
    for shift in (1, 2, 3, 64, 768, 1024, 4096, 2**18):
        flat = dropped.flatten()
        assert abs(correlation(flat[:-shift], flat[shift:])) < 5
    for other in (seed + 1 if seed < 2**31 - 1 else 0, seed ^ 0x100, ~seed):
        others = (reference.network.model.hashed(numbers.shape, seed_of(other)) < 0.1).double()
        assert abs(correlation(dropped, others)) < 5


def test_compiled_dropout_drops_the_same_in_the_backward(device):
    compiled = torch.compile(reference.network.model.dropout, fullgraph=True, dynamic=False)
    x = torch.randn(64, 96, device=device).bfloat16().requires_grad_()
    kept = []
    for seed in (3, 4):
        y = compiled(x, 0.25, True, seed_of(seed, device))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        kept.append(y != 0)
        torch.testing.assert_close(y, torch.where(kept[-1], x / 0.75, 0))
        assert torch.equal(gradient, torch.where(kept[-1], torch.tensor(1 / 0.75).bfloat16(), 0))
        assert kept[-1].float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(*kept)
    assert compiled(x, 0.25, False, seed_of(3, device)) is x


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    branch, rate = torch.ones(4000, 2, 3), torch.tensor(0.25)
    dropped = reference.network.model.drop_path(branch, rate, True)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert (dropped.flatten(1).std(1) == 0).all()  # whole images
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(reference.network.model.drop_path(branch, rate, False), branch)


def test_operations_count_every_linear_layer_and_the_causal_half_of_attention():
    config = ModelConfig(**SMALL)
    weights = sum(m.weight.numel() for m in Transformer(config).modules() if isinstance(m, torch.nn.Linear))
    pairs = 8 * 9 // 2  # of 8 groups, those that see each other
    # Per pair and layer, scores and mixing cost 2·dim operations each, three times with the backward.
    assert config.training_flops(2) == 6 * 8 * weights + 3 * config.num_layers * pairs * 4 * config.dim


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("size", lambda: ModelConfig.named("H")),
        ("dim", lambda: ModelConfig(dim=10, num_heads=4)),
        ("patch", lambda: ModelConfig(grid=(4, 6)).coarse_grid(4)),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        call()
