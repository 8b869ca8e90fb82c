"""Errors of every operation beside PyTorch's, and on a GPU beside Liger's and QuACK's.

    python -m bench accuracy --device cpu            # or cuda, or interpret: the kernels in Triton's interpreter
    python -m bench accuracy --results FILE.json     # the page's tables once more, from results made before

Results go to ``bench/results/accuracy-NAME.json`` and, as tables, between the markers of ``docs/accuracy.md``. Until
all are there they are in a file beside it, ``.partial``, from which the same command goes on where one was cut off.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import npp_kernels
from bench.cases.accuracy_cases import (
    DTYPES,
    LINEAR,
    LOSS,
    OPTIONS,
    OURS,
    PYTORCH,
    Case,
    cases_of,
)
from bench.cases.contenders import BY_NAME
from bench.cases.exact import exact_rows, half_ulps
from bench.cases.shapes import Workload
from bench.reporting.accuracy_page import fill_page
from bench.reporting.accuracy_records import Record, read_records, write_records
from bench.timing.session import cpu_name, resolve_device, versions
from npp_kernels._dispatch import INTERPRETED

HERE = Path(__file__).resolve().parent
PEERS = {LOSS: {"liger": "Liger", "quack": "QuACK"}, LINEAR: {"liger": "Liger", "quack_linear": "QuACK"}}
PEER_VOCAB_SIZES = (512, 1000, 16_384, 262_144)


# --- inputs, and who computes them ---


def _logits(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits in the case's dtype, and targets."""
    groups = torch.randint(case.vocab_size, (case.rows, case.group_size), device=device)
    logits = torch.randn(case.rows, case.vocab_size, device=device) * (3.0 if case.gap is None else 0.5)
    if case.gap is not None:
        logits.scatter_add_(1, groups[:, :1], torch.full_like(logits[:, :1], case.gap))
    return (logits.double() + case.offset).to(DTYPES[case.dtype]), groups


def _linear(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, of which each stands ``gap`` above at its first target, a weight of unit rows, targets."""
    groups = torch.randint(case.vocab_size, (case.rows, case.group_size), device=device)
    weight = F.normalize(torch.randn(case.vocab_size, case.hidden_size, device=device), dim=1)
    hidden = torch.randn(case.rows, case.hidden_size, device=device) * (3.0 if case.gap is None else 0.5)
    if case.gap is not None:
        hidden += case.gap * weight[groups[:, 0]]
    return hidden.to(DTYPES[case.dtype]), weight.to(DTYPES[case.dtype]), groups


def torch_loss(
    logits: Tensor,
    groups: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score logits with PyTorch's own functions: the losses ``[N, K]``, the loss to differentiate, capped logits."""
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rows = capped if groups.shape[1] == 1 else capped.repeat_interleave(groups.shape[1], 0)
    weight = None if class_weight is None else class_weight.to(logits)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(rows, groups.flatten(), reduction="none", **options)
    mean = losses.mean() if weight is None else losses.sum() / weight[groups].sum()
    return losses.view(groups.shape), mean + z_loss * torch.logsumexp(capped, 1).square().mean(), capped


def _torch_rows(logits: Tensor, groups: Tensor, wide: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    logits = logits.detach().requires_grad_()
    losses, loss, capped = torch_loss(logits.to(wide), groups, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    capped = capped.detach()
    entropy = -(torch.softmax(capped, 1) * torch.log_softmax(capped, 1)).nan_to_num(0).sum(1)
    return {"loss": losses.detach(), "lse": torch.logsumexp(capped, 1), "entropy": entropy, "gradient": gradient}


def _our_rows(logits: Tensor, groups: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    unpenalised = {name: value for name, value in options.items() if name != "z_loss"}
    losses: Any = npp_kernels.patch_cross_entropy(logits, groups, reduction="none", **unpenalised)
    logits = logits.detach().requires_grad_()
    loss, stats = npp_kernels.patch_cross_entropy(logits, groups, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    return {"loss": losses, "lse": stats.lse, "entropy": stats.entropy, "gradient": gradient}


def _exact_rows(logits: Tensor, groups: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    if options:  # of logits that are not sure of anything: PyTorch's fp64 has places enough
        return _torch_rows(logits.double(), groups, torch.float64, options)
    exact = exact_rows(logits, groups)
    return {
        "loss": exact.losses, "lse": exact.lse, "entropy": exact.entropy, "gradient": exact.gradient / groups.numel(),
    }  # fmt: skip


def _peer(case: Case, name: str, reduction: str, *tensors: Tensor) -> Any:
    workload = Workload(case.operation, "accuracy", case.vocab_size, case.hidden_size, 1, case.rows, 1, "uniform",
                        reduction)  # fmt: skip
    return BY_NAME[case.operation, name].build(workload)(*tensors)


def _peer_results(
    case: Case, device: torch.device, compute: Callable[[str], dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the results of the peers that can take part, by label; say who fails, and go on."""
    found: dict[str, dict[str, Tensor]] = {}
    if device.type != "cuda" or case.group_size > 1 or case.option or case.vocab_size not in PEER_VOCAB_SIZES:
        return found
    for name, label in PEERS[case.operation].items():
        if BY_NAME[case.operation, name].installed:
            try:
                found[label] = compute(name)
            except Exception as error:  # whatever a package of others raises; the page shows a dash
                tqdm.write(f"{label} cannot compute {case}: {type(error).__name__}: {error}")
    return found


def _peer_rows(case: Case, name: str, logits: Tensor, groups: Tensor) -> dict[str, Tensor]:
    losses = _peer(case, name, "none", logits.clone(), groups)
    leaf = logits.clone().requires_grad_()
    # A peer that overwrites its input overwrites this copy of the leaf.
    (gradient,) = torch.autograd.grad(_peer(case, name, "mean", leaf.clone(), groups), leaf)
    return {"loss": losses.detach(), "gradient": gradient}


def _differentiated(function: Callable[..., Any], hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), "hidden's gradient": gradients[0], "weight's gradient": gradients[1]}


def _options(case: Case, device: torch.device) -> dict[str, Any]:
    """Return the options of a case, with a weight from 0 to 1 for each id where ids have weights."""
    options = dict(OPTIONS[case.option]) if case.option else {}
    if "class_weight" in options:
        options["class_weight"] = torch.rand(case.vocab_size, device=device)
    return options


def _results(case: Case, device: torch.device) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Tensor]:
    """Return the exact results by quantity, those of each contender, and the targets."""
    if case.operation == LOSS:
        options = _options(case, device)
        logits, groups = _logits(case, device)
        found = {OURS: _our_rows(logits, groups, options)}
        found[PYTORCH] = _torch_rows(logits, groups, torch.float32, options)
        found |= _peer_results(case, device, lambda name: _peer_rows(case, name, logits, groups))
        return _exact_rows(logits, groups, options), found, groups
    if case.operation == LINEAR:
        hidden, weight, groups = _linear(case, device)
        ours = {"loss by target": _linear_losses(hidden, weight, groups)}
        theirs = {"loss by target": torch_loss(F.linear(hidden, weight).float(), groups)[0]}

        def torch_linear(h: Tensor, w: Tensor) -> Tensor:
            return torch_loss(F.linear(h, w).float(), groups)[1]

        def our_linear(h: Tensor, w: Tensor) -> Any:
            return npp_kernels.linear_patch_cross_entropy(h, w, groups)

        found = {OURS: ours | _differentiated(our_linear, hidden, weight)}
        found[PYTORCH] = theirs | _differentiated(torch_linear, hidden, weight)
        found |= _peer_results(
            case,
            device,
            lambda name: _differentiated(lambda h, w: _peer(case, name, "mean", h, w, groups), hidden, weight),
        )
        exact = exact_rows(hidden.double() @ weight.double().t(), groups)
        gradient = exact.gradient / groups.numel()
        return {
            "loss by target": exact.losses, "loss": exact.losses.mean(),
            "hidden's gradient": gradient @ weight.double(), "weight's gradient": gradient.t() @ hidden.double(),
        }, found, groups  # fmt: skip
    return _mean_results(case, device)


def _linear_losses(hidden: Tensor, weight: Tensor, groups: Tensor) -> Tensor:
    losses = npp_kernels.linear_patch_cross_entropy(hidden, weight, groups, reduction="none")
    assert isinstance(losses, Tensor)
    return losses


def _mean_results(case: Case, device: torch.device) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Tensor]:
    table = torch.randn(case.vocab_size, case.hidden_size, device=device).to(DTYPES[case.dtype])
    groups = torch.randint(case.vocab_size, (case.rows, case.group_size), device=device)
    upstream = torch.randn(case.rows, case.hidden_size, device=device).to(table.dtype)

    def both(function: Callable[[Tensor], Tensor], table: Tensor) -> dict[str, Tensor]:
        leaf = table.detach().requires_grad_()
        means = function(leaf)
        (gradient,) = torch.autograd.grad(means, leaf, upstream.to(means.dtype))
        return {"means": means.detach(), "table's gradient": gradient}

    def plain(leaf: Tensor) -> Tensor:
        return F.embedding(groups, leaf).mean(1)

    ours = both(lambda leaf: npp_kernels.group_mean(leaf, groups), table)
    return both(plain, table.double()), {OURS: ours, PYTORCH: both(plain, table)}, groups


# --- errors ---


def _record(case: Case, contender: str, quantity: str, actual: Tensor, exact: Tensor, groups: Tensor) -> Record:
    actual = actual.detach()
    rounding = half_ulps(exact, actual.dtype)
    error = (actual.double() - exact).abs().nan_to_num(float("inf"))
    record = Record(
        case, contender, quantity, error.numel(), error.max().item(), error.mean().item(), rounding.max().item(),
        rounding.mean().item() / 2, actual.double().mean().item(), exact.mean().item(),
        (error.norm() / exact.norm()).item(),
    )  # fmt: skip
    if quantity.startswith("loss"):
        return replace(
            record, wrong_sign=(actual < 0).double().mean().item(), zero=(actual == 0).double().mean().item()
        )
    if quantity == "gradient":
        rows = actual.double()
        row_sum = (rows.sum(1).abs() / rows.abs().sum(1).clamp(min=1e-300)).max().item()
        at_target = rows.gather(1, groups[:, :1])
        wrong = (at_target > 0).double().mean().item() if case.group_size == 1 and not case.option else None
        return replace(record, row_sum=row_sum, wrong_sign=wrong)
    return record


def measure(case: Case, device: torch.device) -> list[Record]:
    """Return the errors of all contenders in all results of a case."""
    torch.manual_seed(0)
    exact, found, groups = _results(case, device)
    return [
        _record(case, contender, quantity, results[quantity], oracle, groups)
        for contender, results in found.items()
        for quantity, oracle in exact.items()
        if quantity in results
    ]


def records_of_before(partial: Path, about: dict[str, Any]) -> list[Record]:
    """Return what a run that was cut off has measured under the same conditions."""
    if not partial.exists():
        return []
    before, records = read_records(partial)
    differing = {name: value for name, value in before.items() if name != "date" and value != about[name]}
    if differing:
        raise ValueError(f"{partial}: expected results of this machine, got those of {differing}: remove the file")
    return records


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda", "interpret"), default="cpu")
    parser.add_argument("--results", type=Path, help="only write the tables of these results into the page")
    parser.add_argument("--out", type=Path, help="where results go; bench/results/accuracy-NAME.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "accuracy.md", help="where tables go")
    parser.add_argument("--only", default="", help="only operations with this in their name")
    parser.add_argument("--quick", action="store_true", help="a handful of small cases, to try the command")
    options = parser.parse_args(arguments)
    if options.results is not None:
        fill_page(options.page, *read_records(options.results))
        return 0
    if (options.device == "interpret") != INTERPRETED:
        # Triton reads the variable when it is imported, so the interpreter takes a process of its own.
        variables = os.environ | {"TRITON_INTERPRET": "1" if options.device == "interpret" else "0"}
        command = [sys.executable, "-m", "bench", "accuracy", *arguments]
        return subprocess.run(command, env=variables).returncode
    kind = "interpreter" if INTERPRETED else options.device
    device = resolve_device("cpu" if INTERPRETED else options.device)
    name = torch.cuda.get_device_properties(device).name if kind == "cuda" else cpu_name()
    model = re.search(r"[A-Z]+\d+\w*", name)
    label = kind if kind != "cuda" else model.group().lower() if model else "gpu"
    out = options.out or HERE / "results" / f"accuracy-{label}.json"
    about = {
        "kind": kind, "device": name, "versions": versions(), "date": datetime.now(timezone.utc).isoformat(),
        "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    cases = [case for case in cases_of(kind, quick=options.quick) if options.only in case.operation]
    partial = out.with_name(f"{out.name}.partial")
    records = [record for record in records_of_before(partial, about) if record.case in cases]
    found = {record.case for record in records}
    for case in tqdm(cases, desc=f"accuracy on {name}", unit="case"):
        if case not in found:
            records += measure(case, device)
            write_records(partial, about, records)
    partial.replace(out)
    fill_page(options.page, *read_records(out))
    print(f"{out}\n{options.page}")
    return 0
