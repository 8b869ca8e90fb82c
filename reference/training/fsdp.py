"""A model that one GPU cannot hold, by PyTorch's FSDP2: each process keeps a part of every parameter.

A layer's parameters are gathered before it computes, and dropped after it, forward and backward. Those that several
places use stay gathered from the forward to the backward: the embedding, the output layer, which the loss multiplies
with outside of any module's forward, and all norms, since a layer ends with the norm of what follows it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from reference.network.model import Block, Transformer


def shard(model: Transformer, dtype: torch.dtype, gradient_dtype: torch.dtype, *, compile: bool) -> None:
    """Divide a model among the processes of the default group; its parameters become `DTensor`.

    Args:
        model: the same in every process, on any device.
        dtype: in which it computes. Its own parameters stay in fp32.
        gradient_dtype: in which gradients are added up over the processes.
        compile: compile attention and feed-forward, each for all layers.
    """
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=gradient_dtype)
    for layer in model.layers:
        assert isinstance(layer, Block)
        if compile:
            # Their forwards, not the modules: gathering and dropping cannot be compiled.
            for module in (layer.attention, layer.feed_forward):
                module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
        fully_shard([layer.attention, layer.feed_forward], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
