"""A loss whose vocabulary a process group shares out: what each rank does, and what the ranks tell each other.

    m = max_r m_r                                  one all-reduce, of 3·N numbers (4·N with statistics)
    R, d, and what options need: sums over r       one all-reduce, of (2 + K)·N numbers (and N for each of label
                                                   smoothing and statistics)

Two of the three numbers tell whether all ranks have the same targets. With statistics the ids of the largest logits
take a third all-reduce, of N numbers. The gradient of a slice of logits needs nothing from the other ranks:
docs/vocabulary_parallel.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npp_kernels._checks import may_read
from npp_kernels._dispatch import runs_kernels
from npp_kernels.losses.scores import BEFORE_CAP, Measures, Scores
from npp_kernels.losses.shard_kernels import launch_measures, launch_scores, launch_sums
from npp_kernels.losses.targets import Settings, Targets
from npp_kernels.losses.torch_path import torch_maxima, torch_scores, torch_sums
from npp_kernels.vocabulary_shard import OTHER_ROWS, VocabularyShard


def score_over_ranks(logits: Tensor, targets: Targets, scores: Scores) -> None:
    """Fill the ``scores`` of a slice of ``logits [N, V_r]``, the same on every rank; all ranks of the shard call it."""
    shard = targets.shard
    assert shard is not None
    if not logits.shape[0]:
        return  # on every rank, as rows are the same on all
    kernels = runs_kernels(logits)
    measures = Measures.empty(targets, scores)
    (launch_measures if kernels else torch_maxima)(logits, targets, shard, measures)
    own = measures.maxima.clone()
    shard.all_reduce(measures.maxima, "max")
    if may_read(targets.groups) and measures.find_other_rows().any():
        raise ValueError(OTHER_ROWS)  # on all ranks; where nobody may look, such rows become NaN
    if kernels:
        launch_sums(targets, shard, own, measures)
    else:
        torch_sums(logits, targets, shard, own, measures)
    shard.all_reduce(measures.sums, "sum")
    if measures.predictions is not None:
        _find_first(measures, own, shard)
    (launch_scores if kernels else torch_scores)(targets, shard, measures, scores)


def _find_first(measures: Measures, own: Tensor, shard: VocabularyShard) -> None:
    """Leave the first id of the largest logit: only the ranks that hold one that large take part."""
    assert measures.predictions is not None
    measures.predictions.masked_fill_(own[BEFORE_CAP] != measures.maxima[BEFORE_CAP], shard.vocab_size)
    shard.all_reduce(measures.predictions, "min")
    # No rank has one where all logits are NaN or -inf: then the first id, as on one rank with the whole vocabulary.
    measures.predictions.masked_fill_(measures.predictions == shard.vocab_size, 0)


ShardArguments = tuple[list[int] | None, int, str]


def flattened_shard(shard: VocabularyShard | None) -> ShardArguments:
    """Return a shard as arguments of an operator: ``int[]? sizes, int rank, str group_name``."""
    return (None, 0, "") if shard is None else (list(shard.sizes), shard.rank, shard.group_name)


def restored_shard(sizes: Sequence[int] | None, rank: int, group_name: str) -> VocabularyShard | None:
    """Return what `flattened_shard` took apart."""
    return None if sizes is None else VocabularyShard(tuple(sizes), rank, group_name)


# What torch.compile sees of the above: an operator that it does not look into.
@torch.library.custom_op(
    "npp_kernels::sharded_scores",
    mutates_args=(),
    schema="(Tensor logits, Tensor groups, Tensor? slot_scale, Tensor? class_weight, Tensor? totals, int ignore_index, "
    "str normalize, float? label_smoothing, float? z_loss, float? softcap, bool token_scaling, int[]? sizes, int rank, "
    "str group_name, bool per_target, bool stats) -> Tensor[]",
)
def _sharded_scores(logits: Tensor, *arguments: Any) -> list[Tensor]:
    targets, scores = _room(logits, arguments)
    score_over_ranks(logits, targets, scores)
    return [part for part in scores if part is not None]


@_sharded_scores.register_fake
def _(logits: Tensor, *arguments: Any) -> list[Tensor]:
    _, scores = _room(logits, arguments)
    return [part for part in scores if part is not None]


def _room(logits: Tensor, arguments: Sequence[Any]) -> tuple[Targets, Scores]:
    """Return the targets behind the operator's arguments, and room for their scores."""
    groups, slot_scale, class_weight, totals = arguments[:4]
    shard, (per_target, stats) = restored_shard(*arguments[10:13]), arguments[13:]
    targets = Targets(groups, slot_scale, class_weight, totals, Settings(*arguments[4:10]), shard)
    return targets, Scores.empty(targets, logits.dtype, per_target=per_target, stats=stats)


def find_scores(logits: Tensor, targets: Targets, *, per_target: bool, stats: bool) -> Scores:
    """Return the scores of a slice of ``logits [N, V_r]``, the same on every rank; all ranks of the shard call it."""
    if not torch.compiler.is_compiling():
        scores = Scores.empty(targets, logits.dtype, per_target=per_target, stats=stats)
        score_over_ranks(logits, targets, scores)
        return scores
    shard = flattened_shard(targets.shard)
    rows, *found = _sharded_scores(logits, *targets.tensors(), *targets.settings, *shard, per_target, stats)
    losses = found.pop(0) if per_target else None
    probabilities = found.pop(0) if targets.settings.token_scaling else None
    return Scores(rows, losses, probabilities, found.pop(0) if stats else None)
