"""Data for the trainer: every source, disjoint splits, and variants that depend on seed, epoch and index alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reference.tokenizer import load_fashion_mnist, place
from reference.tokens.codes import VARIANTS, ArrayDataset, load_dataset, load_tokenizer
from tests.synthetic import write_fashion_mnist


def write_codes(directory, num_images=5, num_variants=10, *, size=256, first=0):
    """Write LlamaGen's format; code (image, variant, cell) is recognisable by its value."""
    for kind in ("codes", "labels"):
        (directory / f"imagenet{size}_{kind}").mkdir(parents=True)
    for image in range(num_images):
        codes = first + 1000 * image + 20 * np.arange(num_variants)[:, None] + np.arange(16)
        np.save(directory / f"imagenet{size}_codes" / f"{image}.npy", codes[None])
        np.save(directory / f"imagenet{size}_labels" / f"{image}.npy", np.array([7 * image]))


def write_npz(path, **replaced):
    generator = np.random.default_rng(0)
    arrays = {
        "train": generator.integers(0, 30, (12, 4, 4)).astype(np.uint16),
        "test": generator.integers(0, 30, (5, 4, 4)).astype(np.uint16),
        "train_labels": np.arange(12, dtype=np.uint8) % 3,
        "test_labels": np.arange(5, dtype=np.uint8) % 3,
        "centroids": generator.random((32, 12)).astype(np.float32),
    }
    np.savez(path, **{name: array for name, array in (arrays | replaced).items() if array is not None})
    return arrays


def test_embedded_splits_share_no_image():
    train, test = load_dataset("embedded", "train"), load_dataset("embedded", "test")
    assert (len(train), len(test)) == (1600, 400)
    images = {tokens.tobytes() for tokens in train.tokens}
    assert len(images) == 1600
    assert not images & {tokens.tobytes() for tokens in test.tokens}
    assert np.bincount(test.labels, minlength=10).min() > 20


def test_an_item_is_a_grid_of_int64_and_a_label():
    data = load_dataset("embedded", "train")
    tokens, label = data[3]
    assert tokens.dtype == torch.int64
    assert tokens.shape == data.grid == (16, 16)
    assert isinstance(label, int)
    assert (data.vocab_size, data.num_classes) == (512, 10)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert torch.equal(batch[0][3], tokens)
    assert batch[1][3] == label
    with pytest.raises(IndexError, match="expected 0 to 1599, got 1600"):
        data[1600]


def test_fashion_mnist_variants(tmp_path):
    write_fashion_mnist(tmp_path)
    train = load_dataset(f"fashion_mnist:{tmp_path}", "train", cache=tmp_path / "cache")
    images, labels = load_fashion_mnist("train", tmp_path)
    tokenizer = load_tokenizer(f"fashion_mnist:{tmp_path}")
    assert train.num_variants == len(VARIANTS) == 10
    for variant, (down, right, flip) in enumerate(VARIANTS):
        expected = tokenizer.encode(place(images, down=down, right=right, flip=flip))
        assert np.array_equal(train.read(np.arange(30), np.full(30, variant))[0], expected)
    assert np.array_equal(train.batch(range(30))[0].numpy(), tokenizer.encode(place(images)))
    assert train.batch(range(30))[1].tolist() == labels.tolist()
    test = load_dataset(f"fashion_mnist:{tmp_path}", "test", cache=tmp_path / "cache")
    assert np.array_equal(test.batch(range(10))[0].numpy(), tokenizer.encode(test.images))
    assert np.array_equal(test.images, place(load_fashion_mnist("test", tmp_path)[0]))
    assert test.num_variants == 1
    assert len(test) == 10


def test_fashion_mnist_tokens_are_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path)
    spec, cache = f"fashion_mnist:{tmp_path}", tmp_path / "cache"
    monkeypatch.setattr("reference.tokens.codes.os.replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_dataset(spec, "train", cache=cache)
    assert list(cache.glob("*.npy")) == []  # stopped: nothing under the final name
    monkeypatch.undo()
    first = load_dataset(spec, "train", cache=cache)
    assert len(list(cache.glob("*.npy"))) == 1
    with monkeypatch.context() as context:
        context.setattr("reference.tokenizer.Tokenizer.encode", None)  # a second call tokenizes nothing
        again = load_dataset(spec, "train", cache=cache)
    assert np.array_equal(first.tokens, again.tokens)
    write_fashion_mnist(tmp_path, num_train=31)  # other images: other tokens, not the kept ones
    assert len(load_dataset(spec, "train", cache=cache)) == 31


def test_code_directories(tmp_path):
    write_codes(tmp_path / "ten_crop")
    write_codes(tmp_path / "wider", num_variants=2, first=10_000)
    write_codes(tmp_path / "validation", num_images=3, num_variants=2)
    spec = f"codes:{tmp_path}/ten_crop+{tmp_path}/wider,{tmp_path}/validation"
    train, test = load_dataset(spec, "train"), load_dataset(spec, "test")
    assert (len(train), train.num_variants, train.grid) == (5, 12, (4, 4))
    assert (train.vocab_size, train.num_classes) == (16_384, 1000)
    tokens, labels = train.read(np.array([2, 2, 4]), np.array([0, 11, 9]))
    assert tokens[0].tolist() == (2000 + np.arange(16)).reshape(4, 4).tolist()
    assert tokens[:, 0, 0].tolist() == [2000, 12_020, 4180]
    assert labels.tolist() == [14, 14, 28]
    assert train[1][0][0, 0] == 1080  # without augmentation: the centre crop, the fifth of ten
    assert len(test) == 3
    assert test[1][0][0, 0] == 1000  # of image and mirror image: the image


def test_code_directory_holds_out_one_in_a_hundred(tmp_path):
    write_codes(tmp_path, num_images=200, num_variants=1, size=384)
    train, test = load_dataset(f"codes:{tmp_path}", "train"), load_dataset(f"codes:{tmp_path}", "test")
    assert test.numbers.tolist() == [99, 199]
    assert sorted([*train.numbers, *test.numbers]) == list(range(200))


def test_code_directory_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected one folder such as imagenet256_codes.* found \[\]"):
        load_dataset(f"codes:{tmp_path}", "train")
    (tmp_path / "imagenet256_codes").mkdir()
    with pytest.raises(FileNotFoundError, match="imagenet256_labels is missing"):
        load_dataset(f"codes:{tmp_path}", "train")
    (tmp_path / "imagenet256_labels").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected files 0.npy, 1.npy, …, found none"):
        load_dataset(f"codes:{tmp_path}", "train")
    np.save(tmp_path / "imagenet256_codes/0.npy", np.zeros((1, 10, 17)))
    with pytest.raises(ValueError, match=r"of a square grid, got shape \(1, 10, 17\)"):
        load_dataset(f"codes:{tmp_path},{tmp_path}", "train")
    np.save(tmp_path / "imagenet256_codes/0.npy", np.full((1, 10, 16), 16_384))
    np.save(tmp_path / "imagenet256_labels/0.npy", np.zeros(1))
    with pytest.raises(ValueError, match=r"0\.npy: expected whole numbers in \[0, 16384\), got 16384"):
        load_dataset(f"codes:{tmp_path},{tmp_path}", "train")[0]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("codes", np.full((1, 10, 16), -1), r"expected whole numbers in \[0, 16384\), got -1"),
        ("codes", np.full((1, 10, 16), 435.7), r"expected whole numbers in \[0, 16384\), got 435\.7"),
        ("codes", np.full((1, 10, 16), np.nan), r"expected whole numbers in \[0, 16384\), got nan"),
        ("codes", np.full((1, 10, 16), "a"), r"expected whole numbers in \[0, 16384\), got the type <U1"),
        ("codes", np.zeros((1, 9, 16)), r"expected an array of shape \(1, 10, 16\), .*, got \(1, 9, 16\)"),
        ("codes", np.zeros(()), r"expected an array of shape \(1, 10, 16\), .*, got \(\)"),
        ("codes", b"", "expected a whole .npy file, it cannot be read"),
        ("codes", b"half", "expected a whole .npy file, it cannot be read"),
        ("labels", np.array([1000]), r"expected whole numbers in \[0, 1000\), got 1000"),  # the row of no class
        ("labels", np.array([-1]), r"expected whole numbers in \[0, 1000\), got -1"),
        ("labels", np.array([7.5]), r"expected whole numbers in \[0, 1000\), got 7\.5"),
        ("labels", np.array([7, 7]), r"expected one label, got an array of shape \(2,\)"),
        ("labels", np.array([]), r"expected one label, got an array of shape \(0,\)"),
        ("labels", b"", "expected a whole .npy file, it cannot be read"),
    ],
)
def test_a_bad_file_of_a_code_directory_is_named(tmp_path, kind, content, message):
    write_codes(tmp_path)
    data = load_dataset(f"codes:{tmp_path},{tmp_path}", "train")
    path = tmp_path / f"imagenet256_{kind}" / "3.npy"
    if isinstance(content, bytes):
        path.write_bytes(path.read_bytes()[:-8] if content == b"half" else content)
    else:
        np.save(path, content)
    assert data[2][1] == 14
    with pytest.raises(ValueError, match=rf"imagenet256_{kind}/3\.npy: {message}"):
        data[3]


def test_the_first_file_of_a_code_directory_is_named(tmp_path):
    write_codes(tmp_path)
    path = tmp_path / "imagenet256_codes" / "0.npy"
    for content, message in ((np.zeros(()), r"of a square grid, got shape \(\)"), (None, "cannot be read")):
        np.save(path, content) if content is not None else path.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"imagenet256_codes/0\.npy: .*{message}"):
            load_dataset(f"codes:{tmp_path},{tmp_path}", "train")


def test_joined_directories_agree_on_labels(tmp_path):
    for name in ("first", "second"):
        write_codes(tmp_path / name)
    np.save(tmp_path / "second/imagenet256_labels/2.npy", np.array([15]))
    data = load_dataset(f"codes:{tmp_path}/first+{tmp_path}/second,{tmp_path}/first", "train")
    assert data[1][1] == 7
    message = (
        r"second/imagenet256_labels/2\.npy: expected the label 14, as in .*first/imagenet256_labels/2\.npy, got 15"
    )
    with pytest.raises(ValueError, match=message):
        data[2]


def test_strange_names_in_a_code_directory(tmp_path):
    write_codes(tmp_path, num_images=100, num_variants=1)
    codes = tmp_path / "imagenet256_codes"
    (codes / ".tmp123.npy").write_bytes(b"half of an image")
    assert len(load_dataset(f"codes:{tmp_path}", "test")) == 1
    (codes / "tmp123.npy").write_bytes(b"half of an image")
    with pytest.raises(ValueError, match=r"imagenet256_codes: expected files 0\.npy, 1\.npy, …, found tmp123\.npy"):
        load_dataset(f"codes:{tmp_path}", "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_small_code_directory_needs_a_test_split(tmp_path, split):
    write_codes(tmp_path, num_images=99, num_variants=1)
    with pytest.raises(ValueError, match="expected at least 100 images, one in 100 of which is for testing, found 99"):
        load_dataset(f"codes:{tmp_path}", split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", np.full((12, 4, 4), 32), r"train: expected whole numbers in \[0, 32\), got 32"),
        ("test", np.full((5, 4, 4), -1), r"test: expected whole numbers in \[0, 32\), got -1"),
        ("train", np.full((12, 4, 4), 1.5), r"train: expected whole numbers in \[0, 32\), got 1\.5"),
        ("train_labels", np.full(12, -1), r"train_labels: expected whole numbers in \[0, 3\), got -1"),
    ],
)
def test_bad_ids_of_an_npz_are_named(tmp_path, name, content, message):
    write_npz(tmp_path / "tokens.npz", **{name: content})
    with pytest.raises(ValueError, match=rf"tokens\.npz, {message}"):
        load_dataset(f"npz:{tmp_path}/tokens.npz", "train")


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "npy"])
def test_a_damaged_npz_is_named(tmp_path, damage):
    path = tmp_path / "tokens.npz"
    arrays = write_npz(path)
    whole = path.read_bytes()
    place = whole.index(arrays["train"].tobytes()) + 9
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "flipped": flipped}.get(damage, b""))
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, arrays["train"])
    with pytest.raises(ValueError, match=r"tokens\.npz: expected a whole \.npz file, it cannot be read"):
        load_dataset(f"npz:{path}", "train")
    if damage != "flipped":  # the images, which the tokenizer does not read
        with pytest.raises(ValueError, match=r"tokens\.npz: expected a whole \.npz file, it cannot be read"):
            load_tokenizer(f"npz:{path}")


def test_npz(tmp_path):
    path = tmp_path / "tokens.npz"
    arrays = write_npz(path)
    test = load_dataset(f"npz:{path}", "test")
    assert (test.vocab_size, test.num_classes, test.grid, len(test)) == (32, 3, (4, 4), 5)
    assert np.array_equal(load_tokenizer(f"npz:{path}").centroids, arrays["centroids"])
    assert test[2][0].tolist() == arrays["test"][2].tolist()
    write_npz(path, centroids=None)
    assert load_dataset(f"npz:{path}", "train").vocab_size == 30
    assert load_tokenizer(f"npz:{path}") is None
    write_npz(path, test_labels=None)
    with pytest.raises(ValueError, match=r"\['test_labels'\] missing"):
        load_dataset(f"npz:{path}", "train")


def test_npz_mirrored(tmp_path):
    path = tmp_path / "tokens.npz"
    # Grey blocks of which 0 and 1 are each other's mirror image, 2 its own, and 3 nearer to 0's than to anything else.
    centroids = np.float32([[0, 200, 0, 200], [200, 0, 200, 0], [90, 90, 90, 90], [190, 10, 190, 10]])
    train = np.array([[[0, 2, 2, 2]] * 4, [[1, 0, 2, 3]] * 4], dtype=np.uint16)
    test = np.zeros((5, 4, 4), np.uint16)
    write_npz(path, train=train, train_labels=np.zeros(2, np.uint8), test=test, centroids=centroids)
    mirrored, plain = load_dataset(f"npz_mirrored:{path}", "train"), load_dataset(f"npz:{path}", "train")
    assert (mirrored.num_variants, plain.num_variants) == (2, 1)
    assert np.array_equal(mirrored.tokens[:, :1], plain.tokens)
    assert mirrored.tokens[:, 1].tolist() == [[[2, 2, 2, 1]] * 4, [[0, 2, 1, 0]] * 4]
    assert load_dataset(f"npz_mirrored:{path}", "test").num_variants == 1
    assert np.array_equal(load_tokenizer(f"npz_mirrored:{path}").centroids, centroids)
    write_npz(path, centroids=None)
    with pytest.raises(ValueError, match=r"\['centroids'\] missing"):
        load_dataset(f"npz_mirrored:{path}", "train")


def marked_dataset(num_images, num_variants, seed=0):
    """Return a dataset whose tokens tell which variant was read."""
    tokens = np.broadcast_to(np.arange(num_variants, dtype=np.uint16)[:, None, None], (num_images, num_variants, 2, 2))
    labels = np.zeros(num_images, dtype=np.uint8)
    return ArrayDataset(tokens, labels, vocab_size=num_variants, num_classes=1, seed=seed)


def test_variants_depend_on_seed_epoch_and_index_alone():
    data = marked_dataset(500, 10)
    drawn = data.batch(range(500), epoch=3)[0][:, 0, 0]
    # a fresh dataset, read in another order and one by one, reads the same: a resumed run sees what it would have seen
    resumed = marked_dataset(500, 10)
    resumed.batch(range(500), epoch=9)
    assert [int(resumed[3, index][0][0, 0]) for index in (499, 0, 250)] == drawn[[499, 0, 250]].tolist()
    assert not torch.equal(drawn, data.batch(range(500), epoch=4)[0][:, 0, 0])
    assert not torch.equal(drawn, marked_dataset(500, 10, seed=1).batch(range(500), epoch=3)[0][:, 0, 0])
    # without an epoch: the plain image
    assert data.batch(range(500))[0].max() == 0


def test_fingerprints_tell_data_apart():
    generator = np.random.default_rng(0)
    tokens, labels = generator.integers(0, 9, (300, 2, 4, 4)), np.arange(300) % 5

    def of(tokens=tokens, labels=labels, seed=0):
        return ArrayDataset(tokens, labels, vocab_size=9, num_classes=5, seed=seed).fingerprint()

    assert of() == of(tokens.astype(np.uint16), labels.astype(np.uint8), seed=1)  # the same data, kept in another way
    assert of()["images"] == 300
    assert len({of()["content"], of(tokens[::-1])["content"], of(labels=labels[::-1])["content"]}) == 3
    assert of(tokens[:1], labels[:1])["images"] == 1


def test_variants_are_drawn_evenly():
    data = marked_dataset(2000, 10)
    counts = np.bincount(np.concatenate([data.variants(np.arange(2000), epoch) for epoch in range(10)]))
    # 20,000 draws of probability 0.1: a standard deviation of 42; five of them either way
    assert counts.min() > 1788
    assert counts.max() < 2212
    # an image is not stuck with one variant, nor does it walk through them in step with its neighbours
    of_epochs = np.stack([data.variants(np.arange(2000), epoch) for epoch in range(2)])
    assert 0.05 < (of_epochs[0] == of_epochs[1]).mean() < 0.15


def test_tokenizers_need_no_data():
    assert load_tokenizer("fashion_mnist:nowhere").channels == load_tokenizer("embedded").channels == 1
    assert load_tokenizer("codes:nowhere") is None


def test_unknown_names():
    with pytest.raises(ValueError, match="expected embedded, fashion_mnist"):
        load_dataset("cifar", "train")
    with pytest.raises(ValueError, match="got 'codes'"):
        load_dataset("codes", "train")
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'valid'"):
        load_dataset("embedded", "valid")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz is missing"):
        load_dataset("npz:nowhere.npz", "train")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_dataset("fashion_mnist:nowhere", "train")
