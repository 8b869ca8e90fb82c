"""The kernels of decoding as tests/test_ahead_of_time.py compiles them: LlamaGen-B and XL, with guidance."""

from npp_kernels._dispatch import next_power_of_2
from reference.sampling import choosing, decode_kernels


def multiply_arguments(dim, rows=64, *, norm=False, gated=False, residual=False, dtype="bf16"):
    pointer = f"*{dtype}"
    return {
        "x_ptr": pointer, "norm_ptr": pointer if norm else None, "weight_ptr": pointer,
        "gated_ptr": pointer if gated else None, "residual_ptr": pointer if residual else None, "out_ptr": pointer,
        "num_rows": "i32", "num_channels": "i32", "eps": "fp32", "DIM": dim, "OVERLAP": False,
        **decode_kernels.product_options(dim, rows, dtype == "fp32"),
    }  # fmt: skip


def attend_arguments(splits):
    return {
        "qkv_ptr": "*bf16", "cosine_ptr": "*fp32", "sine_ptr": "*fp32", "position_ptr": "*i64", "keys_ptr": "*bf16",
        "values_ptr": "*bf16", "out_ptr": "*bf16" if splits == 1 else "*fp32",
        "sums_ptr": None if splits == 1 else "*fp32", "scale": "fp32", "num_heads": "i32", "num_positions": "i32",
        "SPLIT": 256 // splits, "HEAD_DIM": 64, "OVERLAP": False, **decode_kernels.ATTEND_OPTIONS,
    }  # fmt: skip


def choose_arguments(vocab_size, top_k, top_p):
    return {
        "logits_ptr": "*bf16", "noise_ptr": "*fp32", "position_ptr": "*i64", "ids_ptr": "*i64", "tokens_ptr": "*i64",
        "finite_ptr": "*u8", "num_images": "i32", "vocab_size": "i32", "num_positions": "i32", "guidance": "fp32",
        "temperature": "fp32", "top_k": "i32", "GUIDED": True, "HAS_TOP_K": top_k, "SHARE": top_p, "OVERLAP": False,
        **choosing.row_options(vocab_size),
    }  # fmt: skip


def embed_arguments():
    tables = dict.fromkeys(("tokens_ptr", "classes_ptr", "out_ptr"), "*bf16")
    ids = dict.fromkeys(("ids_ptr", "labels_ptr", "position_ptr"), "*i64")
    block = min(next_power_of_2(768), decode_kernels.EMBED_BLOCK)
    return tables | ids | {"num_images": "i32", "DIM": 768, "BLOCK": block, "OVERLAP": False}


def combine_arguments():
    return {
        "parts_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*bf16", "NUM_SPLITS": 4, "HEAD_DIM": 64,
        "OVERLAP": False, "num_warps": 1,
    }  # fmt: skip


MULTIPLY = decode_kernels._multiply_kernel
DECODE_CASES = {
    "embed": (decode_kernels._embed_kernel, embed_arguments()),
    "multiply D=768 norm": (MULTIPLY, multiply_arguments(768, norm=True)),
    "multiply D=1280 norm gated": (MULTIPLY, multiply_arguments(1280, norm=True, gated=True)),
    "multiply D=768 norm gated, many rows": (MULTIPLY, multiply_arguments(768, 512, norm=True, gated=True)),
    "multiply D=768 norm gated, few rows": (MULTIPLY, multiply_arguments(768, 2, norm=True, gated=True)),
    "multiply D=768 norm gated fp32": (MULTIPLY, multiply_arguments(768, norm=True, gated=True, dtype="fp32")),
    "attend": (decode_kernels._attend_kernel, attend_arguments(1)),
    "attend in 4 splits": (decode_kernels._attend_kernel, attend_arguments(4)),
    "combine": (decode_kernels._combine_kernel, combine_arguments()),
    "choose V=16384": (choosing._choose_kernel, choose_arguments(16_384, False, None)),
    "choose V=1024 top-k, top-p": (choosing._choose_kernel, choose_arguments(1024, True, 0.9)),
}
# On sm_80 and sm_100 these spill 8 to 32 bytes.
HOPPER_DECODE_CASES = {
    "multiply D=2048 residual": (MULTIPLY, multiply_arguments(2048, residual=True)),
    "choose V=16384 top-k, top-p": (choosing._choose_kernel, choose_arguments(16_384, True, 0.9)),
}
