"""The k-means tokenizer, the IDX reader and the embedded tokens."""

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest

from reference import tokenizer as tokenizer_module
from reference.tokenizer import (
    EMBEDDED_TOKENS,
    FASHION_MNIST,
    Tokenizer,
    load_fashion_mnist,
    load_tokens,
    place,
    psnr,
    read_idx,
    unigram_entropy,
)
from tests.synthetic import write_fashion_mnist, write_idx


def random_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_embedded_tokens_are_what_their_readme_says():
    data = load_tokens()
    assert data.tokens.shape == (2000, 16, 16)
    assert data.tokens.dtype == np.uint16
    assert data.centroids.shape == (512, 4)
    assert data.centroids.dtype == np.float32
    assert data.labels.shape == (2000,)
    assert data.labels.dtype == np.uint8
    assert data.tokens.max() < 512
    assert set(data.labels.tolist()) == set(range(10))
    assert EMBEDDED_TOKENS.stat().st_size < 400_000
    readme = EMBEDDED_TOKENS.with_name("README.md").read_text(encoding="utf-8")
    share = np.bincount(data.tokens.reshape(-1)).max() / data.tokens.size
    assert f"{unigram_entropy(data.tokens):.2f} bits per token" in readme
    assert re.search(rf"share of the most frequent id .*\| {share:.3f} \|", readme)


@pytest.mark.parametrize("channels", [1, 3])  # grey blocks of 4 values, RGB blocks of 12
def test_encode_picks_the_nearest_centroid(channels):
    centroids = random_images((40, 4 * channels)).astype(np.float32)
    images = random_images((3, 6, 10) if channels == 1 else (3, 6, 10, 3), seed=1)
    tokens = Tokenizer(centroids).encode(images)
    assert tokens.shape == (3, 3, 5)
    assert tokens.dtype == np.uint16
    for image, row, column in [(0, 0, 0), (1, 2, 3), (2, 1, 4)]:
        block = images[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1).astype(float)
        distances = ((centroids.astype(float) - block) ** 2).sum(1)
        assert tokens[image, row, column] == distances.argmin()


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_inverts_encode_on_the_centroids_themselves(channels):
    centroids = random_images((40, 4 * channels)).astype(np.float32)
    tokens = np.random.default_rng(1).permutation(40).reshape(2, 4, 5)
    tokenizer = Tokenizer(centroids)
    images = tokenizer.decode(tokens)
    assert images.shape == ((2, 8, 10) if channels == 1 else (2, 8, 10, 3))
    assert np.array_equal(tokenizer.encode(images), tokens)
    assert psnr(images, tokenizer.decode(tokenizer.encode(images))) == np.inf


def test_fit_is_reproducible_sorted_and_better_with_more_centroids():
    ramps = (np.arange(16) * random_images((20, 16, 1)) // 16).astype(np.uint8)
    few, again, many = (Tokenizer.fit(ramps, num_centroids=number) for number in (4, 4, 32))
    assert np.array_equal(few.centroids, again.centroids)
    assert np.all(np.diff(few.centroids.mean(1)) >= 0)
    qualities = [psnr(ramps, tokenizer.decode(tokenizer.encode(ramps))) for tokenizer in (few, many)]
    assert qualities[0] + 6 < qualities[1]  # 8 times the centroids: at least half the error


def test_psnr_and_entropy_known_values():
    black = np.zeros((1, 2, 2), dtype=np.uint8)
    assert psnr(black, black + 255) == 0
    assert psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)
    assert unigram_entropy(np.array([[0, 0, 3, 7]])) == pytest.approx(1.5)


def test_place_moves_and_mirrors():
    image = np.zeros((1, 28, 28), dtype=np.uint8)
    image[0, 5, 7] = 200
    assert place(image)[0, 7, 9] == 200
    assert place(image, down=2, right=-1)[0, 9, 8] == 200
    assert place(image, flip=True)[0, 7, 31 - 9] == 200
    assert place(image, down=1, flip=True).sum() == 200
    with pytest.raises(ValueError, match="at most 2 pixels, got 3 and 0"):
        place(image, down=3)


def test_idx_files(tmp_path):
    array = random_images((3, 4, 5))
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)
    (tmp_path / "short.gz").write_bytes(gzip.compress(gzip.decompress((tmp_path / "a.gz").read_bytes())[:-1]))
    with pytest.raises(ValueError, match="expected 60 bytes"):
        read_idx(tmp_path / "short.gz")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match="expected an IDX file"):
        read_idx(tmp_path / "other.gz")


def test_errors_say_what_was_expected(tmp_path):
    tokenizer = Tokenizer(np.zeros((2, 4), dtype=np.float32))
    with pytest.raises(ValueError, match=r"expected uint8 .* got uint8 of shape \(1, 3, 4\)"):
        tokenizer.encode(random_images((1, 3, 4)))
    with pytest.raises(IndexError, match=r"expected ids in \[0, 2\), got 0 to 2"):
        tokenizer.decode(np.array([[[0, 2]]]))
    with pytest.raises(ValueError, match=r"expected shape \[V, 4\] or \[V, 12\], got \(2, 5\)"):
        Tokenizer(np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist .*github.com/zalandoresearch"):
        load_fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'valid'"):
        load_fashion_mnist("valid", tmp_path)


def test_command_makes_the_file(tmp_path, monkeypatch, capsys):
    write_fashion_mnist(tmp_path)
    out = tmp_path / "tokens.npz"
    monkeypatch.setattr(tokenizer_module, "NUM_CENTROIDS", 8)
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--images", str(tmp_path), "--out", str(out)])
    tokenizer_module.main()
    data = load_tokens(out)
    images, labels = load_fashion_mnist("test", tmp_path)
    fitted = Tokenizer(data.centroids)
    assert np.array_equal(data.tokens, fitted.encode(place(images)))
    assert np.array_equal(data.labels, labels)
    assert psnr(place(images), fitted.decode(data.tokens)) > 20
    assert "unigram entropy" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("tokens*")) == ["tokens.npz"]


def test_embedded_tokens_load_without_scipy_and_sklearn():
    """Benchmarks load them where only NumPy is installed."""
    program = (
        "import sys; sys.modules['scipy'] = sys.modules['sklearn'] = None\n"
        "from reference.tokenizer import Tokenizer, load_tokens\n"
        "data = load_tokens(); Tokenizer(data.centroids).decode(data.tokens[:2])"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_embedded_tokens_are_the_test_images():
    data = load_tokens()
    images, labels = load_fashion_mnist("test")
    padded = place(images[: len(data.tokens)])
    tokenizer = Tokenizer(data.centroids)
    assert np.array_equal(tokenizer.encode(padded), data.tokens)
    assert np.array_equal(labels[: len(data.tokens)], data.labels)
    assert psnr(padded, tokenizer.decode(data.tokens)) > 31.5
