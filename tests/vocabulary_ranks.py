"""What each process of tests/test_vocabulary_parallel.py does: all its cases, one after the other, in one group.

    python -m tests.vocabulary_ranks RANK WORLD FOLDER SEED DEVICE

Every rank draws the same inputs, cuts out its slice of the vocabulary, and compares what it gets with the operation of
one process on the whole. What failed goes to ``FOLDER/RANK.json``, by case, for the tests to find. The cases are in
`vocabulary_exactness` and `vocabulary_surroundings`.
"""

import json
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from npp_kernels import VocabularyShard
from tests import vocabulary_exactness as exactness
from tests import vocabulary_surroundings as surroundings
from tests.conftest import INTERPRETED
from tests.inputs import SLOT_WEIGHTS, make_groups
from tests.vocabulary_exactness import DTYPES, OPTIONS, linear_case, logits_case, mean_case, sure_case

SIZES = {1: [75], 2: [53, 22], 4: [30, 1, 24, 20]}  # uneven, one rank with a single id


class Ranks:
    """The process group, and this rank's slice of a vocabulary."""

    def __init__(self, rank, world, device):
        self.rank, self.world, self.device = rank, world, device
        self.runs_kernels = INTERPRETED or device.type == "cuda"
        self.sizes = SIZES[world]
        self.vocab_size = sum(self.sizes)
        self.shard = VocabularyShard.of(self.sizes[rank])
        assert self.shard.sizes == tuple(self.sizes)
        assert self.shard == VocabularyShard.of_sizes(self.sizes)
        # With a group of its own a rank holds everything.
        groups = [dist.new_group([other]) for other in range(world)]
        self.alone = VocabularyShard.of_sizes([self.vocab_size], groups[rank])

    def mine(self, tensor, axis=0):
        return tensor.narrow(axis, self.shard.start, self.shard.size).detach().clone()

    def groups(self, num_rows, group_size, *, ignored=0.2):
        return make_groups(self.vocab_size, num_rows, group_size, self.device, ignored=ignored)

    def options(self, options):
        """Return options whose tensors are made, and on the device."""
        made = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        if "class_weight" in made:
            made["class_weight"] = torch.rand(self.vocab_size, device=self.device) + 0.1
        return made

    def check_same_everywhere(self, tensor):
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first.isnan(), tensor.isnan())
        assert torch.equal(first.nan_to_num(), tensor.nan_to_num()), "ranks differ"


def named(dtype):
    return str(dtype).removeprefix("torch.")


CASES = {
    **{
        f"logits {named(dtype)} {options}": logits_case(options, dtype)
        for options in OPTIONS
        for dtype in DTYPES[: 1 if INTERPRETED and options else None]
    },
    **{
        f"linear {named(dtype)} bias={with_bias} chunk_rows={chunk_rows} {options}": linear_case(
            options, dtype, with_bias, chunk_rows
        )
        for dtype, with_bias, chunk_rows, options in [
            (torch.float32, False, None, {}),
            (torch.float32, True, 5, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}),
            (torch.float32, True, 7, {"reduction": "none", "class_weight": True}),
            (torch.float32, False, 6, {"normalize": "slot", "slot_weights": SLOT_WEIGHTS, "token_scaling": True}),
            (torch.float16, False, 5, {"normalize": "row"}),
            *((dtype, True, rows, {}) for dtype in DTYPES[2:] for rows in (None, 5)),
        ]
    },
    **{
        f"group_mean {named(dtype)} K={group_size} ignore_index={ignored} {out}": mean_case(
            dtype, group_size, ignored, out
        )
        for dtype in DTYPES
        for group_size, ignored, out in [(1, None, None), (4, None, None), (3, -100, torch.float32), (4, -100, None)]
    },
    **{f"sure by {gap} at {offset}": sure_case(gap, offset) for gap in (0, 10, 20, 30) for offset in (0.0, 1000.0)},
    **{case.__name__: case for case in (*exactness.CASES, *surroundings.CASES)},
}


@contextmanager
def process_group(rank, world, folder, device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main():
    rank, world, folder, seed = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    device = torch.device(sys.argv[5], *[rank] * (sys.argv[5] == "cuda"))
    outcomes = {}
    with process_group(rank, world, folder, device):
        ranks = Ranks(rank, world, device)
        for name, case in CASES.items():
            torch.manual_seed(seed)
            try:
                case(ranks)
            except Exception:
                outcomes[name] = traceback.format_exc()
            else:
                outcomes[name] = None
            (folder / f"{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
