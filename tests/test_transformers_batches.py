"""Batches for patched models of transformers: padding, documents in a row, parts of a batch, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from npp_kernels.integrations.transformers import apply
from tests.transformers_models import assert_same, flat_batch, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_padding_on_the_right_changes_nothing():
    model = llama()
    ids = tokens(3)
    ids[1, 22:] = 0
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 22:] = -100
    mask[1, 22:] = 0
    apply(model, 4)
    rows = [model(input_ids=ids[row : row + 1, :end], labels=labels[row : row + 1, :end]).loss
            for row, end in ((0, 32), (1, 24), (2, 32))]  # fmt: skip
    counts = torch.tensor([28.0, 18.0, 28.0])
    expected = (torch.stack(rows) * counts).sum() / counts.sum()
    assert_same(model, model(input_ids=ids, labels=labels, attention_mask=mask).loss, expected)


def test_padding_on_the_left_by_a_multiple_changes_nothing_and_otherwise_is_refused():
    model = llama()
    ids = tokens(1, 24)
    apply(model, 4)
    expected = model(input_ids=ids, labels=ids).loss
    padded, mask = F.pad(ids, (8, 0)), F.pad(torch.ones_like(ids), (8, 0))
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 8:12] = -100  # nothing precedes the first patch
    ours = model(input_ids=padded, labels=labels, attention_mask=mask)
    assert_same(model, ours.loss, expected)
    mask[:, 8:10] = 0
    with pytest.raises(ValueError, match="attention_mask: expected padding on the right, or on the left by a multiple"):
        model(input_ids=padded, labels=labels, attention_mask=mask)


@pytest.mark.parametrize("positions_only", [True, False])
def test_documents_in_a_row_are_kept_apart(positions_only):
    model = llama()
    first, second = tokens(1, 16), tokens(1, 24)
    apply(model, 4)
    expected = (12 * model(input_ids=first, labels=first).loss + 20 * model(input_ids=second, labels=second).loss) / 32
    ids = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(16), torch.arange(24))).unsqueeze(0)
    more = {} if positions_only else {
        "cu_seq_lens_q": torch.tensor([0, 16, 40], dtype=torch.int32), "max_length_q": 24,
        "seq_idx": torch.tensor([[0] * 16 + [1] * 24], dtype=torch.int32),
    }  # fmt: skip
    labels = ids.clone()
    labels[0, 0] = labels[0, 16] = -100  # as collators have it; the rest of a first patch is not scored either
    assert_same(model, model(input_ids=ids, labels=labels, position_ids=positions, **more).loss, expected)

    straddling = torch.cat((torch.arange(18), torch.arange(22))).unsqueeze(0)
    with pytest.raises(ValueError, match="position_ids: expected every document to begin at a multiple of patch=4"):
        model(input_ids=ids, labels=ids, position_ids=straddling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(input_ids=b["input_ids"][:, :30], labels=b["labels"][:, :30]), "multiple of patch=4 .* 30"),
        (lambda b: b.update(input_ids=b["input_ids"][:, :4], labels=b["labels"][:, :4]), "at least two patches, got 4"),
        (lambda b: b.update(labels=b["labels"][:, 1:]), "labels: expected the shape of input_ids"),
        (
            lambda b: b.update(labels=F.pad(b["labels"][:, 1:], (0, 1), value=-100)),
            "labels: expected labels that are n",
        ),
        (lambda b: b.update(shift_labels=b["labels"]), "shift_labels: expected labels that are not shifted"),
        (lambda b: b.update(inputs_embeds=torch.zeros(1, 32, 32)), "inputs_embeds: expected input_ids"),
        (lambda b: b.update(token_type_ids=b["labels"]), "token_type_ids: expected None with patch=4"),
        (lambda b: b.update(attention_mask=torch.ones(1, 1, 32, 32)), "attention_mask: expected \\[1, 32\\]"),
        (lambda b: b.update(attention_mask=torch.arange(32)[None] // 16 + 1), "attention_mask: expected 0 and 1"),
        (lambda b: b.update(position_ids=torch.zeros(3, 1, 32)), "position_ids: expected \\[1, 32\\]"),
        (lambda b: b.update(seq_idx=torch.arange(32)[None] // 6), "seq_idx: expected every document to begin"),
        (lambda b: b.update(cu_seq_lens_q=torch.tensor([0, 32])), "position_ids: expected them together with cu"),
        (lambda b: b.update(num_items_in_batch=31), "num_items_in_batch: expected None with patch=4"),
        (lambda b: b.update(return_dict=False), "return_dict: expected True or None"),
    ],
)
def test_a_batch_that_cannot_be_folded_is_refused(change, message):
    model, batch = llama(), flat_batch()
    apply(model, 4)
    model(**batch)
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_at_patch_one_the_model_takes_what_it_always_took():
    model, batch = llama(), flat_batch()
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    batches = [
        {"inputs_embeds": embeddings, "labels": batch["labels"]},
        {**batch, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)},
        {**batch, "num_items_in_batch": 17},
    ]
    expected = [model(**each).loss for each in batches]
    apply(model)
    for each, loss in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(**each).loss, loss)


@pytest.mark.parametrize("normalize", ["target", "row", "slot"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.25, 0.0]])
@pytest.mark.parametrize("scaled", [False, True])
def test_micro_batches_add_up_to_the_batch(normalize, weights, scaled):
    model = llama()
    if scaled:  # with the model's own logits too
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)
    ids = tokens(4)
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    patched = apply(model, 4, normalize=normalize, slot_weights=weights)
    whole = model(input_ids=ids, labels=labels).loss
    batches = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 1), slice(1, 4))]
    num_targets = sum(patched.count(**batch) for batch in batches)
    parts = sum(model(**batch, num_targets=num_targets).loss for batch in batches)
    assert_same(model, parts, whole)
