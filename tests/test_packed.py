"""Packed rows in patches, against a loop over documents."""

import pytest
import torch

from npp_kernels.integrations._packed import group_packed

VOCAB_SIZE = 60


def packed_rows(lengths, *, row_length, masked=0.0):
    """Return rows of documents of these lengths as data loaders pack them: tokens, labels, positions."""
    stream = {"tokens": [], "labels": [], "positions": []}
    for length in lengths:
        document = torch.randint(1, VOCAB_SIZE, (length + 1,))
        stream["tokens"].append(document[:-1])
        stream["labels"].append(document[1:].masked_fill(torch.rand(length) < masked, -100))
        stream["positions"].append(torch.arange(length))
    rows = sum(lengths) // row_length
    return [torch.cat(parts)[: rows * row_length].view(rows, row_length) for parts in stream.values()]


def by_documents(tokens, labels, positions, patch):
    """Return the groups, targets and places of each row, found one document after another."""
    rows = []
    for row_tokens, row_labels, row_positions in zip(tokens.tolist(), labels.tolist(), positions.tolist(), strict=True):
        starts = [index for index, place in enumerate(row_positions) if place == 0 or index == 0]
        groups, targets, places = [], [], []
        for start, end in zip(starts, [*starts[1:], len(row_tokens)], strict=True):
            for place in range((end - start) // patch):
                first = start + place * patch
                groups.append(row_tokens[first : first + patch])
                after = row_labels[first + patch - 1 : min(first + 2 * patch - 1, end)]
                targets.append(after + [-100] * (patch - len(after)))
                places.append(place)
        padding = len(row_tokens) // patch - len(groups)
        rows.append((groups + [[0] * patch] * padding, targets + [[-100] * patch] * padding, places + [0] * padding))
    return [torch.tensor(part) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("masked", [0.0, 0.3])
@pytest.mark.parametrize("patch", [1, 2, 3, 4, 8, 24])
def test_documents_are_grouped_one_by_one(patch, masked):
    # Documents shorter than a patch, of exactly one, of a row, and longer than a row.
    lengths = [1, 2, 3, 4, 5, 8, 24, 7, 60, 1, 1, 1, 24, 48, 17, 2, 9, 13, 30]
    tokens, labels, positions = packed_rows(lengths, row_length=24, masked=masked)
    ours = group_packed(tokens, labels, patch, positions=positions)
    for value, expected in zip(ours, by_documents(tokens, labels, positions, patch), strict=True):
        assert torch.equal(value, expected)
        assert value.dtype == torch.int64


def test_patches_of_one_are_the_row():
    tokens, labels, positions = packed_rows([5, 11, 8], row_length=24)
    groups, targets, places = group_packed(tokens, labels, 1, positions=positions)
    assert torch.equal(groups.squeeze(-1), tokens)
    assert torch.equal(targets.squeeze(-1), labels)
    assert torch.equal(places, positions)


def test_nothing_is_scored_twice_and_little_is_left_out():
    lengths = [30, 6, 3, 25]
    tokens, labels, positions = packed_rows(lengths, row_length=64)
    _, targets, _ = group_packed(tokens, labels, 4, positions=positions)
    # All labels of a document but those of its first patch, which nothing predicts; none where there is no patch.
    assert (targets != -100).sum() == (30 - 3) + (6 - 3) + 0 + (25 - 3)


def test_rows_without_positions_are_one_document():
    tokens = torch.randint(VOCAB_SIZE, (3, 13), dtype=torch.int32)
    groups, targets, places = group_packed(tokens[:, :-1], tokens[:, 1:], 3)
    assert torch.equal(groups, tokens[:, :-1].unflatten(1, (4, 3)))
    assert torch.equal(targets[:, :-1], tokens[:, 3:12].unflatten(1, (3, 3)))
    assert targets[:, -1].tolist() == [[last, -100, -100] for last in tokens[:, 12].tolist()]
    assert torch.equal(places, torch.arange(4).expand(3, 4))
    assert groups.dtype == targets.dtype == torch.int32


def test_labels_that_are_not_shifted_are_refused():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    with pytest.raises(ValueError, match=r"labels: expected the token after each token, 2 at \[0, 0\], got 1"):
        group_packed(tokens, tokens, 2)
    with pytest.raises(ValueError, match=r"labels: .* 5 at \[0, 3\], got 6"):  # a document's start that no one told of
        group_packed(tokens, torch.tensor([[2, 3, 4, 6, -100, 7, 8, 9]]), 2)


def test_errors_name_the_argument():
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="patch: expected a size that divides the row length 8, got 3"):
        group_packed(tokens, tokens, 3)
    with pytest.raises(ValueError, match="patch: expected a size that divides the row length 8, got 0"):
        group_packed(tokens, tokens, 0)
    with pytest.raises(ValueError, match=r"labels: expected \[B, L\] as tokens, \(2, 8\), got \(2, 4\)"):
        group_packed(tokens, tokens[:, :4], 2)
    with pytest.raises(ValueError, match=r"positions: expected \[B, L\] as tokens"):
        group_packed(tokens, tokens, 2, positions=torch.arange(8))
    with pytest.raises(TypeError, match="tokens: expected an integer dtype, got"):
        group_packed(tokens.float(), tokens, 2)


@pytest.mark.parametrize("column", [0, 3, 6])
def test_one_wrong_label_is_enough(column):
    """The first, and the last whose next token is in the row; what comes behind the row nobody knows."""
    tokens = torch.arange(1, 9).view(1, 8)
    labels = tokens + 1
    labels[0, 7] = 40
    group_packed(tokens, labels, 2)
    labels[0, column] = 41
    with pytest.raises(
        ValueError, match=rf"labels: expected the token after each token, {column + 2} at \[0, {column}\]"
    ):
        group_packed(tokens, labels, 2)


@pytest.mark.parametrize("shape", [(1, 7), (1, 9), (2, 8)])
def test_tensors_of_other_shapes_are_refused(shape):
    tokens = torch.ones(1, 8, dtype=torch.int64)
    for name in ("labels", "positions"):
        given = {"labels": tokens, "positions": tokens} | {name: torch.ones(shape, dtype=torch.int64)}
        with pytest.raises(ValueError, match=rf"{name}: expected \[B, L\] as tokens, \(1, 8\)"):
            group_packed(tokens, given["labels"], 2, positions=given["positions"])
