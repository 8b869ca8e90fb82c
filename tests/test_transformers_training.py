"""Training patched models of transformers: checkpointed, with dropout, compiled, in bf16, on a GPU, as a graph."""

import pytest
import torch
import torch.nn.functional as F

from npp_kernels import check_ids
from npp_kernels.integrations.transformers import apply
from tests.transformers_models import assert_same, flat_batch, llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_gradient_checkpointing():
    model, batch = llama().train(), flat_batch()
    apply(model, 4)
    expected = model(**batch).loss
    model.gradient_checkpointing_enable()
    assert_same(model, model(**batch).loss, expected)


def test_dropout_is_drawn_as_in_the_models_own_forward():
    model, batch = llama(attention_dropout=0.5).train(), flat_batch()
    torch.manual_seed(3)
    own = model(**batch).loss
    state = torch.get_rng_state()
    assert apply(model).formulation.fused
    assert torch.equal(torch.get_rng_state(), state)  # looking at the model takes no random numbers
    torch.manual_seed(3)
    assert_same(model, model(**batch).loss, own)


def test_compiled_without_a_break_and_what_it_cannot_look_at_is_nan():
    model, batch = llama(num_hidden_layers=1), flat_batch()
    patched = apply(model, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for patch in (4, 1):
        patched.patch = patch
        assert_same(model, compiled(**batch).loss, model(**batch).loss)
    patched.patch = 4
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0
    assert compiled(**batch, attention_mask=mask).loss.isnan()
    with pytest.raises(ValueError, match="attention_mask: expected padding"):
        patched.check(**batch, attention_mask=mask)


def test_autocast_reaches_the_model():
    model, batch = llama(), flat_batch()
    apply(model, 4)
    expected = model(**batch).loss
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(loss, expected, atol=0.05, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu():
    model, batch = llama(), flat_batch()
    patched = apply(model, 4)
    expected = model(**batch).loss
    patched.undo()
    model.cuda()
    batch = {name: value.cuda() for name, value in batch.items()}
    apply(model, 4)
    torch.testing.assert_close(model(**batch).loss.cpu(), expected, atol=1e-3, rtol=1e-3)
    shifted = {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}
    loss = model(**shifted).loss
    assert loss.isnan()  # without a look at the values, which would wait for the GPU
    check_ids(True)
    try:
        with pytest.raises(ValueError, match="labels: expected labels that are not shifted"):
            model(**shifted)
    finally:
        check_ids(False)


@pytest.mark.gpu
def test_a_cuda_graph_captures_the_step():
    model, batch = llama().cuda(), {name: value.cuda() for name, value in flat_batch().items()}
    apply(model, 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            expected = model(**batch).loss
            expected.backward()
        stream.synchronize()
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = model(**batch).loss
            loss.backward()
        graph.replay()
        stream.synchronize()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("patch", [1, 4])
def test_a_captured_step_is_not_asked_whether_it_is_packed(patch, monkeypatch):
    """Without a cache transformers looks at the positions' values, which waits for the GPU: a graph cannot."""
    from transformers import masking_utils

    from npp_kernels import _recorder

    looked, look = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: looked.append(1) or look(ids))
    model, ids = llama(), tokens()
    apply(model, patch)
    plain = model(input_ids=ids, labels=ids).loss
    assert looked  # so that this test notices when transformers does it otherwise
    looked.clear()
    with _recorder._step_running():
        loss = model(input_ids=ids, labels=ids).loss
        assert not looked
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        model(input_ids=ids, labels=ids, position_ids=positions)
        assert looked  # positions of packed documents are not overlooked
    assert loss == plain
