"""The flat AdamW: against PyTorch's, its master weights, its decay and its moving average."""

import pytest
import torch

from reference.training.optimizer import AdamWConfig, FlatAdamW
from reference.training.step import StepConfig
from reference.training.torch_adamw import TorchAdamW
from tests.training_cases import FP32, model_of, train_steps


# Clipping that acts (the gradient's norm is about 1), that does not, and none at all.
@pytest.mark.parametrize("clip", [0.1, 100.0, 0.0])
def test_flat_adamw_is_adamw_with_clipping(clip):
    adamw = AdamWConfig(clip=clip, weight_decay=0.3, ema=0.9)
    step, losses = train_steps(FP32, adamw)
    model = model_of()
    official = train_steps(StepConfig(precision="fp32", compile=False, official=True), adamw, model=model)
    assert losses == pytest.approx(official[1], rel=1e-5)
    for part, tensors in step.optimizer.state().items():
        for name, tensor in tensors.items():
            expected = official[0].optimizer.state()[part][name]
            torch.testing.assert_close(tensor, expected, rtol=2e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_parameters_of_many_shapes_and_sizes(dtype, device):
    """More than one launch takes, smaller and larger than a program's block; 16-bit weights are rounded fp32 ones."""
    sizes = [1, 3, 1024, 1025, 5000, *range(2, 40, 3), 777]
    models = [
        torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size, 1 + size % 2)) for size in sizes]) for _ in "ab"
    ]
    models[1].load_state_dict(models[0].state_dict())
    adamw = AdamWConfig(weight_decay=0.3, clip=5.0, ema=0.9)
    optimizer = FlatAdamW(models[0].to(device), adamw, dtype=dtype)
    official = TorchAdamW(models[1].to(device), adamw)
    for _ in range(3):
        for parameter, other in zip(*(model.parameters() for model in models), strict=True):
            parameter.grad = torch.randn(parameter.shape, device=device).to(dtype)
            other.grad = parameter.grad.float()
        norms = []
        for one in (optimizer, official):
            one.set_lr(1e-2)
            one.collect(first=True)
            norms.append(one.update().item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 5
    for part, tensors in official.state().items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                optimizer.state()[part][name], tensor, rtol=1e-5, atol=1e-6, msg=f"{part} {name}"
            )
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, optimizer.state()["model"][name].to(dtype)), name


def test_every_parameter_needs_a_gradient():
    model = torch.nn.Linear(2, 2)
    optimizer = FlatAdamW(model, AdamWConfig())
    model.weight.grad = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="model: expected a gradient of every parameter, got none of bias"):
        optimizer.collect(first=True)


def test_norms_do_not_decay():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2, bias=False), "norm": torch.nn.RMSNorm(2)})
    torch.nn.init.ones_(model["linear"].weight)
    optimizer = FlatAdamW(model, AdamWConfig(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_lr(0.1)
    optimizer.collect(first=True)
    optimizer.update()
    assert model["linear"].weight.flatten().tolist() == pytest.approx([0.95] * 4)
    assert model["norm"].weight.tolist() == [1.0, 1.0]


def test_master_weights_keep_what_bf16_would_round_away():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    optimizer = FlatAdamW(model, AdamWConfig(weight_decay=0.0), dtype=torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    optimizer.set_lr(1e-4)  # bf16 has nothing between 1 and 1 - 2^-8, some 40 steps away
    for _ in range(60):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
        optimizer.collect(first=True)
        optimizer.update()
    assert optimizer.state()["model"]["weight"].item() == pytest.approx(1 - 60e-4, abs=1e-5)
    assert model.weight.item() == torch.tensor(1 - 60e-4).bfloat16().item()


def test_moving_average():
    step, _ = train_steps(FP32, AdamWConfig(ema=0.75), patches=(2,))
    before, after = model_of().state_dict(), step.optimizer.state()
    for name, average in after["ema"].items():
        torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after["model"][name])
