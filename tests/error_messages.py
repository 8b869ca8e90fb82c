"""Every error message of npp_kernels' operations, modules and schedule, each provoked.

``python -m tests.error_messages`` writes `docs/errors.md`; `test_error_messages.py` checks that every `raise` of these
files is provoked here, and that the page says what they say now.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import torch

import npp_kernels
from npp_kernels import (
    PatchSchedule,
    VocabularyShard,
    _checks,
    group_mean,
    group_tokens,
    order_groups,
    patch_mean,
    ungroup_tokens,
)
from npp_kernels import linear_patch_cross_entropy as linear
from npp_kernels import patch_cross_entropy as loss

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npp_kernels"
PAGE = ROOT / "docs" / "errors.md"
FILES = [
    *("grouping.py", "embeddings/group_mean.py", "embeddings/group_order.py", "embeddings/patch_mean.py"),
    *("losses/patch_cross_entropy.py", "losses/linear_patch_cross_entropy.py", "losses/options.py"),
    *("modules.py", "schedule.py", "_checks.py", "_autograd.py"),
]

IDS = torch.zeros(2, 3, dtype=torch.int64)
TABLE, LOGITS, HIDDEN = torch.zeros(5, 4), torch.zeros(2, 5), torch.zeros(2, 4)
SCHEDULE = PatchSchedule([(2, 10), (1, 20)])
ORDER = order_groups(IDS, 5)


def _sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    started = torch.distributed.is_initialized()
    if not started:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group_mean(TABLE, distribute_tensor(IDS.clone(), init_device_mesh("cpu", (1,))))  # a table may be one
    finally:
        if not started:
            torch.distributed.destroy_process_group()


def _second_backward():
    result = loss(LOGITS.clone().requires_grad_() * 1, IDS, inplace_backward=True)
    result.backward(retain_graph=True)
    result.backward()


def _double_backward():
    leaf = LOGITS.clone().requires_grad_()
    torch.autograd.grad(loss(leaf, IDS), leaf, create_graph=True)[0].sum().backward()


def _with_gradient(*shape):
    return torch.ones(shape, requires_grad=True)


PROVOCATIONS = [
    lambda: group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), 1.5),
    lambda: group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), (1, 1, 1, 1)),
    lambda: group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), 0),
    lambda: group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), (2, 2), grid=(4,)),
    lambda: group_tokens(torch.zeros(4, dtype=torch.int64), (2, 2)),
    lambda: group_tokens(torch.zeros(1, 16, dtype=torch.int64), (2, 2), grid=(4, 4.0)),
    lambda: group_tokens(torch.zeros(1, 15, dtype=torch.int64), 2, grid=(4, 4)),
    lambda: group_tokens(torch.zeros(1, 5, 4, dtype=torch.int64), 2),
    lambda: group_tokens(torch.zeros(8, 64, dtype=torch.int64), 4),
    lambda: ungroup_tokens(torch.zeros(3, 4, dtype=torch.int64), 2, grid=(4, 4)),
    lambda: group_tokens([[1, 2]], 1),
    lambda: group_tokens(torch.zeros(1, 4, 4), 2),
    _sharded,
    lambda: group_mean(TABLE, IDS.to(torch.uint8)),
    lambda: group_mean(TABLE, IDS[:, :0]),
    lambda: group_mean(TABLE.long(), IDS),
    lambda: group_mean(TABLE[0], IDS),
    lambda: group_mean(TABLE, IDS.to("meta")),
    lambda: group_mean(TABLE, IDS + 5),
    lambda: group_mean(TABLE, IDS, out_dtype=torch.int64),
    lambda: order_groups(IDS, 5.0),
    lambda: order_groups(IDS, 0),
    lambda: group_mean(TABLE, IDS, order=IDS),
    lambda: group_mean(TABLE, IDS, order=ORDER._replace(keys=ORDER.keys.long())),
    lambda: group_mean(TABLE, IDS[:1], order=ORDER),
    lambda: group_mean(TABLE, IDS, ignore_index=-100, order=ORDER),
    lambda: _with_checks(lambda: group_mean(TABLE, IDS + 1, order=ORDER)),
    lambda: group_mean(TABLE, IDS, shard=VocabularyShard((5,), 0, "none"), order=ORDER),
    lambda: patch_mean(torch.zeros(4), 2),
    lambda: loss(LOGITS, IDS[:1]),
    lambda: loss(LOGITS[:, :0], IDS),
    lambda: loss(LOGITS[:1].expand(2, 5), IDS, inplace_backward=True),
    _second_backward,
    _double_backward,
    lambda: torch.vmap(lambda row: loss(row, IDS))(LOGITS[None]),
    lambda: linear(HIDDEN[:, :3], TABLE, IDS),
    lambda: linear(HIDDEN, TABLE, IDS[:1]),
    lambda: linear(HIDDEN, TABLE[:0], IDS),
    lambda: linear(HIDDEN, TABLE, IDS, bias=torch.zeros(4)),
    lambda: linear(HIDDEN, TABLE.half(), IDS),
    lambda: linear(HIDDEN, TABLE, IDS, chunk_rows=0),
    lambda: loss(LOGITS, IDS, ignore_index=None),
    lambda: loss(LOGITS, IDS, normalize="rows"),
    lambda: loss(LOGITS, IDS, reduction="avg"),
    lambda: loss(LOGITS, IDS, label_smoothing=1.5),
    lambda: loss(LOGITS, IDS, z_loss=-1.0),
    lambda: loss(LOGITS, IDS, softcap=0.0),
    lambda: loss(LOGITS, IDS, z_loss=0.1, reduction="none"),
    lambda: loss(LOGITS, IDS, slot_weights=[1.0, 1.0, 1.0], reduction="none"),
    lambda: loss(LOGITS, IDS, slot_weights=torch.ones(1, 3)),
    lambda: loss(LOGITS, IDS, slot_weights=[1.0, -1.0, 1.0]),
    lambda: loss(LOGITS, IDS, slot_weights=[1.0]),
    lambda: loss(LOGITS, IDS, slot_weights=_with_gradient(3)),
    lambda: loss(LOGITS, IDS, num_targets=3, normalize="row"),
    lambda: loss(LOGITS, IDS, num_targets=torch.ones(2)),
    lambda: loss(LOGITS, IDS, num_targets=-1),
    lambda: loss(LOGITS, IDS, class_weight=torch.ones(4)),
    lambda: npp_kernels.PatchEmbedding(5, 4, max_norm=1.0),
    lambda: PatchSchedule([3]),
    lambda: PatchSchedule([(2, 10), (1, 10)]),
    lambda: PatchSchedule([]),
    lambda: PatchSchedule([(2, 1.5)]),
    lambda: PatchSchedule.coarse_to_fine(9, 100),
    lambda: PatchSchedule.coarse_to_fine(2, 0),
    lambda: PatchSchedule.coarse_to_fine(2, 100, rate=1.0),
    lambda: PatchSchedule.coarse_to_fine(3, 2),
    lambda: SCHEDULE.at(20),
    lambda: SCHEDULE.lr_factor(0, -1, 0.0, 0.0),
    lambda: SCHEDULE.lr_factor(0, 0, 2.0, 0.0),
    lambda: SCHEDULE.lr_factor(0, 0, 0.0, 2.0),
    lambda: SCHEDULE.relative_cost((4, 4), hidden_size=0, num_layers=1, vocab_size=1),
    lambda: SCHEDULE.relative_cost((4, 4), hidden_size=8),
    lambda: _read("perhaps"),
]


def _read(word):
    from unittest import mock

    with mock.patch.dict("os.environ", NPP_KERNELS_CHECK=word):
        _checks.read_switch("NPP_KERNELS_CHECK")


def _with_checks(call):
    _checks.check_ids(True)
    try:
        call()
    finally:
        _checks.check_ids(False)


class Message(NamedTuple):
    """An error as it came, and the `raise` that it came from."""

    file: str
    line: int
    kind: str
    text: str


def raises(file):
    """Return the first and the last line of every `raise` with an error in a file of the package."""
    tree = ast.parse((PACKAGE / file).read_text())
    return sorted((node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc)


def provoke(call):
    """Return the error that a call ends with."""
    try:
        call()
    except Exception as error:
        frame, place = error.__traceback__, None
        while frame is not None:
            path = Path(frame.tb_frame.f_code.co_filename)
            if PACKAGE in path.parents:
                place = path.relative_to(PACKAGE).as_posix(), frame.tb_lineno
            frame = frame.tb_next
        if place is None:
            raise
        first = next(first for first, last in raises(place[0]) if first <= place[1] <= last)
        return Message(place[0], first, type(error).__name__, str(error))
    raise AssertionError("a provocation raised nothing")


def find_messages():
    """Return all messages, by file and line."""
    return sorted({(found.file, found.line): found for found in map(provoke, PROVOCATIONS)}.values())


def page():
    """Return the text of `docs/errors.md`."""
    lines = [
        "# Error messages",
        "",
        "Each begins with the argument, and says what was expected and what came. All are raised before any kernel",
        "runs, but for those of a second backward. `python -m tests.error_messages` provokes every one of them and",
        "writes this page; `tests/test_error_messages.py` fails where one is missing. Those of `StepGraph` and of the",
        "integrations are in the tests of these.",
    ]
    for file in FILES:
        found = [message for message in find_messages() if message.file == file]
        lines += ["", f"## `npp_kernels/{file}`", "", "| error | message |", "| --- | --- |"]
        lines += [f"| {message.kind} | {_cell(message.text)} |" for message in found]
    return "\n".join(lines) + "\n"


def _cell(text):
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{len(find_messages())} messages in {PAGE.relative_to(ROOT)}")
