"""A small transformer with the surface of LlamaGen's: the attributes, and the signature of its forward.

It stands in for ``autoregressive.models.gpt.Transformer`` of the official NPP code, and `PlainTransformer` for that of
LlamaGen; neither is on the package index.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Labels(nn.Module):
    """Class labels as one condition token; some are dropped in training."""

    def __init__(self, num_classes: int, dim: int, drop: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.num_classes, self.drop = num_classes, drop

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        """Embed: ``[B] -> [B, 1, D]``."""
        if train and self.drop:
            labels = torch.where(torch.rand(labels.shape, device=labels.device) < self.drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class Captions(nn.Module):
    """Features of a text as condition tokens; some are dropped in training."""

    def __init__(self, num_tokens: int, caption_dim: int, dim: int, drop: float) -> None:
        super().__init__()
        self.cap_proj = nn.Sequential(nn.Linear(caption_dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.uncond_embedding = nn.Parameter(torch.randn(num_tokens, caption_dim))
        self.drop = drop

    def forward(self, captions: Tensor, train: bool) -> Tensor:
        """Embed: ``[B, T, C] -> [B, T, D]``."""
        if train and self.drop:
            dropped = torch.rand(captions.shape[0], device=captions.device) < self.drop
            captions = torch.where(dropped[:, None, None], self.uncond_embedding, captions)
        return self.cap_proj(captions)


class Cache(nn.Module):
    """Keys and values of the positions so far."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def update(self, position: Tensor, keys: Tensor, values: Tensor) -> tuple[Any, Any]:
        """Write what is new, and return all."""
        self.keys[:, :, position], self.values[:, :, position] = keys, values  # type: ignore[index, operator]
        return self.keys, self.values


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, dim: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.wqkv, self.wo = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)
        self.kv_cache: Cache | None = None

    def forward(self, x: Tensor, freqs_cis: Tensor, input_pos: Tensor | None, mask: Tensor | None) -> Tensor:
        """Attend: ``[B, S, D] -> [B, S, D]``."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        q, k, v = rotated(q, freqs_cis).transpose(1, 2), rotated(k, freqs_cis).transpose(1, 2), v.transpose(1, 2)
        if self.kv_cache is not None:
            assert input_pos is not None
            k, v = self.kv_cache.update(input_pos, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.resid_dropout(self.wo(out.transpose(1, 2).flatten(2)))


def rotated(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of ``x [B, S, H, D]`` by the angles of ``table [S, D / 2, 2]``."""
    pairs, table = x.float().unflatten(-1, (-1, 2)), table[:, None]
    real = pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1]
    imaginary = pairs[..., 0] * table[..., 1] + pairs[..., 1] * table[..., 0]
    return torch.stack((real, imaginary), -1).flatten(-2).type_as(x)


def rotary_table(side: int, head_dim: int, num_conditions: int, base: float = 10000.0) -> Tensor:
    """Return cosines and sines ``[num_conditions + side², head_dim / 2, 2]``: zeros, then rows and columns."""
    frequencies = base ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    angles = torch.arange(side)[:, None] * frequencies
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat((rows, columns), -1).flatten(0, 1)
    table = torch.stack((grid.cos(), grid.sin()), -1)
    return torch.cat((torch.zeros(num_conditions, *table.shape[1:]), table))


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, dim: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, n_head, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, start_pos: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Compute one layer."""
        x = x + self.attention(self.attention_norm(x), freqs_cis, start_pos, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The model; its forward is the official one's, expanded logits and all."""

    def __init__(
        self, *, vocab_size: int = 512, block_size: int = 256, dim: int = 64, n_layer: int = 2, n_head: int = 2,
        num_classes: int = 10, dropout: float = 0.0, class_dropout: float = 0.0, model_type: str = "c2i",
        cls_token_num: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = SimpleNamespace(dim=dim, n_head=n_head, caption_dim=24, vocab_size=vocab_size)
        self.block_size, self.cls_token_num, self.model_type = block_size, cls_token_num, model_type
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.cls_embedding: nn.Module = Labels(num_classes, dim, class_dropout)
        if model_type == "t2i":
            self.cls_embedding = Captions(cls_token_num, self.config.caption_dim, dim, class_dropout)
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.tok_embeddings.weight, std=0.02)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)
        self.freqs_cis = rotary_table(math.isqrt(block_size), dim // n_head, cls_token_num)

    def setup_caches(self, batch_size: int, length: int) -> None:
        """Make the caches for sampling."""
        shape = (batch_size, self.config.n_head, length, self.config.dim // self.config.n_head)
        for layer in self.layers:
            cast(Any, layer).attention.kv_cache = Cache(shape)
        self.causal_mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch_size, -1, -1)

    def forward(
        self, idx: Tensor | None, cond_idx: Tensor | None, input_pos: Tensor | None = None,
        targets: Tensor | None = None, mask: Tensor | None = None, valid: Tensor | None = None,
        p: int = 1, patch_size: int = 1, freqs_cis: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return logits, and the loss where there are targets."""
        if idx is not None and cond_idx is not None:
            condition = self.cls_embedding(cond_idx, train=self.training)[:, : self.cls_token_num]
            tokens = patchified(self.tok_embeddings(idx), p)
            if self.training:
                tokens = tokens[:, :-1]
            h = self.tok_dropout(torch.cat((condition, tokens), dim=1))
            self.freqs_cis = (self.freqs_cis if freqs_cis is None else freqs_cis).to(h.device)
        else:
            h = self.tok_embeddings(idx) if cond_idx is None else self.cls_embedding(cond_idx, train=self.training)
            mask = self.causal_mask[: h.shape[0], None, input_pos]
        return self.finish(h, input_pos, targets, mask, valid, p)

    def finish(
        self, h: Tensor, input_pos: Tensor | None, targets: Tensor | None, mask: Tensor | None, valid: Tensor | None,
        p: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Compute the layers, the logits and the loss."""
        table = self.freqs_cis[: h.shape[1]] if self.training else self.freqs_cis[input_pos]
        for layer in self.layers:
            h = layer(h, table, input_pos, mask)
        logits = self.output(self.norm(h)).float()
        if self.training:
            logits = logits[:, self.cls_token_num - 1 :].contiguous()
        if targets is None:
            return logits, None
        if valid is not None:
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            weights = valid[:, None].repeat(1, targets.shape[1]).flatten()
            return logits, (losses * weights).sum() / weights.sum().clamp(min=1)
        expanded = logits.unsqueeze(2).repeat(1, 1, p**2, 1).flatten(0, 2)
        return logits, F.cross_entropy(expanded, unfolded(targets[..., None].float(), p).long().flatten())


class PlainTransformer(Transformer):
    """LlamaGen's own: it knows no patches, and gets all tokens but the last."""

    def forward(  # type: ignore[override]
        self, idx: Tensor | None, cond_idx: Tensor | None, input_pos: Tensor | None = None,
        targets: Tensor | None = None, mask: Tensor | None = None, valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return logits, and the loss where there are targets."""
        if idx is None or cond_idx is None:
            return super().forward(idx, cond_idx, input_pos, targets, mask, valid)
        condition = self.cls_embedding(cond_idx, train=self.training)[:, : self.cls_token_num]
        h = self.tok_dropout(torch.cat((condition, self.tok_embeddings(idx)), dim=1))
        self.freqs_cis = self.freqs_cis.to(h.device)
        return self.finish(h, input_pos, targets, mask, valid, 1)


def unfolded(x: Tensor, p: int) -> Tensor:
    """Unfold: ``[B, H·W, C] -> [B, P, C, p²]``."""
    side = math.isqrt(x.shape[1])
    image = x.transpose(1, 2).unflatten(2, (side, side))
    return F.unfold(image, p, stride=p).transpose(1, 2).unflatten(2, (x.shape[2], p**2))


def patchified(x: Tensor, p: int) -> Tensor:
    """Average patches: ``[B, H·W, D] -> [B, P, D]``."""
    return x if p == 1 else unfolded(x, p).mean(3)
