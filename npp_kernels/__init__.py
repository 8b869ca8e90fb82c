"""Fused Triton kernels for next-patch-prediction training of autoregressive models."""

from npp_kernels._checks import check_ids
from npp_kernels.embeddings.group_mean import group_mean
from npp_kernels.embeddings.group_order import GroupOrder, order_groups
from npp_kernels.embeddings.patch_mean import patch_mean
from npp_kernels.grouping import group_tokens, ungroup_tokens
from npp_kernels.losses.linear_patch_cross_entropy import linear_patch_cross_entropy
from npp_kernels.losses.options import PatchLossStats
from npp_kernels.losses.patch_cross_entropy import patch_cross_entropy
from npp_kernels.modules import LinearPatchCrossEntropyLoss, PatchCrossEntropyLoss, PatchEmbedding
from npp_kernels.schedule import PatchSchedule, Stage
from npp_kernels.step_graph import StepGraph
from npp_kernels.vocabulary_shard import VocabularyShard

__all__ = [
    "GroupOrder",
    "LinearPatchCrossEntropyLoss",
    "PatchCrossEntropyLoss",
    "PatchEmbedding",
    "PatchLossStats",
    "PatchSchedule",
    "Stage",
    "StepGraph",
    "VocabularyShard",
    "check_ids",
    "group_mean",
    "group_tokens",
    "linear_patch_cross_entropy",
    "order_groups",
    "patch_cross_entropy",
    "patch_mean",
    "ungroup_tokens",
]
__version__ = "0.2.0"
