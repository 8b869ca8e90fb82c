"""Causal language models of transformers, patched: the packages are real, the models tiny and random."""

import copy
import doctest
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.processes import environment

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from bench import transformers_sweep as sweep  # noqa: E402
from npp_kernels import check_ids  # noqa: E402
from npp_kernels.integrations.transformers import UnsupportedModelError, apply  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
transformers.logging.set_verbosity_error()

VOCAB_SIZE = 128
# Each has something that a loss of one's own loses: scaled embeddings, scaled or capped logits, experts' auxiliary
# loss, multipliers, latent attention, positions that are learnt, no attention, a head with a transform, and so on.
FAMILIES = [
    "llama", "gemma", "gemma2", "gemma3_text", "cohere", "granite", "mixtral", "jetmoe", "falcon_h1", "deepseek_v3",
    "llama4_text", "gpt2", "opt", "mamba", "recurrent_gemma", "xlstm", "bert", "nanochat",
]  # fmt: skip
SOFT_CAPS = {"gemma2", "recurrent_gemma", "xlstm", "nanochat"}


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**{"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, **sizes, **options})
    return spread(transformers.LlamaForCausalLM(config))


def spread(model):
    """Make weights larger than training begins with, so that what is lost shows in the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def tokens(batch=2, length=32):
    return torch.randint(2, 100, (batch, length))


def masked(ids):
    labels = ids.clone()
    labels[0, 5:9] = labels[-1, 20:] = -100
    return labels


def expected_loss(model, ids, labels, patch, **inputs):
    """Return the loss in plain torch: mean embeddings in, the model's own logits out, targets one by one."""
    embeddings = model.get_input_embeddings()(ids).unflatten(1, (-1, patch)).mean(2)
    logits = model(inputs_embeds=embeddings, use_cache=False, **inputs).logits[:, :-1]
    targets = labels.unflatten(1, (-1, patch))[:, 1:]
    repeated = logits.unsqueeze(2).expand(-1, -1, patch, -1)
    return F.cross_entropy(repeated.flatten(0, 2), targets.flatten())


def assert_same(model, ours, expected):
    """Compare two losses and their gradients, the latter in the norm of all: some are zero but for rounding."""
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    ours, expected = sweep.gradients(model, ours), sweep.gradients(model, expected)
    assert expected.norm() > 0
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_of_a_family(kind):
    model = sweep.small_model(kind)
    ids = tokens()
    labels = masked(ids)
    own = model(input_ids=ids, labels=labels, use_cache=False).loss
    with apply(model) as patched:
        assert patched.formulation.fused
        assert (patched.formulation.softcap is not None) == (kind in SOFT_CAPS)
        outputs = model(input_ids=ids, labels=labels)
        assert outputs.logits is None
        assert_same(model, outputs.loss, own)
        patched.patch = sweep.PATCH
        assert_same(
            model, model(input_ids=ids, labels=labels).loss, sweep.expected_at_patch(model, patched, ids, labels)
        )
    torch.testing.assert_close(model(input_ids=ids, labels=labels, use_cache=False).loss, own)


@pytest.mark.parametrize("kind", ["mixtral", "jetmoe"])
def test_the_auxiliary_loss_of_experts_is_kept(kind):
    model = sweep.small_model(kind)
    ids = tokens()
    with apply(model, 4):
        outputs = model(input_ids=ids, labels=ids)
        without = model(input_ids=ids, labels=ids, output_router_logits=False)
    name = "router_aux_loss_coef" if kind == "mixtral" else "aux_loss_coef"
    weight = getattr(model.config, name)
    assert weight * outputs.aux_loss > 1e-4
    torch.testing.assert_close(outputs.loss, without.loss + weight * outputs.aux_loss)


def seq2seq():
    config = transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def bidirectional():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return spread(transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=VOCAB_SIZE, **sizes)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (seq2seq, "expected a decoder alone, got T5ForConditionalGeneration, which has an encoder"),
        (bidirectional, "see those before it alone, got logits that depend on later tokens"),
        # Their own loss does not shift: labels are expected to be shifted already.
        *[
            (lambda kind=kind: sweep.small_model(kind), "the model's own loss is .*, that of its next tokens")
            for kind in ("bart", "mbart", "mvp", "marian", "blenderbot")
        ],
        (lambda: sweep.small_model("gemma4_text"), "its forward refuses means of embeddings"),
        (lambda: sweep.small_model("gemma3n_text"), "leave model.embed_tokens_per_layer.weight without gradient"),
        (lambda: sweep.small_model("deepseek_v4"), "AttributeError"),  # routes by ids
        (lambda: sweep.small_model("cpmant"), "a forward that takes inputs_embeds, got that of CpmAntForCausalLM"),
    ],
)
def test_a_model_whose_loss_is_not_that_of_its_next_tokens_is_refused(make, message):
    model = make()
    before = set(vars(model))
    with pytest.raises(UnsupportedModelError, match=message):
        apply(model, 4)
    assert set(vars(model)) == before


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_is_more_than_linear_gives_its_own_logits():
    model = llama()
    head = Doubled(32, VOCAB_SIZE, bias=True)
    model.lm_head = head
    ids = tokens()
    expected = expected_loss(model, ids, ids, 4)
    patched = apply(model, 4)
    assert not patched.formulation.fused
    assert "Doubled with a forward of its own" in patched.formulation.reason
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.logits.shape == (2, 8, VOCAB_SIZE)
    assert_same(model, outputs.loss, expected)


def test_a_head_with_a_bias_is_fused():
    model = llama()
    model.lm_head = nn.Linear(32, VOCAB_SIZE)
    ids = tokens()
    expected = expected_loss(model, ids, ids, 4)
    assert apply(model, 4).formulation.fused
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)


def test_arithmetic_that_nothing_names_is_left_to_the_model():
    class Squashed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, labels=None, **options):
            outputs = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
            outputs.logits = outputs.logits.sinh()
            if labels is not None:
                outputs.loss = self.loss_function(outputs.logits, labels, vocab_size=VOCAB_SIZE)
            return outputs

    model = spread(Squashed(llama().config))
    ids = tokens()
    own, expected = model(input_ids=ids, labels=ids).loss, expected_loss(model, ids, ids, 4)
    patched = apply(model)
    assert patched.formulation.reason == "the logits are not hidden · Wᵀ + b, nor a known function of it"
    assert_same(model, model(input_ids=ids, labels=ids).loss, own)
    patched.patch = 4
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)


def test_a_hook_that_comes_later_ends_the_fusing():
    model = llama()
    apply(model, 4)
    ids = tokens()
    assert model(input_ids=ids, labels=ids).logits is None
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.logits is not None
    assert_same(model, outputs.loss, expected_loss(model, ids, ids, 4))


def test_a_head_of_zeros_is_still_told_apart():
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.tanh())
    assert not apply(model).formulation.fused
    assert not model.lm_head.weight.any()


@pytest.mark.parametrize("padding", [None, 0])
def test_what_an_embedding_does_besides_is_kept(padding):
    model = llama(pad_token_id=padding)
    ids = tokens()
    ids[:, 3:8] = 0
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * 7)
    expected = expected_loss(model, ids, ids, 4)
    apply(model, 4)
    assert_same(model, model(input_ids=ids, labels=ids).loss, expected)
    handle.remove()
    loss = model(input_ids=ids, labels=ids).loss
    assert_same(model, loss, expected_loss(model, ids, ids, 4))
    loss = model(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
    assert gradient[0].any() == (padding is None)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False),
    ],
)
def test_adapters(options, fused):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, init_lora_weights=False, **options))
    ids = tokens()
    own = model(input_ids=ids, labels=ids).loss
    expected = expected_loss(model.get_base_model(), ids, ids, 4)
    patched = apply(model)
    assert patched.formulation.fused == fused
    assert_same(model, model(input_ids=ids, labels=ids).loss, own)
    patched.patch = 4
    loss = model(input_ids=ids, labels=ids).loss
    assert_same(model, loss, expected)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    untouched = [name for name, value in model.named_parameters() if value.requires_grad and not value.grad.any()]
    assert not untouched


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


def flat_batch():
    ids = tokens(1, 32)
    return {"input_ids": ids, "labels": ids.clone()}


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


def test_the_patch_does_not_change_within_an_accumulation():
    model, batch = llama(), flat_batch()
    patched = apply(model, 4)
    model(**batch).loss.backward()
    patched.patch = 4
    with pytest.raises(ValueError, match="patch: expected to change between steps, from 4 to 1"):
        patched.patch = 1
    model.zero_grad(set_to_none=False)
    patched.patch = (2,)  # as a schedule may have it
    assert patched.patch == 2


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


def test_slot_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="slot_weights: expected one for each token of patch=4, got 3"):
        apply(llama(), 4, slot_weights=[1, 1, 1])


def test_without_labels_and_after_undo_the_model_is_its_own():
    model = llama()
    ids, keys, before = tokens(), list(model.state_dict()), set(vars(model))
    logits, generated = model(input_ids=ids).logits, model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    signature, own = inspect.signature(model.forward), model(input_ids=ids, labels=ids)
    patched = apply(model, 4)
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False), generated)
    assert model(input_ids=ids, labels=ids).loss != own.loss
    with patched.paused():
        outputs = model(input_ids=ids, labels=ids)
        assert torch.equal(outputs.loss, own.loss)
        assert torch.equal(outputs.logits, own.logits)
    with pytest.raises(ValueError, match="model: expected one that is not patched"):
        apply(model)
    patched.undo()
    assert set(vars(model)) == before
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, own.loss)


def test_a_wrapper_that_holds_the_patched_forward_calls_the_models_own_after_undo():
    model, batch = llama(), flat_batch()
    own = model(**batch).loss
    patched = apply(model, 4)
    held = model.forward
    model.forward = lambda **inputs: held(**inputs)  # as accelerate does for autocast
    patched.undo()
    assert torch.equal(model(**batch).loss, own)


def test_a_copy_is_patched_by_itself(tmp_path):
    model, batch = llama(), flat_batch()
    patched = apply(model, 4)
    expected = model(**batch)
    twin = copy.deepcopy(model)
    outputs = twin(**batch)
    assert outputs.logits is None
    assert torch.equal(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    patched.undo()
    assert torch.equal(twin(**batch).loss, expected.loss)
    twin.save_pretrained(tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().keys() == model.state_dict().keys()


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


def test_half_precision_models():
    model, batch = llama().to(torch.bfloat16), flat_batch()
    expected = expected_loss(model, batch["input_ids"], batch["labels"], 4)
    assert apply(model, 4).formulation.fused
    torch.testing.assert_close(model(**batch).loss.to(torch.bfloat16), expected, atol=0.05, rtol=0)


def test_the_example_of_apply_runs():
    source = apply.__doc__.replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(source, {"apply": apply}, "apply", None, None)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_no_silent_difference_is_in_the_table():
    page = sweep.PAGE.read_text(encoding="utf-8")
    outcomes = [line.split(" | ")[2] for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(outcomes) > 190
    assert set(outcomes) == {"fused", "own logits", "refused", "own forward fails", "not built"}
    assert outcomes.count("fused") > 130


def test_the_modules_need_no_transformers():
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['transformers', 'accelerate', 'peft', 'trl']))\n"
        "from npp_kernels.integrations import transformers, transformers_trainer\n"
        "print(transformers_trainer.PatchCollator(4, 0)([{'input_ids': [1, 2, 3]}])['input_ids'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout == "[[1, 2, 3, 0, 0, 0, 0, 0]]\n", done.stderr


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
