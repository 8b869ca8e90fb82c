"""The transforms of `torch.func`: refused, by the function's name, and what stands close to them is let through."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import npp_kernels
from npp_kernels._autograd import as_rows
from tests.conftest import TORCH_2_8

GROUPS = torch.tensor([[0, 1], [2, 2], [3, 4]])
FUNCTIONS = {
    "group_mean": (lambda table: npp_kernels.group_mean(table, GROUPS.to(table.device)), (5, 4)),
    "patch_mean": (lambda embeddings: npp_kernels.patch_mean(embeddings, (2, 2)), (4, 6, 3)),
    "patch_cross_entropy": (lambda logits: npp_kernels.patch_cross_entropy(logits, GROUPS.to(logits.device)), (3, 5)),
    "linear_patch_cross_entropy": (
        lambda hidden: npp_kernels.linear_patch_cross_entropy(
            hidden, torch.eye(5, device=hidden.device), GROUPS.to(hidden.device)
        ),
        (3, 5),
    ),
}
TRANSFORMS = {
    "vmap": lambda function, x: torch.vmap(function)(x[None]),
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
    "vectorize": lambda function, x: torch.autograd.functional.jacobian(function, x, vectorize=True),
    "is_grads_batched": lambda function, x: torch.autograd.grad(
        function(x.requires_grad_()).sum(), x, torch.ones(2, device=x.device), is_grads_batched=True
    ),
    "vmap of the backward": lambda function, x: torch.vmap(
        functools.partial(torch.autograd.grad, function(x.requires_grad_()).sum(), x)
    )(torch.ones(2, device=x.device)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own jvp compiles with it
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused(device, name, transform):
    function, shape = FUNCTIONS[name]
    with pytest.raises(RuntimeError, match=rf"^{name}: expected plain tensors, got .*torch\.autograd\.grad"):
        TRANSFORMS[transform](function, torch.randn(shape, device=device))


def test_ids_under_vmap_are_refused(device):
    table, groups = torch.randn(5, 4, device=device), GROUPS.to(device)
    with pytest.raises(RuntimeError, match=r"^group_mean: expected plain tensors"):
        torch.vmap(lambda ids: npp_kernels.group_mean(table, ids))(groups[None])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_after_a_transform_and_in_what_is_none(device, name):
    """A transform that has ended leaves nothing behind; jacobians and checkpoints are no transforms."""
    function, shape = FUNCTIONS[name]
    x = torch.randn(shape, device=device, requires_grad=True)
    expected = torch.autograd.grad(function(x).sum(), x)[0]
    doubled = torch.vmap(lambda y: 2 * y)(x)
    assert torch.equal(*(torch.autograd.grad(function(y).sum(), x)[0] for y in (doubled, 2 * x)))
    assert torch.equal(torch.autograd.functional.jacobian(lambda y: function(y).sum(), x), expected)
    for reentrant in (True, False):
        x.grad = None
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, expected)
    module = torch.nn.Linear(shape[-1], shape[-1], device=device)
    called = torch.func.functional_call(module, dict(module.named_parameters()), x + function(x).mean())
    assert called.isfinite().all()


def compiled_transforms():
    fault = "torch 2.8 compiles torch.func.grad of an autograd function only where that has a setup_context"
    expected = pytest.mark.xfail(
        TORCH_2_8, reason=fault, raises=torch._dynamo.exc.InternalTorchDynamoError, strict=True
    )
    return [pytest.param(name, marks=() if name == "group_mean" else expected) for name in FUNCTIONS]


@pytest.mark.parametrize("name", compiled_transforms())
def test_compiled_transform_on_the_cpu(name):
    function, shape = FUNCTIONS[name]
    x = torch.randn(shape)
    torch._dynamo.reset()
    gradient = torch.compile(torch.func.grad(lambda y: function(y).sum()), backend="aot_eager", fullgraph=True)(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(function(x).sum(), x)[0])


def test_rows_of_two_axes_are_the_tensor_itself():
    """A view costs time, and where there is a gradient a step of the backward."""
    tensor = torch.zeros(3, 4)
    assert as_rows(tensor) is tensor
    assert [as_rows(torch.zeros(shape)).shape for shape in ((4,), (2, 3, 4))] == [(1, 4), (6, 4)]
