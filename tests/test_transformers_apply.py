"""Patching a model of transformers and undoing it: what it leaves alone, copies, wrappers, a change of the patch."""

import copy
import doctest
import inspect
import subprocess
import sys

import pytest
import torch

from npp_kernels.integrations.transformers import apply
from tests.processes import environment
from tests.transformers_models import flat_batch, llama, tokens

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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


def test_the_example_of_apply_runs():
    source = apply.__doc__.replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(source, {"apply": apply}, "apply", None, None)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_modules_need_no_transformers():
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['transformers', 'accelerate', 'peft', 'trl']))\n"
        "from npp_kernels.integrations import transformers, transformers_trainer\n"
        "print(transformers_trainer.PatchCollator(4, 0)([{'input_ids': [1, 2, 3]}])['input_ids'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout == "[[1, 2, 3, 0, 0, 0, 0, 0]]\n", done.stderr
