"""LlamaGen's and the official NPP forward, patched: on a stand-in with their surface, against its expanded logits."""

import pytest
import torch

from examples.llamagen_model import PlainTransformer, Transformer
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table
from tests.llamagen_models import DIM, SIDE, assert_equal, batch_of, both, coarse, model_of


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_is_the_official_formulation(p, dropout):
    tokens, labels = batch_of()
    model = model_of(dropout=dropout, class_dropout=dropout)
    assert_equal(both(model, idx=tokens, cond_idx=labels, targets=tokens, **coarse(model, p)))


@pytest.mark.parametrize("p", [1, 4])
def test_the_table_may_be_left_out(p):
    tokens, labels = batch_of()
    model = model_of()
    with apply(model):
        given = model(tokens, labels, targets=tokens, **coarse(model, p))[1]
        assert model(tokens, labels, targets=tokens, p=p)[1] == given


def test_captions():
    model = model_of(model_type="t2i", cls_token_num=5, class_dropout=0.5)
    tokens, _ = batch_of()
    captions = torch.randn(3, 5, 24)
    for p in (1, 2):
        table = coarse_rotary_table(model, p)
        options = {"p": p, "patch_size": p**2, "freqs_cis": table}
        assert_equal(both(model, idx=tokens, cond_idx=captions, targets=tokens, **options))
        model = model_of(model_type="t2i", cls_token_num=5, class_dropout=0.5)  # its forward has kept the coarse table


@pytest.mark.parametrize("valid", [(1, 0, 1), (0, 0, 0), (1.0, 0.25, 0.5), (0.001, 0.0, 0.0)])
@pytest.mark.parametrize("kind", [Transformer, PlainTransformer])
def test_valid(kind, valid):
    tokens, labels = batch_of()
    inputs = tokens if kind is Transformer else tokens[:, :-1]
    results = both(model_of(kind), idx=inputs, cond_idx=labels, targets=tokens, valid=torch.tensor(valid))
    assert_equal(results)


def test_valid_at_a_coarse_patch():
    """There the official code has no loss: by the images that count, one by one."""
    tokens, labels = batch_of()
    model = model_of()
    with apply(model):
        single = [model(tokens[i : i + 1], labels[i : i + 1], targets=tokens[i : i + 1], p=2)[1] for i in range(3)]
        weights = torch.tensor([1.0, 0.0, 0.5])
        loss = model(tokens, labels, targets=tokens, valid=weights, p=2)[1]
    torch.testing.assert_close(loss, (single[0] + 0.5 * single[2]) / 1.5)


def test_a_model_without_patches_and_its_own_caller():
    tokens, labels = batch_of()
    model = model_of(PlainTransformer, dropout=0.2)
    assert_equal(both(model, idx=tokens[:, :-1], cond_idx=labels, targets=tokens))
    npp = model_of()
    for p in (1, 2, 8):  # and on patches it is what NPP's forward is, with or without the last token
        expected = npp(idx=tokens, cond_idx=labels, targets=tokens, **coarse(npp, p))[1]
        with apply(model_of(PlainTransformer)) as patched:
            for inputs in (tokens, tokens[:, :-1]):
                torch.testing.assert_close(patched.model(inputs, labels, targets=tokens, p=p)[1], expected)


def test_masks_of_texts():
    model = model_of(PlainTransformer, model_type="t2i", cls_token_num=5)
    tokens, captions = batch_of()[0], torch.randn(3, 5, 24)
    mask = torch.ones(5 + SIDE**2 - 1, 5 + SIDE**2 - 1, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    mask[0, :, :, :2] = mask[0, :, :, :2] & torch.eye(mask.shape[-1], dtype=torch.bool)[:, :2]
    mask = mask.view(3, 1, *mask.shape[-2:])
    assert_equal(both(model, idx=tokens[:, :-1], cond_idx=captions, targets=tokens, mask=mask))
    with apply(model):
        with pytest.raises(ValueError, match=r"mask: expected \[\.\.\., 20, 20\] for patch 2, got \(3, 1, 68, 68\)"):
            model(tokens, captions, targets=tokens, mask=mask, p=2)
        assert model(tokens, captions, targets=tokens, mask=mask[..., :20, :20], p=2)[1].isfinite()


def test_evaluation_is_training_without_dropout():
    tokens, labels = batch_of()
    model, plain = model_of(dropout=0.5, class_dropout=0.5), model_of()
    apply(model.eval())
    for p in (1, 4):
        expected = plain(idx=tokens, cond_idx=labels, targets=tokens, **coarse(plain, p))[1]
        torch.testing.assert_close(model(tokens, labels, targets=tokens, p=p)[1], expected)
    # As LlamaGen's own forward has it, with positions given.
    own = model_of(PlainTransformer).eval()
    positions = torch.arange(SIDE**2)
    expected = own(tokens[:, :-1], labels, positions, tokens)[1]
    with apply(own):
        torch.testing.assert_close(own(tokens[:, :-1], labels, positions, tokens)[1], expected)


def test_the_coarse_table_is_that_of_a_coarse_grid():
    from examples.llamagen_model import rotary_table

    for conditions in (1, 5):
        model = model_of(model_type="t2i", cls_token_num=conditions)
        for p in (1, 2, 4, 8):
            assert torch.equal(coarse_rotary_table(model, p), rotary_table(SIDE // p, DIM // 2, conditions))
