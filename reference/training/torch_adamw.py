"""PyTorch's own AdamW: for comparison, since the official code trains with it, and for parameters that FSDP shards.

`reference.training.step` takes it in the place of `FlatAdamW` for these two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.tensor import DTensor, distribute_tensor

from reference.training.optimizer import EPSILON, AdamWConfig, check_tensors


class TorchAdamW:
    """`torch.optim.AdamW` and `clip_grad_norm_` on separate fp32 parameters, with the methods of `FlatAdamW`.

    It runs outside of CUDA graphs. Parameters that FSDP has sharded stay so, and so does its state.
    """

    def __init__(self, model: nn.Module, config: AdamWConfig) -> None:
        named = dict(model.named_parameters())
        decaying = [parameter for parameter in named.values() if parameter.ndim >= 2]
        others = [parameter for parameter in named.values() if parameter.ndim < 2]
        self.config = config
        self.named = named
        self.averages = {name: p.detach().clone() for name, p in named.items()} if config.ema else {}
        groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=EPSILON,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def collect(self, *, first: bool) -> None:
        """Leave the gradients where autograd adds them up."""

    def update(self) -> Tensor:
        """Clip and update; return the norm of the gradient before clipping."""
        limit = self.config.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.averages:
            weights = [parameter.detach() for parameter in self.named.values()]
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.config.ema)
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return weights, moments and moving average by the names of the model's state dict."""
        for parameter in self.named.values():
            if not self.adamw.state[parameter]:  # AdamW makes its state in the first step
                self.adamw.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        moments = {name: self.adamw.state[parameter] for name, parameter in self.named.items()}
        state = {
            "model": {name: parameter.detach() for name, parameter in self.named.items()},
            "exp_avg": {name: moment["exp_avg"] for name, moment in moments.items()},
            "exp_avg_sq": {name: moment["exp_avg_sq"] for name, moment in moments.items()},
            "counters": {"updates": next(iter(moments.values()))["step"]},
        }
        return state | ({"ema": self.averages} if self.averages else {})

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned: from its tensors, or each process its parts of the folder in "sharded"."""
        own = self.state()
        if "sharded" in state:
            checkpoint.load(own, checkpoint_id=state["sharded"])
        else:
            check_tensors(own, state)
            for part, tensors in own.items():
                for name, tensor in tensors.items():
                    copy_whole(tensor, state[part][name])
        for parameter in self.named.values():
            self.adamw.state[parameter]["step"].copy_(own["counters"]["updates"])


def copy_whole(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one that may be sharded."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)
