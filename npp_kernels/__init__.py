"""Fused Triton kernels for next-patch-prediction training of autoregressive models."""

from npp_kernels._checks import check_ids
from npp_kernels.grouping import group_tokens, ungroup_tokens

__all__ = ["check_ids", "group_tokens", "ungroup_tokens"]
__version__ = "0.1.0"
