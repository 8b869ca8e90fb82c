"""One token of every image in a few launches: `reference.sample`'s step, by kernels.

It computes the numbers of `Transformer.decode` and of what follows it, up to the order of sums, in fewer launches: five
for each layer (six where attention is split), and four for the embedding, the output layer, the choice of an id and the
next position. docs/sampling.md counts the bytes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from npp_kernels._dispatch import INTERPRETED, runs_kernels
from reference.network.attention import rotary_embedding
from reference.network.model import Block, KeyValueCache, Transformer
from reference.sampling.choosing import MAX_VOCAB, Drawing, choose
from reference.sampling.decode_kernels import attend_to_cache, choose_splits, embed, multiply

INNER_MULTIPLE = 32  # of the hidden size and of SwiGLU's
MIN_HEAD_DIM = 16


def serves(model: Transformer) -> bool:
    """Return whether `Decoding` can serve a model: where kernels run, with sizes that they know."""
    config, weight = model.config, model.output.weight
    is_power = config.head_dim & (config.head_dim - 1) == 0
    fits = is_power and config.head_dim >= MIN_HEAD_DIM and config.vocab_size <= MAX_VOCAB
    # The interpreter has no products of bf16.
    known = not INTERPRETED or weight.dtype != torch.bfloat16
    return model.fast and runs_kernels(weight) and known and fits and config.dim % INNER_MULTIPLE == 0


class Decoding:
    """The step of one batch size: everything that it reads or writes stays where it is, for a CUDA graph.

    Args:
        model: what `serves` says yes to; its weights are read where they are at each step.
        cache: as `Transformer.make_cache` made it.
        labels: int64 ``[N]``, the conditions of all rows, read at position 0.
        position: 0-d, int64; the step moves it on.
    """

    def __init__(self, model: Transformer, cache: KeyValueCache, labels: Tensor, position: Tensor) -> None:
        self.model, self.cache, self.labels, self.position = model, cache, labels, position
        config, weight = model.config, model.output.weight
        rows = len(labels)
        positions = torch.arange(cache.keys[0].shape[2], device=weight.device)
        self.rotary = rotary_embedding(positions, config.grid[1], config.head_dim)
        self.splits = choose_splits(rows * config.num_heads, len(positions), weight)
        self.x, self.mixed = (weight.new_empty((rows, config.dim)) for _ in range(2))
        self.qkv = weight.new_empty((rows, 3 * config.dim))
        self.hidden = weight.new_empty((rows, config.feed_forward_dim))
        self.logits = weight.new_empty((rows, config.vocab_size))

    @property
    def launches(self) -> int:
        """How many kernels a step launches."""
        return len(self.model.layers) * (5 if self.splits == 1 else 6) + 4

    def step(self, drawing: Drawing, noise: Tensor, ids: Tensor, tokens: Tensor, is_finite: Tensor) -> None:
        """Feed the last ids, or the labels at position 0; choose the next ids, as `choosing.choose` does."""
        model, position = self.model, self.position
        tables = (model.tok_embeddings.weight, model.cls_embedding.embedding_table.weight)
        embed(ids, self.labels, position, tables, self.x)
        for layer, keys, values in zip(model.layers, *self.cache, strict=True):
            self._run_layer(cast(Block, layer), (keys, values))
        multiply(self.x, model.output.weight, self.logits, norm=model.norm)
        choose(self.logits, noise, position, drawing, ids, tokens, is_finite)
        position.add_(1)

    def _run_layer(self, layer: Block, cached: tuple[Tensor, Tensor]) -> None:
        attention, feed_forward = layer.attention, layer.feed_forward
        multiply(self.x, attention.wqkv.weight, self.qkv, norm=layer.attention_norm)
        attend_to_cache(self.qkv, self.rotary, self.position, cached, self.mixed, self.splits)
        multiply(self.mixed, attention.wo.weight, self.x, residual=self.x)
        gate, up = feed_forward.w1.weight, feed_forward.w3.weight
        multiply(self.x, gate, self.hidden, norm=layer.ffn_norm, gated=up)
        multiply(self.hidden, feed_forward.w2.weight, self.x, residual=self.x)
