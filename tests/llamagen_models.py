"""Small models with LlamaGen's and the NPP code's forward, and the comparison of one with itself, patched.

For the tests whose names begin with test_llamagen. The models' classes are those of examples/llamagen_model.py.
"""

import torch
from torch import nn

from examples.llamagen_model import Transformer
from npp_kernels.integrations.llamagen import apply, coarse_rotary_table

SIDE, VOCAB_SIZE, DIM = 8, 50, 16
SIZE = {"vocab_size": VOCAB_SIZE, "block_size": SIDE**2, "dim": DIM, "n_layer": 2, "n_head": 2}


def model_of(kind=Transformer, **options):
    torch.manual_seed(0)
    model = kind(**SIZE, **options)
    nn.init.normal_(model.output.weight, std=0.3)  # at zero the gradient of all else would be zero
    return model.train()


def batch_of(step=0, images=3):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB_SIZE, (images, SIDE**2), generator=generator)
    return tokens, torch.randint(10, (images,), generator=generator)


def coarse(model, p):
    """Return the arguments of the official script at a patch."""
    return {"p": p, "patch_size": p**2, "freqs_cis": coarse_rotary_table(model_of(), p)}


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, grads, strict=True))


def assert_same_gradients(ours, theirs, **tolerance):
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def both(model, *arguments, seed=1, **options):
    """Return loss and gradients of the patched model, and of itself."""
    results = []
    for patched in (True, False):
        undo = apply(model).undo if patched else (lambda: None)
        torch.manual_seed(seed)
        logits, loss = model(*arguments, **options)
        undo()
        assert (logits is None) == patched
        results.append((loss.detach(), gradients(model, loss)))
    return results


def assert_equal(results):
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert_same_gradients(our_gradients, their_gradients, rtol=1e-4, atol=8e-7)
