"""Every kernel, compiled ahead of time for GPUs that need not be here; on CUDA targets it must not spill.

Where a kernel depends on a size, the sizes are those of training: LlamaGen's vocabulary and its four hidden sizes,
wide vocabularies, the largest groups. The GPU's own limits (shared memory, registers) are the target's, not this
machine's. The suite compiles for one GPU of each kind; ``python -m tests.spills`` for more, with any Triton.
"""

import inspect
import re
import subprocess
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from npp_kernels._dispatch import TRITON_OVERLAPS
from npp_kernels.embeddings import segments
from npp_kernels.embeddings.mean_kernels import MAX_BLOCK_HIDDEN, UNROLLED_SLOTS, _group_mean_kernel
from npp_kernels.embeddings.patch_mean import _patch_mean_kernel
from npp_kernels.embeddings.table_gradient import (
    CHUNK_SIZE,
    FEW_IDS,
    FREQUENT_HIDDEN,
    FREQUENT_ROWS,
    FREQUENT_SPAN,
    WARP_HIDDEN,
    WARP_ROWS,
    WARP_UNROLL,
    _few_ids_kernel,
    _frequent_rows_kernel,
    _segment_sums_kernel,
)
from npp_kernels.losses import (
    exponential_rows,
    exponentials,
    gradient_kernels,
    row_kernels,
    row_layout,
    shard_kernels,
    targets,
    wide_rows,
)
from reference.network import attention, swiglu
from reference.training import optimizer
from tests.conftest import INTERPRETED
from tests.decode_cases import DECODE_CASES, HOPPER_DECODE_CASES

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MORE_TARGETS = {
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
}
# Shared memory of one program, in bytes: CUDA programming guide, table of compute capabilities; CDNA 3 ISA, LDS.
SHARED_MEMORY = {
    **{"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024},
    **{"sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_120": 99 * 1024, "gfx90a": 64 * 1024},
}


def compile_kernel(kernel, target, arguments):
    """Compile ``kernel`` with ``arguments`` by name: a type ("*bf16", "i32"), or a value that is fixed.

    Pointers and 32-bit sizes are taken as multiples of 16, as they are in training, but for those of ragged rows;
    kernels overlap where the target can do that.
    """
    arguments = dict(arguments)
    if "OVERLAP" in arguments:
        arguments["OVERLAP"] = TRITON_OVERLAPS and target in ("sm_90", "sm_100", "sm_120")
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in arguments}
    if not target.startswith("sm_"):
        options.pop("maxnreg", None)
    types = {
        name: value if re.match(r"\*|i32|i64|fp32|tensordesc", str(np.ravel(value)[0])) else "constexpr"
        for name, value in arguments.items()
    }
    fixed = {name: value for name, value in arguments.items() if types[name] == "constexpr"}
    assert set(arguments) == set(kernel.arg_names)
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if str(kind).startswith("*")
        or name == "hidden_size"
        or (name in ("vocab_size", "logits_stride", "grad_stride", "row_stride") and not arguments.get("RAGGED"))
    }
    for name, kind in types.items():
        if isinstance(kind, tuple):
            aligned |= {(kernel.arg_names.index(name), i): [["tt.divisibility", 16]] for i in range(len(kind))}
    types = {name: types[name] for name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, types, fixed, aligned), target=(TARGETS | MORE_TARGETS)[target], options=options
    )


def resources(compiled, tmp_path):
    """Return the registers, and the bytes of stack and of spills, of a compiled CUDA kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack), int(local)


def group_mean_arguments(dtype, group_size, ignored, divide=True):
    block_hidden = MAX_BLOCK_HIDDEN
    return {
        "table_ptr": f"*{dtype}", "groups_ptr": "*i64", "out_ptr": f"*{dtype}",
        "counts_ptr": "*fp32" if ignored else None, "num_groups": "i32", "vocab_size": "i32", "hidden_size": "i32",
        "row_stride": "i32", "ignore_index": "i32",
        "GROUP_SIZE": group_size, "HAS_IGNORED": ignored, "BLOCK_GROUPS": 2, "BLOCK_HIDDEN": block_hidden,
        "UNROLL": UNROLLED_SLOTS, "DIVIDE": divide,
    }  # fmt: skip


def segment_arguments(dtype, group_size, ignored):
    return {
        "grad_ptr": f"*{dtype}", "keys_ptr": "*i32", "order_ptr": "*i32", "starts_ptr": "*i32",
        "counts_ptr": "*fp32" if ignored else None, "sums_ptr": "*fp32", "grad_table_ptr": f"*{dtype}",
        "num_chunks": "i32", "vocab_size": "i32", "hidden_size": "i32", "GROUP_SIZE": group_size,
        "HAS_IGNORED": ignored, "CHUNK": CHUNK_SIZE,
    }  # fmt: skip


def segment_sums_arguments(dtype, group_size, ignored):
    return {
        **segment_arguments(dtype, group_size, ignored), "ROWS": WARP_ROWS, "BLOCK_HIDDEN": WARP_HIDDEN,
        "UNROLL": WARP_UNROLL, "num_warps": 1,
    }  # fmt: skip


def frequent_rows_arguments(dtype, group_size, ignored):
    return {
        **segment_arguments(dtype, group_size, ignored), "SPAN": FREQUENT_SPAN, "ROWS": FREQUENT_ROWS,
        "BLOCK_HIDDEN": FREQUENT_HIDDEN, "num_warps": 4,
    }  # fmt: skip


def few_ids_arguments(dtype, group_size, ignored):
    return {
        "grad_ptr": f"*{dtype}", "groups_ptr": "*i64", "counts_ptr": "*fp32" if ignored else None,
        "grad_table_ptr": f"*{dtype}", "num_ids": "i32", "hidden_size": "i32", "ignore_index": "i32",
        "GROUP_SIZE": group_size, "HAS_IGNORED": ignored, "BLOCK_IDS": FEW_IDS, "BLOCK_HIDDEN": WARP_HIDDEN,
        "num_warps": 1,
    }  # fmt: skip


def patch_mean_arguments(dtype, backward):
    return {
        "embeddings_ptr": f"*{dtype}", "means_ptr": f"*{dtype}", "num_patches": "i32", "hidden_size": "i32",
        "height": "i32", "width": "i32", "KT": 1, "KH": 4, "KW": 4, "BACKWARD": backward, "BLOCK_PATCHES": 4,
        "BLOCK_HIDDEN": 512, "UNROLL": 8,
    }  # fmt: skip


def rank_sort_arguments():
    return {
        "ids_ptr": "*i64", "keys_ptr": "*i32", "order_ptr": "*i32", "num_ids": "i32", "vocab_size": "i32",
        "ignore_index": "i32", "HAS_IGNORED": True, "BLOCK": segments.RANK_BLOCK,
        "BLOCK_OTHERS": segments.RANK_OTHERS, "OVERLAP": False,
    }  # fmt: skip


def digit_arguments():
    return {
        "counts_ptr": "*i32", "num_ids": "i32", "num_tiles": "i32", "subtiles": "i32", "vocab_size": "i32",
        "ignore_index": "i32", "PASSES": 2, "BITS": segments.DIGIT_BITS, "HAS_IGNORED": True,
        "TILE": segments.TILE_SIZE, "OVERLAP": False,
    }  # fmt: skip


def digit_counts_arguments():
    return {**digit_arguments(), "ids_ptr": "*i64"}


def digit_scatter_arguments(index):
    return {
        **digit_arguments(), "ids_ptr": "*i32" if index else "*i64", "positions_ptr": "*i32", "keys_ptr": "*i32",
        "order_ptr": "*i32", "PASS": index, "BLOCK_TILES": segments.BLOCK_TILES,
        "BLOCK_OTHERS": segments.TILE_OTHERS, "num_warps": segments.SCATTER_WARPS,
    }  # fmt: skip


def segment_starts_arguments():
    return {
        "keys_ptr": "*i32", "starts_ptr": "*i32", "num_ids": "i32", "vocab_size": "i32",
        "BLOCK": segments.STARTS_BLOCK, "OVERLAP": False,
    }  # fmt: skip


def loss_targets(group_size, totals=True):
    groups = torch.empty(1, group_size, device="meta")
    settings = targets.Settings(-100, "target" if totals else "none", None, None, None, False)
    return targets.Targets(groups, None, None, torch.empty(2, 16, device="meta") if totals else None, settings)


def loss_arguments(dtype, group_size, *, everything, totals=True):
    return {
        "logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "groups_ptr": "*i64",
        "slot_scale_ptr": "*fp32" if everything else None, "class_weight_ptr": "*fp32" if everything else None,
        "totals_ptr": "*fp32" if totals else None,
        "rows_ptr": "*fp32", "logits_stride": "i32", "grad_stride": "i32", "rows_stride": "i32", "vocab_size": "i32",
        "ignore_index": "i32",
        "label_smoothing": "fp32" if everything else None, "z_loss": "fp32" if everything else None,
        "softcap": "fp32" if everything else None, "OVERLAP": False, **loss_targets(group_size, totals).constants(),
    }  # fmt: skip


def row_case(dtype, vocab_size, group_size, everything=False):
    max_bytes = row_kernels.MAX_SMOOTHED_BYTES if everything else row_kernels.MAX_BLOCK_BYTES
    ragged = vocab_size % row_layout.ALIGNMENT != 0
    in_registers, options = row_kernels._row_options(vocab_size, 4 if dtype == "fp32" else 2, max_bytes, ragged)
    pointer = "*fp32" if everything else None
    if ragged and not everything and dtype == "bf16" and options["BLOCK_VOCAB"] == row_kernels.LIMITED_BLOCK:
        options["maxnreg"] = row_kernels.MAX_REGISTERS
    return row_kernels._register_row_kernel if in_registers else wide_rows._wide_row_kernel, {
        **loss_arguments(dtype, group_size, everything=everything), **options, "losses_ptr": pointer,
        "probabilities_ptr": pointer, "predictions_ptr": "*i64" if everything else None, "ticket_ptr": "*i32",
        "loss_ptr": "*fp32",
    }  # fmt: skip


def staggered_case(case):
    kernel, arguments = case
    return kernel, {**arguments, "started_ptr": "*i32", "first_wave": "i32"}


def gradient_arguments(dtype, group_size, per_target):
    limited = per_target and dtype != "fp32" and group_size in gradient_kernels.LIMITED_SLOTS
    return ({"maxnreg": gradient_kernels.MAX_REGISTERS} if limited else {}) | {
        **loss_arguments(dtype, group_size, everything=not per_target, totals=not per_target),
        "upstream_ptr": None if per_target else "*fp32", "target_upstream_ptr": "*fp32" if per_target else None,
        "num_rows": "i32", "first_id": None, "num_ids": None, "SKIP_UNIT": not per_target,
        "BLOCK_VOCAB": gradient_kernels.GRADIENT_BLOCK, "EVEN": per_target, "RAGGED": False, "num_warps": 8,
    }  # fmt: skip


def ragged_gradient_arguments(dtype, group_size, per_target):
    arguments = gradient_arguments(dtype, group_size, per_target)
    arguments.pop("maxnreg", None)  # of rows that fill their blocks
    limited = {"maxnreg": gradient_kernels.MAX_REGISTERS} if group_size in gradient_kernels.LIMITED_RAGGED_SLOTS else {}
    return {**arguments, **(limited if per_target else {}), "EVEN": False, "RAGGED": True}


def slice_gradient_arguments():
    return {**gradient_arguments("bf16", 4, False), "first_id": "i32", "num_ids": "i32"}


def measure_arguments(dtype, slice_size, group_size, everything=False):
    pointer = "*fp32" if everything else None
    return {
        "logits_ptr": f"*{dtype}", "groups_ptr": "*i64", "class_weight_ptr": pointer, "maximum_ptr": "*fp32",
        "checksum_ptr": "*fp32", "before_cap_ptr": pointer, "rest_ptr": "*fp32", "distances_ptr": "*fp32",
        "shortfall_ptr": pointer,
        "weighted_sum_ptr": pointer, "predictions_ptr": "*i64" if everything else None, "logits_stride": "i32",
        "rows_stride": "i32", "slice_size": "i32", "first_id": "i32", "ignore_index": "i32",
        "softcap": "fp32" if everything else None,
        "GROUP_SIZE": group_size, "BLOCK_SLOTS": triton.next_power_of_2(group_size),
        **shard_kernels.measure_options(slice_size, 4 if dtype == "fp32" else 2, everything),
    }  # fmt: skip


def sum_arguments(group_size, everything=False):
    pointer = "*fp32" if everything else None
    return {
        "own_ptr": "*fp32", "maxima_ptr": "*fp32", "checksum_ptr": "*fp32", "groups_ptr": "*i64",
        "slice_weight_ptr": pointer,
        "rest_ptr": "*fp32", "holders_ptr": "*fp32", "distances_ptr": "*fp32", "shortfall_ptr": pointer,
        "weighted_sum_ptr": pointer, "num_rows": "i32", "slice_size": "i32", "first_id": "i32", "ignore_index": "i32",
        "GROUP_SIZE": group_size, "BLOCK_ROWS": shard_kernels.SUM_ROWS,
    }  # fmt: skip


def rank_score_arguments(group_size, everything=False):
    pointer, ids = ("*fp32", "*i64") if everything else (None, None)
    return {
        "maxima_ptr": "*fp32", "rest_ptr": "*fp32", "holders_ptr": "*fp32", "distances_ptr": "*fp32",
        "shortfall_ptr": pointer, "weighted_sum_ptr": pointer, "best_ids_ptr": ids, "groups_ptr": "*i64",
        "slot_scale_ptr": pointer, "class_weight_ptr": pointer, "totals_ptr": "*fp32", "rows_ptr": "*fp32",
        "losses_ptr": pointer, "probabilities_ptr": pointer, "predictions_ptr": ids, "rows_stride": "i32",
        "num_rows": "i32", "vocab_size": "i32", "ignore_index": "i32",
        "label_smoothing": "fp32" if everything else None, "z_loss": "fp32" if everything else None, "num_warps": 1,
        **loss_targets(group_size).constants(),
    }  # fmt: skip


def count_arguments(group_size):
    return {
        "groups_ptr": "*i64", "slot_weights_ptr": "*fp32", "class_weight_ptr": "*fp32", "totals_ptr": "*fp32",
        "ticket_ptr": "*i32", "num_rows": "i32", "vocab_size": "i32", "ignore_index": "i32", "GROUP_SIZE": group_size,
        "BLOCK_SLOTS": triton.next_power_of_2(group_size), "BLOCK_ROWS": max(
            targets.COUNT_BLOCK // triton.next_power_of_2(group_size), 1
        ), "OVERLAP": False,
    }  # fmt: skip


def scale_arguments(dtype):
    return {
        "grad_ptr": f"*{dtype}", "upstream_ptr": "*fp32", "num_rows": "i32", "grad_stride": "i32", "row_size": "i32",
        "BLOCK": gradient_kernels.GRADIENT_BLOCK, "OVERLAP": False,
    }  # fmt: skip


def exponentials_arguments(even):
    rows, vocab, hidden = exponentials.BLOCK_ROWS, exponentials.BLOCK_VOCAB, exponentials.BLOCK_HIDDEN
    return {
        "sums_ptr": "*fp32", "offsets_ptr": "*fp32", "hidden_desc": f"tensordesc<bf16[{rows}, {hidden}]>",
        "weight_desc": f"tensordesc<bf16[{vocab}, {hidden}]>",
        "exponentials_desc": f"tensordesc<bf16[{rows}, {vocab // 2}]>", "num_rows": "i32", "vocab_size": "i32",
        "hidden_size": "i32", "BLOCK_ROWS": rows, "BLOCK_VOCAB": vocab, "BLOCK_HIDDEN": hidden,
        "GROUP_ROWS": exponentials.GROUP_ROWS, "EVEN": even, "num_warps": 8, "num_stages": exponentials.STAGES,
    }  # fmt: skip


def offsets_arguments():
    return {
        "hidden_ptr": "*bf16", "weight_ptr": "*bf16", "offsets_ptr": "*fp32", "num_rows": "i32", "vocab_size": "i32",
        "hidden_size": "i32", "SAMPLE": exponentials.SAMPLE_SIZE, "BLOCK_ROWS": exponentials.SAMPLE_ROWS,
        "BLOCK_HIDDEN": exponentials.BLOCK_HIDDEN,
    }  # fmt: skip


def score_arguments(group_size, hidden_size, everything=False):
    pointer = "*fp32" if everything else None
    return {
        "exponentials_ptr": "*bf16", "sums_ptr": "*fp32", "offsets_ptr": "*fp32", "hidden_ptr": "*bf16",
        "weight_ptr": "*bf16", "groups_ptr": "*i64", "slot_scale_ptr": "*fp32", "class_weight_ptr": pointer,
        "totals_ptr": "*fp32", "rows_ptr": "*fp32", "probabilities_ptr": pointer, "scales_ptr": "*fp32",
        "scaled_ptr": "*bf16", "rows_stride": "i32", "vocab_size": "i32", "hidden_size": "i32", "ignore_index": "i32",
        "z_loss": "fp32", "exponentials_stride": None, "NUM_SUMS": 64, "BLOCK_SUMS": 64,
        "TILE": exponentials.BLOCK_VOCAB, "OVERLAP": False,
        **exponential_rows._score_options(hidden_size, group_size), **loss_targets(group_size).constants(),
    }  # fmt: skip


def scale_rows_arguments():
    return {
        "products_ptr": "*fp32", "scales_ptr": "*fp32", "grad_ptr": "*bf16", "hidden_size": "i32",
        "BLOCK_HIDDEN": 1024, "OVERLAP": False,
    }  # fmt: skip


def attention_arguments(num_positions, backward):
    _, options = attention.tiles(torch.empty(1, num_positions, 3, 12, 64, device="meta"), backward)
    return {
        "qkv_ptr": "*bf16", "cosine_ptr": "*fp32", "sine_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32",
        "scale": "fp32", "num_positions": "i32", "num_heads": "i32", **options,
        **({"grad_out_ptr": "*bf16", "grad_qkv_ptr": "*bf16", "softmax_scale": "fp32"} if backward else {}),
    }  # fmt: skip


def adamw_arguments(working, average):
    return {
        "master_ptr": "*fp32", "moment1_ptr": "*fp32", "moment2_ptr": "*fp32", "working_ptr": working,
        "average_ptr": average, "scalars_ptr": "*fp32",
        "gradients": (working or "*fp32",) * optimizer.GRADIENTS_OF_A_LAUNCH,
        "starts": ("i32",) * optimizer.GRADIENTS_OF_A_LAUNCH, "sizes": ("i32",) * optimizer.GRADIENTS_OF_A_LAUNCH,
        "keep1": "fp32", "keep2": "fp32", "weight_decay": "fp32", "keep_average": "fp32",
        "EPSILON": optimizer.EPSILON, "BLOCK": optimizer.BLOCK,
    }  # fmt: skip


CASES = {
    "group_mean K=1": (_group_mean_kernel, group_mean_arguments("bf16", 1, False)),
    "group_mean K=16": (_group_mean_kernel, group_mean_arguments("bf16", 16, False)),
    "group_mean K=64 ignored": (_group_mean_kernel, group_mean_arguments("fp32", 64, True)),
    "group_mean K=4, sums": (_group_mean_kernel, group_mean_arguments("bf16", 4, True, False)),
    "few_ids K=4": (_few_ids_kernel, few_ids_arguments("bf16", 4, False)),
    "few_ids K=4 ignored": (_few_ids_kernel, few_ids_arguments("fp32", 4, True)),
    "segment_sums K=4": (_segment_sums_kernel, segment_sums_arguments("bf16", 4, False)),
    "segment_sums K=4 ignored": (_segment_sums_kernel, segment_sums_arguments("fp32", 4, True)),
    "frequent_rows K=4": (_frequent_rows_kernel, frequent_rows_arguments("bf16", 4, False)),
    "frequent_rows K=4 ignored": (_frequent_rows_kernel, frequent_rows_arguments("fp32", 4, True)),
    "patch_mean forward": (_patch_mean_kernel, patch_mean_arguments("bf16", False)),
    "patch_mean backward": (_patch_mean_kernel, patch_mean_arguments("fp32", True)),
    "rank_sort": (segments._rank_sort_kernel, rank_sort_arguments()),
    "digit_counts": (segments._digit_counts_kernel, digit_counts_arguments()),
    "digit_scatter first": (segments._digit_scatter_kernel, digit_scatter_arguments(0)),
    "digit_scatter later": (segments._digit_scatter_kernel, digit_scatter_arguments(1)),
    "segment_starts": (segments._segment_starts_kernel, segment_starts_arguments()),
    "count_targets": (targets._count_targets_kernel, count_arguments(16)),
    "loss V=16384 K=1": row_case("bf16", 16384, 1),
    "loss V=16384 K=16": row_case("bf16", 16384, 16),
    "loss V=16384 K=4 all options": row_case("bf16", 16384, 4, True),
    "loss V=32768 K=4": row_case("bf16", 32768, 4),
    "loss V=16384 K=4 fp32": row_case("fp32", 16384, 4),
    "loss V=32768 K=4 fp32": row_case("fp32", 32768, 4),
    "loss V=1024 K=4 fp32 all options": row_case("fp32", 1024, 4, True),
    "loss V=128256 K=1": row_case("bf16", 128256, 1),
    "loss V=262144 K=256": row_case("bf16", 262144, 256),
    "loss V=128256 K=4 all options": row_case("fp32", 128256, 4, True),
    "loss V=262144 K=4, half a row apart": staggered_case(row_case("bf16", 262144, 4)),
    "loss V=50257 K=1": row_case("bf16", 50257, 1),
    "loss V=50257 K=4 fp32": row_case("fp32", 50257, 4),
    "loss V=50257 K=4 all options": row_case("bf16", 50257, 4, True),
    "loss V=16385 K=4": row_case("bf16", 16385, 4),
    "loss V=32767 K=4": row_case("bf16", 32767, 4),
    "loss V=16383 K=16": row_case("bf16", 16383, 16),
    "loss V=1023 K=4 all options": row_case("fp32", 1023, 4, True),
    "gradient K=4": (gradient_kernels._gradient_kernel, gradient_arguments("fp16", 4, False)),
    "gradient K=5 per target": (gradient_kernels._gradient_kernel, gradient_arguments("bf16", 5, True)),
    "gradient K=16 per target": (gradient_kernels._gradient_kernel, gradient_arguments("bf16", 16, True)),
    "gradient K=64 per target": (gradient_kernels._gradient_kernel, gradient_arguments("bf16", 64, True)),
    "gradient K=256 per target": (gradient_kernels._gradient_kernel, gradient_arguments("bf16", 256, True)),
    "gradient K=4 per target, ragged": (gradient_kernels._gradient_kernel, ragged_gradient_arguments("bf16", 4, True)),
    "gradient K=16 per target, ragged": (
        gradient_kernels._gradient_kernel,
        ragged_gradient_arguments("bf16", 16, True),
    ),
    "gradient K=4, ragged": (gradient_kernels._gradient_kernel, ragged_gradient_arguments("bf16", 4, False)),
    "gradient K=4 of a slice": (gradient_kernels._gradient_kernel, slice_gradient_arguments()),
    "measure V=64128 K=4": (shard_kernels._measure_kernel, measure_arguments("bf16", 64128, 4)),
    "measure V=16032 K=16": (shard_kernels._measure_kernel, measure_arguments("bf16", 16032, 16)),
    "measure V=64128 K=1 all options": (shard_kernels._measure_kernel, measure_arguments("fp32", 64128, 1, True)),
    "sums over ranks K=4": (shard_kernels._sum_kernel, sum_arguments(4)),
    "sums over ranks K=256 all options": (shard_kernels._sum_kernel, sum_arguments(256, True)),
    "score over ranks K=1": (shard_kernels._score_kernel, rank_score_arguments(1)),
    "score over ranks K=256 all options": (shard_kernels._score_kernel, rank_score_arguments(256, True)),
    "scale": (gradient_kernels._scale_kernel, scale_arguments("bf16")),
}


def swiglu_arguments(backward):
    arguments = {"joined_ptr": "*bf16", "num_channels": "i32", "BLOCK": swiglu.BLOCK}
    pointers = ("grad_out_ptr", "grad_joined_ptr") if backward else ("out_ptr",)
    return arguments | dict.fromkeys(pointers, "*bf16")


OPAQUE_CASES = {  # which torch.compile does not see: the optimizer's, and those behind an operator
    "swiglu": (swiglu._swiglu_kernel, swiglu_arguments(False)),
    "swiglu backward": (swiglu._swiglu_backward_kernel, swiglu_arguments(True)),
    "adamw": (optimizer._adamw_kernel, adamw_arguments("*bf16", None)),
    "adamw fp32 with an average": (optimizer._adamw_kernel, adamw_arguments(None, "*fp32")),
}
HOPPER_CASES = {
    "attention P=16": (attention._forward_kernel, attention_arguments(16, False)),
    "attention P=256": (attention._forward_kernel, attention_arguments(256, False)),
    "attention P=16 backward": (attention._backward_kernel, attention_arguments(16, True)),
    "attention P=64 backward": (attention._backward_kernel, attention_arguments(64, True)),
    "attention P=256 backward": (attention._backward_kernel, attention_arguments(256, True)),
    "exponentials": (exponentials._exponentials_kernel, exponentials_arguments(True)),
    "exponentials uneven": (exponentials._exponentials_kernel, exponentials_arguments(False)),
    "offsets": (exponentials._offsets_kernel, offsets_arguments()),
    "score K=1": (exponential_rows._score_exponentials_kernel, score_arguments(1, 768)),
    "score K=4": (exponential_rows._score_exponentials_kernel, score_arguments(4, 768)),
    "score K=16": (exponential_rows._score_exponentials_kernel, score_arguments(16, 1536)),
    "score K=256": (exponential_rows._score_exponentials_kernel, score_arguments(256, 2048)),
    "score K=4 all options": (exponential_rows._score_exponentials_kernel, score_arguments(4, 1536, True)),
    "score K=4 padded rows": (
        exponential_rows._score_exponentials_kernel,
        score_arguments(4, 768) | {"exponentials_stride": "i32"},
    ),
    "scale_rows": (exponential_rows._scale_rows_kernel, scale_rows_arguments()),
}
OPAQUE_CASES |= DECODE_CASES
HOPPER_CASES |= HOPPER_DECODE_CASES
ALL_CASES = CASES | OPAQUE_CASES | HOPPER_CASES


@pytest.mark.parametrize(
    ("case", "target"),
    [*product(CASES | OPAQUE_CASES, TARGETS), *((case, "sm_90") for case in HOPPER_CASES)],
    ids=str,
)
def test_compiles_without_spills(case, target, tmp_path):
    if target.startswith("gfx") and not TRITON_OVERLAPS:
        pytest.skip("Triton 3.4 links for AMD's GPUs with ROCm's own linker")
    kernel, arguments = ALL_CASES[case]
    compiled = compile_kernel(kernel, target, arguments)
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    if target != "gfx942":
        registers, stack, local = resources(compiled, tmp_path)
        # A limit of ours was measured with Triton 3.6, which keeps to it without spills; 3.9 puts up to six registers
        # on the stack.
        allowed = 24 if "maxnreg" in arguments else 0
        spilled = f"spills: {stack} bytes of stack, {local} of local memory, {registers} registers"
        assert stack <= allowed, spilled
        assert local == 0, spilled


def test_a_capped_logit_is_rounded_before_it_is_used():
    """Fused into one fma, ``cap · tanh − maximum`` is not 0 at the maximum, and a sure row counts that one twice."""
    kernel, arguments = row_case("fp32", 512, 4)
    arguments = arguments | {"softcap": "fp32"}
    ptx = compile_kernel(kernel, "sm_90", arguments).asm["ptx"]
    elements = arguments["BLOCK_VOCAB"] // (32 * arguments["num_warps"])
    plain = compile_kernel(kernel, "sm_90", arguments | {"softcap": None}).asm["ptx"]
    assert ptx.count("sub.f32") >= max(plain.count("sub.f32"), elements)


@pytest.mark.skipif(not TRITON_OVERLAPS, reason="this Triton has no overlapping launches")
@pytest.mark.parametrize("case", [name for name, case in ALL_CASES.items() if "OVERLAP" in case[1]])
def test_an_overlapping_kernel_waits_before_it_writes(case):
    """What was launched before may still be reading or writing until then."""
    kernel, arguments = ALL_CASES[case]
    ptx = compile_kernel(kernel, "sm_90", arguments).asm["ptx"]
    if kernel is targets._count_targets_kernel:
        # It starts when all before it has ended, and lets the next one start.
        assert "griddepcontrol.launch_dependents" in ptx
        assert "griddepcontrol.wait" not in ptx
        return
    writes = re.search(r"\b(st\.global|atom\.global|red\.global)", ptx)
    assert 0 < ptx.find("griddepcontrol.wait") < writes.start()


class _FakeDriver:
    """What torch asks of Triton's driver when it looks at a kernel, on a machine without a GPU."""

    def get_current_target(self):
        return TARGETS["sm_90"]


@pytest.mark.parametrize("case", CASES)
def test_torch_compile_sees_what_a_kernel_writes(case, monkeypatch):
    """An input that torch.compile takes for written to is copied at every call, and at worst overwritten.

    What a kernel writes stands as "out" behind its parameter.
    """
    analysis = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    if not hasattr(analysis, "identify_accessed_tensors"):
        pytest.skip("this torch names its analysis otherwise")
    kernel, arguments = CASES[case]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32}
    values = {}
    for name, value in arguments.items():
        if isinstance(value, str) and value.startswith("*"):
            values[name] = torch.zeros(64, dtype=dtypes.get(value[1:], torch.int64))
        elif value in ("i32", "fp32"):
            values[name] = 64 if value == "i32" else 0.5
        elif name not in ("num_warps", "num_stages", "maxnreg"):
            values[name] = value
    monkeypatch.setattr(triton.runtime.driver, "_active", _FakeDriver())
    written = {dep.name for dep in analysis.identify_accessed_tensors(kernel, values, {}).read_writes.writes}
    declared = set(re.findall(r"^    (\w+_ptr),  # .*\bout\b", inspect.getsource(kernel.fn), flags=re.MULTILINE))
    assert written
    assert written <= declared


def test_every_kernel_is_covered():
    """A kernel that is added must be added here too."""
    import npp_kernels
    import reference

    defined = set()
    for path in chain(*(Path(package.__file__).parent.rglob("*.py") for package in (npp_kernels, reference))):
        defined |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), flags=re.MULTILINE))
    assert defined == {kernel.__name__ for kernel, _ in ALL_CASES.values()}
