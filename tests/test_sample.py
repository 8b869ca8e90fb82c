"""Sampling: the cache against the full forward pass, the distribution of draws, guidance, and the files written."""

import bisect
import decimal
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from npp_kernels import group_tokens
from reference.network.model import ModelConfig, Transformer
from reference.sample import Sampler, decode_with, save_grid
from reference.sampling.choosing import draw, filter_logits

CONFIG = ModelConfig.named("tiny", vocab_size=50, grid=(4, 4), num_classes=10)


def trained_model(config=CONFIG, dtype=torch.float32):
    """Return a model whose output layer is not zero, with logits that differ clearly."""
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    torch.nn.init.normal_(model.cls_embedding.embedding_table.weight, std=0.5)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    return model.to(dtype)


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def full_logits(model, tokens, labels):
    """Return the logits of every position from one pass without a cache."""
    return model.output(model(group_tokens(tokens, 1), labels))


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])  # without the other half, with it, and that half alone
def test_greedy_samples_are_what_the_full_pass_chooses(guidance):
    model = trained_model()
    labels = torch.tensor([1, 4, 9])
    tokens = Sampler(model, batch_size=3, guidance=guidance, top_k=1)(labels, seeded())
    assert len(tokens.unique()) > 5  # a constant image would prove nothing
    model.eval()
    with torch.no_grad():
        conditional = full_logits(model, tokens, labels)
        unconditional = full_logits(model, tokens, torch.full_like(labels, 10))
    expected = (unconditional + guidance * (conditional - unconditional)).argmax(-1).view(3, 4, 4)
    assert torch.equal(tokens, expected)
    assert not torch.equal(conditional.argmax(-1), unconditional.argmax(-1))


def test_samples_follow_the_model():
    """A model without layers that matter: ids of the first cell have the softmax of the first logits."""
    model = trained_model(ModelConfig.named("tiny", vocab_size=6, grid=(1, 2), num_classes=2))
    torch.nn.init.normal_(model.output.weight, std=0.05)
    labels = torch.ones(4000, dtype=torch.int64)
    tokens = Sampler(model, batch_size=1000, temperature=0.5)(labels, seeded()).flatten(1)
    model.eval()
    with torch.no_grad():
        first = (full_logits(model, tokens[:1].view(1, 1, 2), labels[:1])[0, 0] / 0.5).softmax(-1)
    shares = torch.bincount(tokens[:, 0], minlength=6) / 4000
    assert first.max() > 1.5 * first.min()
    # five standard deviations of a share
    assert ((shares - first).abs() < 5 * (first * (1 - first) / 4000).sqrt()).all()


def test_draw_has_the_softmax_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -math.inf, -3.0])
    noise = torch.empty(100_000, 5).exponential_(generator=seeded())
    counts = torch.bincount(draw(logits.expand(100_000, 5), noise), minlength=5)
    p = logits.softmax(-1)
    assert counts[3] == 0
    assert ((counts / 100_000 - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt()).all()


def test_draw_survives_noise_of_zero():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert draw(logits, torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [0]


def test_top_k_and_top_p():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()

    def kept(**options):
        return filter_logits(logits, **options).isfinite().tolist()

    assert kept() == [[True] * 4] * 2
    assert kept(top_k=2)[0] == [False, True, False, True]
    assert kept(top_k=9) == [[True] * 4] * 2
    assert kept(top_p=0.6) == [[False, True, False, True], [True, False, False, False]]
    assert kept(top_p=0.75)[0] == [False, True, True, True]
    assert kept(top_p=1e-6) == [[False, True, False, False], [True, False, False, False]]
    # top-k first: of 0.4 and 0.3 alone, 0.4 has 0.57
    assert kept(top_k=2, top_p=0.55)[0] == [False, True, False, False]
    # what is kept is not changed
    assert torch.equal(filter_logits(logits, top_p=0.75)[0, 1:], logits[0, 1:])


@pytest.mark.parametrize("number", range(1, 10))
def test_top_p_of_equal_probabilities(number):
    assert filter_logits(torch.zeros(10), top_p=number / 10).isfinite().sum() == number
    assert filter_logits(torch.full((3, 10), -7.3), top_p=number / 10).isfinite().sum(-1).tolist() == [number] * 3


def test_top_p_against_exact_sums():
    """Forty digits in place of sixteen: how many ids does each share need?"""
    for spread in (0.5, 2.0, 6.0):
        logits = spread * torch.randn(16_384, generator=seeded())
        with decimal.localcontext(decimal.Context(prec=40)):
            weights = [decimal.Decimal(value).exp() for value in logits.sort(descending=True).values.tolist()]
            sums = list(itertools.accumulate(weights))
            for top_p in (0.1, 0.6, 0.9, 0.99, 0.9999, 0.999999):
                expected = 1 + bisect.bisect_left(sums, decimal.Decimal(top_p) * sums[-1])
                kept = filter_logits(logits, top_p=top_p).isfinite()
                assert kept.sum() == expected
                assert torch.equal(logits[kept].sort().values, logits.topk(expected).values.flip(0))


def test_seeds_and_batches():
    model = trained_model()
    labels = torch.arange(5)
    sampler = Sampler(model, batch_size=2)
    first, again, other = (sampler(labels, seeded(seed)) for seed in (0, 0, 1))
    assert first.shape == (5, 4, 4)
    assert torch.equal(first, again)  # nothing of the call between is left in the cache
    assert not torch.equal(first, other)
    assert not torch.equal(first[:2], first[2:4])
    assert torch.equal(Sampler(model, batch_size=2)(labels, seeded()), first)
    assert sampler(labels[:0], seeded()).shape == (0, 4, 4)


def test_labels_matter_and_dropout_is_off():
    model = trained_model().train()
    sampler = Sampler(model, batch_size=2, top_k=1)
    first, second = sampler(torch.tensor([2, 5]), seeded()), sampler(torch.tensor([2, 5]), seeded(1))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert model.training  # as it was


def test_options_out_of_range():
    model = trained_model()
    for options, message in (
        ({"temperature": 0.0}, "temperature: expected 1e-06 or more, got 0.0"),
        ({"temperature": 1e-38}, "temperature: expected 1e-06 or more, got 1e-38"),
        ({"temperature": math.nan}, "temperature: expected 1e-06 or more, got nan"),
        ({"temperature": math.inf}, "temperature: expected 1e-06 or more, got inf"),
        ({"top_k": 0}, "top_k: expected None or at least 1, got 0"),
        ({"top_p": 1.5}, "top_p: expected above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "top_p: expected above 0 and at most 1, got nan"),
        ({"guidance": -1.0}, "guidance: expected at least 0 and finite, got -1.0"),
        ({"guidance": math.inf}, "guidance: expected at least 0 and finite, got inf"),
        ({"guidance": math.nan}, "guidance: expected at least 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(model, batch_size=2, **options)
    with pytest.raises(ValueError, match="labels: expected 0 to 9, got 3 to 10"):
        Sampler(model, batch_size=2)(torch.tensor([3, 10]), seeded())


def test_logits_that_are_not_finite_give_no_image():
    labels = torch.tensor([1, 4])
    with pytest.raises(FloatingPointError, match=r"^logits: expected finite numbers, .* guidance of 1e\+38"):
        Sampler(trained_model(), batch_size=2, guidance=1e38, temperature=1e-6)(labels, seeded())
    model = trained_model()
    sampler = Sampler(model, batch_size=2)
    with torch.no_grad():
        model.tok_embeddings.weight.fill_(math.nan)  # read from the second id on
    with pytest.raises(FloatingPointError, match=r"^logits: expected finite numbers"):
        sampler(labels, seeded())
    with torch.no_grad():
        model.tok_embeddings.weight.fill_(0.5)
    assert sampler(labels, seeded()).shape == (2, 4, 4)  # a bad batch leaves nothing behind
    coldest = Sampler(trained_model(), batch_size=2, temperature=1e-6)(labels, seeded())
    assert torch.equal(coldest, Sampler(trained_model(), batch_size=2, top_k=1)(labels, seeded()))


def test_grid_of_images(tmp_path):
    images = np.zeros((5, 32, 32), dtype=np.uint8)
    images[4] = 200
    save_grid(tmp_path / "grid.png", images, columns=3)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 68 + 4, 3 * 68 + 4)  # two rows of three 64-pixel tiles, each image doubled
    assert pixels[4:68, 4:68].max() == 0
    assert (pixels[72:136, 72:136] == 200).all()
    assert (pixels[72:136, 140:204] == 255).all()  # the sixth place is empty
    save_grid(tmp_path / "colour.png", np.zeros((2, 64, 64, 3), dtype=np.uint8), columns=2)
    assert np.asarray(Image.open(tmp_path / "colour.png")).shape == (72, 140, 3)


def test_decoder_network_output_becomes_bytes():
    def decoder(tokens):
        return tokens.float()[:, None].expand(-1, 3, -1, -1) - 1

    images = decode_with(decoder, torch.tensor([[[0, 1], [2, 9]]] * 3), batch_size=2)
    assert images.shape == (3, 2, 2, 3)
    assert images[2, :, :, 1].tolist() == [[0, 128], [255, 255]]


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_graph_chooses_what_the_full_pass_chooses(fast, guidance):
    model = trained_model().cuda()
    labels = torch.tensor([1, 4, 9], device="cuda")
    sampler = Sampler(model, batch_size=2, guidance=guidance, top_k=1, fast=fast)
    tokens = sampler(labels, seeded(device="cuda"))
    assert sampler.graph is not None
    assert (sampler.kernels is not None) == fast
    model.eval()
    with torch.no_grad():
        conditional = full_logits(model, tokens, labels)
        unconditional = full_logits(model, tokens, torch.full_like(labels, 10))
    expected = unconditional + guidance * (conditional - unconditional)
    # the chosen id's logit is the largest, up to the rounding of another order of sums
    chosen = expected.gather(-1, tokens.view(3, 16, 1)).squeeze(-1)
    torch.testing.assert_close(chosen, expected.amax(-1), rtol=0, atol=1e-3)
    assert torch.equal(sampler(labels, seeded(device="cuda")), tokens)
