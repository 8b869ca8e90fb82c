"""The memory of `linear_patch_cross_entropy` as its docstring has it, counted on tensors without data."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npp_kernels.losses import chunks, exponential_rows, exponentials
from npp_kernels.losses.options import LossOptions
from npp_kernels.losses.scores import Scores
from npp_kernels.losses.targets import find_targets


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators allocate, for as long as a tensor on it lives."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.users = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of(arguments)}
        results = function(*arguments, **(options or {}))
        for tensor in tensors_of(results):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.users:
                if key in given:
                    continue  # allocated before
                self.users[key] = 0
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
            self.users[key] += 1
            weakref.finalize(tensor, self.release, key, storage.nbytes())
        return results

    def release(self, key, size):
        self.users[key] -= 1
        if self.users[key] == 0:
            del self.users[key]
            self.live -= size


def docstring_bytes(num_rows, vocab_size, hidden_size, chunk_rows, with_logits):
    """Return what the docstring says, beside the gradients, in bfloat16."""
    padded_size = -(-vocab_size // 64) * 64 if vocab_size % 16 else vocab_size
    row = 2 * padded_size + (0 if with_logits else 6 * hidden_size)
    if chunk_rows >= num_rows:
        return num_rows * row
    gradient = 2 * vocab_size * hidden_size
    return max(2 * gradient, gradient + chunk_rows * row)


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "hidden_size", "chunk_rows"),
    [
        (16384, 16384, 768, None),  # the 170 MiB of the benchmark
        (16384, 16384, 768, 1024),
        (16384, 16384, 1536, 256),  # where the gradient of the weight is what remains
        (4096, 16384, 768, None),  # one chunk
        (8192, 50257, 768, 2048),
    ],
)
def test_peak_beside_the_gradients(num_rows, vocab_size, hidden_size, chunk_rows, with_logits, monkeypatch):
    def nothing(*arguments, **options):
        return None

    monkeypatch.setattr(chunks, "serves_exponentials", lambda *_: not with_logits)
    monkeypatch.setattr(chunks, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(chunks, "_without_autocast", lambda tensor: nullcontext())  # it knows no such device
    monkeypatch.setattr(chunks, "launch_loss", nothing)
    monkeypatch.setattr(exponentials, "launch", nothing)
    monkeypatch.setattr(exponential_rows, "launch", nothing)

    # As on a GPU, which accumulates 16-bit operands into fp32 without copies of them.
    def product(left, right, dtype):
        return left.new_empty(len(left), right.shape[1], dtype=dtype)

    monkeypatch.setattr(chunks, "_product", product)
    monkeypatch.setattr(chunks, "_add_product", nothing)

    hidden = torch.empty(num_rows, hidden_size, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocab_size, hidden_size, dtype=torch.bfloat16, device="meta")
    groups = torch.empty(num_rows, 1, dtype=torch.int64, device="meta")
    targets, _ = find_targets(groups, LossOptions(-100, reduction="sum"), hidden)
    scores = Scores.empty(targets, hidden.dtype, per_target=False, stats=False)
    plan = chunks.Plan(torch.bfloat16, chunk_rows, (True, True, False))
    with LiveBytes() as memory:
        gradients = chunks.loss_and_gradients(chunks.Layer(hidden, weight, None), targets, plan, scores)
    assert [None if grad is None else grad.dtype for grad in gradients] == [torch.bfloat16, torch.bfloat16, None]
    beside = memory.peak - 2 * hidden_size * (num_rows + vocab_size)
    rows = 4096 if chunk_rows is None else chunk_rows
    expected = docstring_bytes(num_rows, vocab_size, hidden_size, rows, with_logits)
    # Vectors of one number a row are left out, and of a single chunk it is the most that it can be.
    assert (0.9 if rows >= num_rows else 1.0) * expected <= beside <= expected + 32 * num_rows
