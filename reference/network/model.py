"""LlamaGen's class-conditional transformer, trained on patches of any size and sampled token by token.

The architecture, its parameters and the names of its state dict are those of the official checkpoints (RMSNorm, SwiGLU,
2-D rotary embedding, a condition token in front, an untied output layer that starts at zero). A patch changes only what
enters and what is scored: groups of K tokens, averaged on the way in, and all K scored by one row on the way out.

``Transformer.fast`` is the one switch between fused operations, npp_kernels' and those of attention and SwiGLU beside
this file, and the official code's formulation, which unfolds embeddings and repeats fp32 logits. Both compute the same
numbers.

Source: LlamaGen (arXiv 2406.06525), ``autoregressive/models/gpt.py``; NPP (arXiv 2412.15321), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npp_kernels import group_mean, linear_patch_cross_entropy, ungroup_tokens
from npp_kernels.grouping import Patch, resolve_grid, resolve_patch
from reference.network.attention import Rotary, attend, rotary_embedding, rotate
from reference.network.swiglu import gated

NORM_EPS = 1e-5
INITIAL_STD = 0.02
FEED_FORWARD_MULTIPLE = 256

SIZES = {  # dim, num_layers, num_heads; B to XXL are the four models of the paper
    "tiny": (64, 2, 2),
    "small": (96, 3, 3),
    "S": (256, 6, 4),
    "M": (384, 8, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
}


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and dropout rates of a `Transformer`; the defaults are LlamaGen-B on 256×256 ImageNet.

    >>> ModelConfig.named("XL").dim
    1280
    """

    vocab_size: int = 16_384
    grid: tuple[int, int] = (16, 16)
    num_classes: int = 1_000
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    token_dropout: float = 0.1  # of the embeddings, the condition's included
    dropout: float = 0.1  # of what attention and feed-forward add to the residual stream
    drop_path: float = 0.0  # of the last layer; it rises linearly from 0 in the first
    class_dropout: float = 0.1  # of the condition, for classifier-free guidance

    @classmethod
    def named(cls, size: str, **others: object) -> ModelConfig:
        """Return the configuration of a size in `SIZES`, with the other fields as given."""
        if size not in SIZES:
            raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
        dim, num_layers, num_heads = SIZES[size]
        return cls(dim=dim, num_layers=num_layers, num_heads=num_heads, **others)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.dim % (4 * self.num_heads):
            raise ValueError(f"dim: expected a multiple of 4 * num_heads = {4 * self.num_heads}, got {self.dim}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def feed_forward_dim(self) -> int:
        """Hidden channels of SwiGLU: two thirds of 4·dim, rounded up to a multiple of 256."""
        return math.ceil(int(8 * self.dim / 3) / FEED_FORWARD_MULTIPLE) * FEED_FORWARD_MULTIPLE

    def coarse_grid(self, patch: Patch) -> tuple[int, int]:
        """Return the grid of groups that a patch makes of the grid of tokens."""
        kh, kw = resolve_patch(patch, self.grid)
        resolve_grid("grid", self.grid, (kh, kw), self.grid)
        return self.grid[0] // kh, self.grid[1] // kw

    def training_flops(self, patch: Patch) -> int:
        """Return the operations of one image, forward and backward: linear layers and the causal half of attention."""
        positions = math.prod(self.coarse_grid(patch))
        layer = 4 * self.dim**2 + 3 * self.dim * self.feed_forward_dim
        linear = 6 * positions * (self.num_layers * layer + self.dim * self.vocab_size)
        return linear + 6 * self.num_layers * self.dim * positions * (positions + 1)


class KeyValueCache(NamedTuple):
    """Keys and values of every position so far, ``[B, num_heads, H·W, head_dim]`` for each layer.

    A tensor for each: compiled code that writes into a part of one writes the whole of it anew.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class CachedLayer(NamedTuple):
    """What one layer needs of the cache at one position."""

    keys: Tensor  # [B, num_heads, H·W, head_dim]
    values: Tensor
    position: Tensor  # [1]
    visible: Tensor  # [1, H·W] bool


def drop_path(branch: Tensor, rate: Tensor | None, training: bool) -> Tensor:
    """Drop a whole branch for some images, and scale it up for the others."""
    if rate is None or not training:
        return branch
    kept = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * kept.to(branch.dtype) / (1 - rate)


def dropout(x: Tensor, rate: float, training: bool, seed: Tensor | None) -> Tensor:
    """Set elements to 0 at a rate, and scale up the others.

    In compiled code with a seed, an int32 tensor of one element, an element's fate is a hash of its place: a dozen
    integer operations in the kernel that adds it to the residual stream, done again in the backward. PyTorch's Philox
    takes ten rounds of multiplications for each element, longer than the element's bytes take, and keeps a mask.
    """
    if not training or rate == 0:
        return x
    if seed is None or not torch.compiler.is_compiling():
        return F.dropout(x, rate)
    return torch.where(hashed(x.shape, seed) >= rate, x * (1 / (1 - rate)), 0.0)


def hashed(shape: torch.Size, seed: Tensor) -> Tensor:
    """Return numbers spread evenly over [0, 1), fp32, each from its place and a seed by two rounds of mixing."""
    words = torch.arange(math.prod(shape), dtype=torch.int32, device=seed.device).view(shape)
    for multiplier, shift in ((0x7FEB352D, 15), (0x2C1B3C6D, 12)):
        words = (words ^ (words >> 16 & 0xFFFF)) * multiplier  # int32 wraps; the mask makes the shift a logical one
        words = words ^ (words >> shift & ((1 << (32 - shift)) - 1)) ^ seed
    words = (words ^ (words >> 16 & 0xFFFF)) * 0x297A2D39
    return (words >> 8 & 0xFFFFFF).float() * 2**-24


class LabelEmbedding(nn.Module):
    """Class labels as condition tokens; one row more than classes stands for "no class"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)
        self.no_class = config.num_classes
        self.dropout = config.class_dropout

    def forward(self, labels: Tensor) -> Tensor:
        """Embed ``labels [B]``, some of them dropped while training: ``[B, D]``."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = labels.masked_fill(dropped, self.no_class)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Causal self-attention with a rotary embedding."""

    def __init__(self, config: ModelConfig, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.heads = (3, config.num_heads, config.head_dim)
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, rotary: Rotary, cached: CachedLayer | None = None, seed: Tensor | None = None
    ) -> Tensor:
        """Mix positions ``x [B, P, D]``; with a cache, P is 1. The seed is that of `dropout`."""
        qkv = self.wqkv(x).unflatten(-1, self.heads)
        mixed = attend(qkv, rotary, fast=self.fast) if cached is None else self._attend_to_cache(qkv, rotary, cached)
        return dropout(self.wo(mixed.flatten(2).to(qkv.dtype)), self.dropout, self.training, seed)

    def _attend_to_cache(self, qkv: Tensor, rotary: Rotary, cached: CachedLayer) -> Tensor:
        query, key = rotate(qkv[:, :, :2], rotary).to(cached.keys.dtype).transpose(1, 3).unbind(2)
        cached.keys.index_copy_(2, cached.position, key)
        cached.values.index_copy_(2, cached.position, qkv[:, :, 2].transpose(1, 2).to(cached.values.dtype))
        mixed = F.scaled_dot_product_attention(query, cached.keys, cached.values, attn_mask=cached.visible)
        return mixed.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, fast: bool) -> None:
        super().__init__()
        self.fast = fast
        self.w1 = nn.Linear(config.dim, config.feed_forward_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.feed_forward_dim, bias=False)
        self.w2 = nn.Linear(config.feed_forward_dim, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """Transform each position of ``x [B, P, D]``. The seed is that of `dropout`."""
        hidden = gated(x, self.w1.weight, self.w3.weight, fast=self.fast)
        return dropout(self.w2(hidden), self.dropout, self.training, seed)


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each normalised first and added to the residual stream."""

    drop_path_rate: Tensor | None

    def __init__(self, config: ModelConfig, drop_path_rate: float, fast: bool) -> None:
        super().__init__()
        self.attention = Attention(config, fast)
        self.feed_forward = FeedForward(config, fast)
        self.attention_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        # A tensor, since compiled code is one for all layers, whose rates differ.
        rate = torch.tensor(drop_path_rate) if config.drop_path else None
        self.register_buffer("drop_path_rate", rate, persistent=False)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        following: nn.Module,
        rotary: Rotary,
        seeds: Tensor | None = None,
        cached: CachedLayer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add both branches to the residual stream, and normalise it for what follows.

        A sum and the norm behind it are one kernel, forward and backward, where both are in one layer's code: compiled
        layer by layer, nothing is left in between.

        Args:
            x: the residual stream ``[B, P, D]``.
            normed: the same, normalised by ``attention_norm``.
            following: the norm of what follows, the next layer or the output.
            rotary: as `rotary_embedding` returns it, for these positions.
            seeds: two, those of `dropout`.
            cached: where one position is decoded.

        Returns:
            The residual stream, and the same normalised by ``following``.
        """
        seed, other_seed = (None, None) if seeds is None else (seeds[0], seeds[1])
        attended = self.attention(normed, rotary, cached, seed)
        x = x + drop_path(attended, self.drop_path_rate, self.training)
        transformed = self.feed_forward(self.ffn_norm(x), other_seed)
        x = x + drop_path(transformed, self.drop_path_rate, self.training)
        return x, following(x)


class Transformer(nn.Module):
    """A class-conditional image model over a grid of tokens.

    >>> import torch
    >>> from npp_kernels import group_tokens
    >>> model = Transformer(ModelConfig.named("tiny", vocab_size=512, grid=(4, 4), num_classes=10))
    >>> tokens, labels = torch.randint(512, (2, 4, 4)), torch.tensor([3, 7])
    >>> model(group_tokens(tokens, 2), labels, 2).shape
    torch.Size([2, 4, 64])
    >>> round(model.loss(group_tokens(tokens, 2), labels, 2).item(), 3)  # ln(512): the output layer starts at zero
    6.238

    Args:
        config: dimensions and dropout rates.
        fast: fused operations; or, if false, the formulation of the official code.
    """

    def __init__(self, config: ModelConfig, *, fast: bool = True) -> None:
        super().__init__()
        self.config = config
        self.fast = fast
        self.cls_embedding = LabelEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        last = max(config.num_layers - 1, 1)
        rates = [config.drop_path * layer / last for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(Block(config, rate, fast) for rate in rates)
        self.run_layer: Callable[..., tuple[Tensor, Tensor]] = Block.forward  # what compiled code replaces
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
        nn.init.zeros_(self.output.weight)

    def forward(self, groups: Tensor, labels: Tensor, patch: Patch = 1) -> Tensor:
        """Return the hidden states that predict each group: ``groups [B, P, K], labels [B] -> [B, P, D]``.

        Row p has seen the condition and the groups before p, and is normalised: ``output`` alone is left to apply.
        A label of ``num_classes`` means "no class"; while training, labels are replaced by it at ``class_dropout``.
        """
        rows, columns = self.config.coarse_grid(patch)
        condition = self.cls_embedding(labels).unsqueeze(1)
        hidden = self.tok_dropout(torch.cat((condition, self._embed(groups, patch)), dim=1))
        positions = torch.arange(rows * columns, device=hidden.device)
        rotary = rotary_embedding(positions, columns, self.config.head_dim)
        norms = self._norms()
        normed = norms[0](hidden)
        for layer, following, seeds in zip(self.layers, norms[1:], self._draw_seeds(hidden.device), strict=True):
            hidden, normed = self.run_layer(layer, hidden, normed, following, rotary, seeds)
        return normed

    def loss(
        self, groups: Tensor, labels: Tensor, patch: Patch = 1, *, num_targets: int | Tensor | None = None
    ) -> Tensor:
        """Return the mean cross entropy, in nats per token, of all tokens of every group.

        Args:
            groups: ids ``[B, P, K]`` of the patch.
            labels: ``[B]``.
            patch: the patch that made the groups.
            num_targets: what the sum is divided by instead of this batch's ``B·P·K``: the targets of the whole step,
                where a step is many batches.
        """
        hidden = self(groups, labels, patch)
        if self.fast:
            loss = linear_patch_cross_entropy(hidden, self.output.weight, groups, num_targets=num_targets)
            return cast(Tensor, loss)  # alone, since no statistics are asked for
        logits = self.output(hidden).float().flatten(0, 1)  # [B·P, V]
        repeated = logits.unsqueeze(1).repeat(1, groups.shape[-1], 1).flatten(0, 1)
        loss = F.cross_entropy(repeated, groups.flatten())
        return loss if num_targets is None else loss * (groups.numel() / num_targets)

    def _embed(self, groups: Tensor, patch: Patch) -> Tensor:
        """Average the embeddings of all groups but the last: ``[B, P, K] -> [B, P - 1, D]``."""
        if self.fast:
            return group_mean(self.tok_embeddings.weight, groups[:, :-1])
        tokens = ungroup_tokens(groups, patch, grid=self.config.grid)
        embeddings = self.tok_embeddings(tokens).flatten(1, 2)  # [B, H·W, D]
        if groups.shape[-1] > 1:
            sizes = resolve_patch(patch, self.config.grid)
            image = embeddings.unflatten(1, self.config.grid).permute(0, 3, 1, 2)
            unfolded = F.unfold(image, kernel_size=sizes, stride=sizes).transpose(1, 2)  # [B, P, D·K]
            embeddings = unfolded.unflatten(-1, (self.config.dim, -1)).permute(0, 1, 3, 2).mean(2)
        return embeddings[:, :-1]

    def _norms(self) -> list[nn.Module]:
        """Return the norms at the head of each layer, and of the output."""
        return [*(cast(Block, layer).attention_norm for layer in self.layers), self.norm]

    def _draw_seeds(self, device: torch.device) -> Sequence[Tensor | None]:
        """Draw the seeds of each layer's dropout, for compiled layers on a GPU; elsewhere PyTorch's own is faster."""
        if not (self.fast and self.training and self.config.dropout > 0 and device.type == "cuda"):
            return [None] * len(self.layers)
        # Four for each layer, of which it needs two: compiled code wants its inputs at multiples of 16 bytes.
        return torch.randint(-(2**31), 2**31, (len(self.layers), 4), dtype=torch.int32, device=device).unbind()

    def make_cache(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> KeyValueCache:
        """Return an empty cache for `decode`."""
        config = self.config
        shape = (batch_size, config.num_heads, math.prod(config.grid), config.head_dim)
        keys, values = (
            tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)) for _ in range(2)
        )
        return KeyValueCache(keys, values)

    def decode(self, ids: Tensor | None, labels: Tensor | None, position: Tensor, cache: KeyValueCache) -> Tensor:
        """Feed one position and return the logits of the token that follows it, fp32 ``[B, V]``.

        Position 0 takes ``labels [B]``, the condition; position i of 1 to H·W − 1 takes ``ids [B]``, token i − 1. Only
        ``position`` (0-d, int64) and the cache decide what is seen, so that one CUDA graph serves every position.
        """
        if (ids is None) == (labels is None):
            raise ValueError("ids: expected either ids or labels, got " + ("neither" if ids is None else "both"))
        hidden = (self.cls_embedding(labels) if ids is None else self.tok_embeddings(ids)).unsqueeze(1)
        position = position.reshape(1)
        rotary = rotary_embedding(position, self.config.grid[1], self.config.head_dim)
        visible = torch.arange(cache.keys[0].shape[2], device=position.device).unsqueeze(0) <= position
        norms = self._norms()
        normed = norms[0](hidden)
        for layer, following, keys, values in zip(self.layers, norms[1:], cache.keys, cache.values, strict=True):
            cached = CachedLayer(keys, values, position, visible)
            hidden, normed = layer(hidden, normed, following, rotary, cached=cached)
        return self.output(normed).squeeze(1).float()
