"""The benchmarks' own machinery: who may be timed, what is counted, in which order, and what the pages say."""

import doctest
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from bench.cases import contenders
from bench.cases.contenders import CONTENDERS, Contender
from bench.cases.inputs import make_inputs, real_tokens, spread, uniform_tokens
from bench.cases.oracle import RejectedError, check_result, errors, expected
from bench.cases.shapes import OPERATIONS, Workload, selection
from bench.reporting import readme, sections
from bench.reporting.goals import goals, goals_table
from bench.reporting.records import Journal, Record, Refusal, Results, measured_already, read_results
from bench.reporting.report import write_report
from bench.timing.clocks import CpuClock, turns
from bench.timing.limits import Limits, demands
from bench.timing.measure import Measurement
from tests.processes import ROOT, environment

CPU = torch.device("cpu")
LIMITS = Limits(copy_bytes_per_second=1e9, l2_bytes_per_second=4e9, matmul_flops_per_second=1e12)
MEAN = Workload("group_mean", "tiny", 1024, 8, 16, 2, 2)
LOSS = Workload("patch_cross_entropy", "tiny", 1024, 0, 16, 2, 4)
LINEAR = Workload("linear_patch_cross_entropy", "tiny", 1024, 16, 16, 1, 4)


def right_loss(logits, groups):
    scores = logits.float()
    return (torch.logsumexp(scores, -1, keepdim=True) - scores.gather(-1, groups)).mean()


def loss_and_gradient(inputs, function):
    loss = function(inputs.leaves[0], inputs.groups)
    return loss, torch.autograd.grad(loss, inputs.leaves)


# --- the gate ---


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [
        # Not the mean in bf16: on the CPU, PyTorch adds up an embedding's gradient in bf16, which is rejected.
        (MEAN, torch.float32),
        (LOSS, torch.float32),
        (LOSS, torch.bfloat16),
        (replace(LOSS, reduction="none"), torch.bfloat16),
        (LINEAR, torch.float32),
        (LINEAR, torch.bfloat16),
    ],
)
def test_the_gate_admits_every_torch_formulation(workload, dtype):
    inputs = make_inputs(workload, CPU, dtype)
    oracle = expected(workload, inputs)
    names = ("official_eager", "honest_eager")
    for contender in [c for c in CONTENDERS if c.operation == workload.operation and c.name in names]:
        output = contender.build(workload)(*inputs.leaves, getattr(inputs, contender.ids))
        check_result((output, torch.autograd.grad(output, inputs.leaves, inputs.upstream)), oracle, dtype)


def test_the_gate_rejects_a_gradient_without_its_softmax_part():
    # Each of its entries is right to within 1/V of the greatest: a maximum or a norm alone would let it pass.
    inputs = make_inputs(replace(LOSS, patch=1), CPU, torch.bfloat16)
    with torch.no_grad():
        inputs.leaves[0].zero_()
    oracle = expected(replace(LOSS, patch=1), inputs)
    one_hot = -F.one_hot(inputs.groups[:, 0], LOSS.vocab_size) / len(inputs.groups)
    mean, worst = errors(one_hot, oracle.gradients[0])
    assert worst < 0.01 < 0.4 < mean
    with pytest.raises(RejectedError, match="gradient 0: mean error"):
        check_result((oracle.output, (one_hot,)), oracle, torch.bfloat16)


def test_the_gate_rejects_a_wrong_target_and_a_wrong_divisor():
    inputs = make_inputs(LOSS, CPU, torch.float32)
    oracle = expected(LOSS, inputs)
    check_result(loss_and_gradient(inputs, right_loss), oracle, torch.float32)
    with pytest.raises(RejectedError):
        check_result(loss_and_gradient(inputs, lambda z, g: right_loss(z, g.roll(1, 0))), oracle, torch.float32)
    loss, gradients = loss_and_gradient(inputs, right_loss)
    with pytest.raises(RejectedError, match="gradient 0"):
        check_result((loss, [gradient * LOSS.group_size for gradient in gradients]), oracle, torch.float32)


def test_the_gate_rejects_nan_shape_and_a_missing_gradient():
    inputs = make_inputs(LOSS, CPU, torch.float32)
    oracle = expected(LOSS, inputs)
    loss, (gradient,) = loss_and_gradient(inputs, right_loss)
    broken = gradient.clone()
    broken[3, 5] = float("nan")
    with pytest.raises(RejectedError):
        check_result((loss, (broken,)), oracle, torch.float32)
    with pytest.raises(RejectedError, match="expected shape"):
        check_result((loss, (gradient[:-1],)), oracle, torch.float32)
    with pytest.raises(ValueError, match="zip"):
        check_result((loss, (gradient, gradient)), oracle, torch.float32)


def test_the_gate_rejects_a_table_gradient_accumulated_in_bf16():
    # On skewed tokens one row takes thousands of terms, and a bf16 sum stops growing after a few hundred.
    workload = replace(MEAN, images=64, patch=1)
    inputs = make_inputs(workload, CPU, torch.bfloat16)
    inputs.upstream.abs_()  # of one sign, so that the sums do grow
    oracle = expected(workload, inputs)
    terms = inputs.upstream.flatten(0, 1)
    ids = inputs.groups.flatten()
    exact = torch.zeros(1024, 8).index_add_(0, ids, terms.float()).bfloat16()
    check_result((oracle.output, (exact,)), oracle, torch.bfloat16)
    rounded = torch.zeros(1024, 8, dtype=torch.bfloat16)
    for token, term in zip(ids.tolist(), terms, strict=True):
        rounded[token] += term
    with pytest.raises(RejectedError, match="gradient 0"):
        check_result((oracle.output, (rounded,)), oracle, torch.bfloat16)


def test_the_gate_compares_rows_of_huge_logits(monkeypatch):
    monkeypatch.setattr("bench.cases.oracle.MAX_COMPARED_ELEMENTS", 5 * LOSS.vocab_size)
    inputs = make_inputs(LOSS, CPU, torch.float32)
    oracle = expected(LOSS, inputs)
    assert oracle.rows.tolist() == [0, 7, 15, 23, 31]
    loss, (gradient,) = loss_and_gradient(inputs, right_loss)
    check_result((loss, (gradient,)), oracle, torch.float32)
    gradient[15] = 0
    with pytest.raises(RejectedError):
        check_result((loss, (gradient,)), oracle, torch.float32)


# --- what a measurement does ---


def test_a_measurement_times_the_right_and_refuses_the_wrong(monkeypatch):
    monkeypatch.setattr(CpuClock, "max_rounds", 3)
    calls = []

    def wrong(workload):
        def forward(table, groups):
            calls.append(1)
            return F.embedding(groups, table).sum(-2)

        return forward

    def broken(workload):
        raise RuntimeError("no such kernel\nand much more")

    entries = [
        (contenders.BY_NAME["group_mean", "honest_eager"], "forward"),
        (contenders.BY_NAME["group_mean", "honest_eager"], "forward_backward"),
        (Contender("group_mean", "wrong", "wrong", wrong), "forward"),
        (Contender("group_mean", "broken", "broken", broken), "forward"),
    ]
    outcomes = Measurement(MEAN, CpuClock(CPU), LIMITS, torch.float32).run(entries)
    assert len(calls) == 1, "a contender that was refused was run again"
    assert outcomes["wrong", "forward"].reason.startswith("RejectedError: output: mean error")
    assert outcomes["broken", "forward"].reason == "RuntimeError: no such kernel"
    record, times = outcomes["honest_eager", "forward_backward"]
    assert record.runs == len(times) == 3
    assert record.median == sorted(times)[1]
    assert record.first_quartile <= record.median <= record.third_quartile
    assert record.images_per_second == pytest.approx(2 / record.median)
    assert record.tokens_per_second == pytest.approx(512 / record.median)
    assert record.gradient_bytes == 1024 * 8 * 4
    assert record.peak_bytes is None
    assert record.share_of_limit == pytest.approx(record.limit / record.median)


def test_what_a_contender_overwrites_is_restored_before_each_run(monkeypatch):
    monkeypatch.setattr(CpuClock, "max_rounds", 3)
    seen = []

    def build(workload):
        def overwriting(logits, groups):
            seen.append(logits.detach().clone())
            loss = right_loss(logits, groups)
            (gradient,) = torch.autograd.grad(loss, logits)
            logits.detach().copy_(gradient)
            return loss.detach(), (logits.detach(),)

        return overwriting

    contender = Contender("patch_cross_entropy", "overwriting", "", build, overwrites=True, returns_gradients=True)
    measurement = Measurement(LOSS, CpuClock(CPU), LIMITS, torch.float32)
    outcomes = measurement.run([(contender, "forward_backward")])
    record, _ = outcomes["overwriting", "forward_backward"]
    assert record.gradient_bytes == 0, "a gradient that lies over the logits is no new memory"
    assert len(seen) > 4
    assert all(torch.equal(logits, seen[0]) for logits in seen)


def test_small_workloads_are_timed_by_the_host_back_to_back(monkeypatch):
    monkeypatch.setattr("bench.timing.clocks.HOST_ROUNDS", 2)
    monkeypatch.setattr("bench.timing.clocks.MAX_HOST_CALLS", 3)
    entry = (contenders.BY_NAME["group_mean", "honest_eager"], "forward")
    outcomes = Measurement(replace(MEAN, host_bound=True), CpuClock(CPU), LIMITS, torch.float32).run([entry])
    record, times = outcomes["honest_eager", "forward"]
    assert len(times) == 2
    assert 0 < record.host_seconds <= max(times)


def test_candidates_run_in_turn():
    order = list(turns([3, 1, 2]))
    assert [sorted(order[:3]), sorted(order[3:5]), order[5:]] == [[0, 1, 2], [0, 2], [0]]
    assert len({tuple(list(turns([9] * 4))[i : i + 4]) for i in range(0, 36, 4)}) > 3  # nobody always follows the same
    assert list(turns([])) == []


# --- what must move ---


def test_bytes_of_the_mean_by_hand():
    # 2 images of 4x4 tokens at patch 2: 8 groups of 4; 3 different ids; D=5 in 2 bytes: rows of 10 bytes.
    workload = Workload("group_mean", "hand", 7, 5, 4, 2, 2)
    forward, backward = demands(workload, "forward_backward", element_bytes=2, distinct_ids=3)
    assert forward.memory_bytes == 3 * 10 + 32 * 8 + 8 * 10  # rows of the table, ids, means
    assert backward.memory_bytes == 8 * 10 + 32 * 8 + 7 * 10  # their gradients, ids, the table's gradient
    assert forward.l2_bytes == backward.l2_bytes == 32 * 10  # a row for each token
    assert demands(workload, "forward", 2, 3) == [forward]
    assert forward.seconds(LIMITS) == pytest.approx(366e-9)  # memory: 366 B at 1 GB/s; L2: 320 B at 4 GB/s
    assert forward.seconds(replace(LIMITS, l2_bytes_per_second=5e8)) == pytest.approx(640e-9)


def test_bytes_of_the_losses_by_hand():
    workload = Workload("patch_cross_entropy", "hand", 7, 0, 4, 2, 2)
    logits = 8 * 7 * 2
    forward, backward = demands(workload, "forward_backward", 2, 3)
    assert (forward.memory_bytes, backward.memory_bytes) == (logits + 32 * 8, logits)
    _, unequal = demands(replace(workload, reduction="none"), "forward_backward", 2, 3)
    assert unequal.memory_bytes == 2 * logits + 32 * 8
    linear = Workload("linear_patch_cross_entropy", "hand", 7, 5, 4, 2, 2)
    assert [demand.flops for demand in demands(linear, "forward_backward", 2, 3)] == [2 * 8 * 7 * 5, 4 * 8 * 7 * 5]


# --- tokens and shapes ---


@pytest.mark.parametrize("vocab_size", [512, 1024, 16_384, 128_256, 262_144])
def test_spreading_keeps_the_skew(vocab_size):
    wide = spread(torch.arange(512), vocab_size)
    assert wide.unique().numel() == 512
    assert int(wide.max()) < vocab_size
    real = real_tokens(8, 16, vocab_size).flatten()
    counts = torch.bincount(real).sort(descending=True).values
    narrow = torch.bincount(real_tokens(8, 16, 512).flatten()).sort(descending=True).values
    assert torch.equal(counts[counts > 0], narrow[narrow > 0])
    assert counts[0] > 0.1 * real.numel(), "one id should dominate real tokens"


def test_larger_grids_are_crops_of_real_images():
    mosaic = real_tokens(2, 24, 512)
    images = real_tokens(8, 16, 512)
    assert mosaic.shape == (2, 24, 24)
    # The crop leaves 4 tokens off each side of the mosaic, so each image keeps its 12x12 inner corner.
    assert torch.equal(mosaic[0, :12, :12], images[0, 4:, 4:])
    assert torch.equal(mosaic[1, 12:, 12:], images[7, :12, :12])
    assert uniform_tokens(2, 24, 512).shape == (2, 24, 24)
    with pytest.raises(ValueError, match="grid: expected 16 to 32"):
        real_tokens(1, 40, 512)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("matrix", ["default", "full"])
def test_selections_name_each_workload_once_and_reach_every_operation(matrix, device):
    workloads = selection(matrix, device)
    names = [workload.name for workload in workloads]
    assert len(names) == len(set(names))
    for operation in OPERATIONS:
        regular = {w.patch for w in workloads if w.operation == operation and not w.host_bound}
        assert regular == ({8, 4, 2} if operation == "patch_mean" else {8, 4, 2, 1})
        assert any(w.host_bound for w in workloads if w.operation == operation)


def test_contenders_take_part_where_they_can():
    def names(workload, direction, device):
        return {c.name for c in CONTENDERS if c.takes_part(workload, direction, device)}

    loss = replace(LOSS, left_out=("honest_compiled", "official_compiled"))
    assert names(loss, "forward", "cpu") == {"ours", "official_eager", "honest_eager"}
    assert names(loss, "forward_backward", "cpu") == {"ours", "ours_in_place", "official_eager", "honest_eager"}
    assert "ours_in_place" not in names(replace(loss, host_bound=True), "forward_backward", "cpu")


# --- pages ---


def some_results() -> Results:
    records = []
    for operation, model, vocab, hidden in (
        ("group_mean", "B", 16_384, 768),
        ("patch_cross_entropy", "V16384", 16_384, 0),
    ):
        for direction in ("forward", "forward_backward"):
            for patch in (2, 1):
                for contender, label, factor in (("ours", "npp_kernels", 1), ("honest_eager", "torch", 3)):
                    median = 1e-3 * factor / patch * (2 if direction == "forward_backward" else 1)
                    workload = asdict(Workload(operation, model, vocab, hidden, 16, 4, patch))
                    del workload["directions"], workload["left_out"]
                    records.append(
                        Record(
                            **workload,
                            direction=direction,
                            dtype="bfloat16",
                            contender=contender,
                            label=label,
                            median=median,
                            first_quartile=median * 0.9,
                            third_quartile=median * 1.1,
                            runs=5,
                            host_seconds=None,
                            tokens_per_second=1024 / median,
                            images_per_second=4 / median,
                            peak_bytes=2**20 * factor,
                            gradient_bytes=2**20,
                            memory_bytes=10**6,
                            l2_bytes=0,
                            flops=0,
                            limit=0.5e-3 / patch,
                            limit_of="moving",
                            mean_error=1e-3,
                        )
                    )
    small = replace(records[0], host_bound=True, host_seconds=2e-5, median=3e-5, patch=4)
    machine = {
        "device": "Some GPU",
        "device_type": "cuda",
        "driver": "1.2",
        "cuda": "13.0",
        "python": "3.11",
        "versions": {"torch": "2.11", "triton": "3.6", "quack-kernels": "absent"},
        "limits": asdict(LIMITS),
    }
    refusal = Refusal("group_mean-B-16x16-patch2-real", "forward", "liger", "RejectedError: output")
    return Results(
        machine, {"id": "abcdef0123456789"}, "2026-11-24T00:00:00", (*records, small), (refusal,), ("quack-kernels",)
    )


def test_the_report_has_the_figures_and_the_plots(tmp_path):
    page = write_report(some_results(), tmp_path / "report")
    text = page.read_text()
    assert "Some GPU, driver 1.2" in text
    assert "abcdef012345" in text
    assert "Absent contenders (not installed): quack-kernels" in text
    assert "3.00x (torch)" in text
    assert "| **npp_kernels** | **0.500 ±10%** | **1.00 ±10%** |" in text
    assert "`liger` on group_mean-B-16x16-patch2-real, forward: RejectedError: output" in text
    for picture in [line[4:-1] for line in text.splitlines() if line.startswith("![](")]:
        assert (tmp_path / "report" / picture).stat().st_size > 5000, f"{picture} is empty"


def test_goals_are_held_against_the_figures():
    held = {goal.what: goal for goal in goals(some_results())}
    loss = held["`patch_cross_entropy`, V = 16,384, K = 4: share of the limit"]  # 0.25 ms of 1 ms
    assert (loss.value, loss.is_met) == (pytest.approx(0.25), False)
    lead = held["`patch_cross_entropy`, V = 16,384, K = 4: best other over ours"]
    assert lead.value == pytest.approx(3.0)
    backward = held["`group_mean`, D = 768, K = 4, real, backward: share of the copy rate"]
    assert backward.value == 0  # as the made-up forward and backward move equally many bytes
    assert held["`group_mean`, one image, forward: µs of the host"].is_met  # 20 of 30
    wide = held["`patch_cross_entropy`, V = 128,256, K = 1: share of the limit"]
    assert wide.value is None  # not measured
    assert not wide.is_met
    met = sum(goal.is_met for goal in held.values())
    assert goals_table(some_results()).startswith(f"{met} of {sum(g.value is not None for g in held.values())} are met")


def test_the_report_renders_when_ours_or_all_others_are_missing(tmp_path):
    results = some_results()
    for kept in ("ours", "honest_eager"):
        records = tuple(record for record in results.records if record.contender == kept)
        assert write_report(replace(results, records=records), tmp_path / kept).exists()
    assert write_report(replace(results, records=()), tmp_path / "none").exists()


def some_steps() -> readme.Steps:
    cells = {}
    for patch in (8, 4, 2, 1):
        for formulation, milliseconds in (("official", 20.0), ("ours", 16.0 / patch)):
            cell = {"median_ms": milliseconds, "peak_gib": milliseconds, "device": "Some GPU", "torch": "2.11"}
            cells["B", 64, patch, formulation] = cell
    return readme.Steps(cells)


def test_gains_are_read_from_the_results():
    table = readme.gain_table(some_results(), some_steps())
    assert "| training step of B, patch 4 | 20.0 ms | - | **4.00 ms** | 5.0x |" in table
    mean = "**11.0 ms** | 1.8x |"  # a quarter of the steps takes 4 ms, a quarter 8, the rest 16
    assert f"| the same in the mean of a run in 3 stages | 20.0 ms | - | {mean}" in table
    assert "| peak memory of a step of XXL, patch 1 | - | - | **-** | - |" in table  # not measured
    assert "| `patch_cross_entropy`, patch 4 | - | - | **-** | - |" in table
    assert len(table.splitlines()) <= 2 + 12
    assert doctest.testmod(readme).failed == doctest.testmod(sections).failed == 0


def test_a_gain_of_an_operation_is_on_the_best_of_all_others():
    row = readme._operation_gain(some_results(), ("group_mean", "B", 2), "mean", "ms", lambda r: 1e3 * r.median)
    assert row.cells() == ["mean", "-", "3.00 ms (torch)", "**1.00 ms**", "3.0x"]
    assert row._replace(official=2.0).cells()[-1] == "2.0x"
    assert row._replace(official=0.5).cells()[-1] == "0.50x"  # a loss is shown as one
    small = readme._operation_gain(some_results(), ("group_mean", "B", 4), "host", "µs", lambda r: r.host_seconds)
    assert small.ours is None  # what was timed by the host is the forward here


def test_readme_sections_are_filled_and_stay_as_they_are_the_second_time():
    page = "before\n<!-- results:gains -->\nold\n<!-- /results:gains -->\nbetween\n"
    page += "<!-- results:origin --><!-- /results:origin -->\nafter\n"
    once = readme.fill_sections(page, some_results(), some_steps())
    assert "old" not in once
    assert "**4.00 ms**" in once
    assert "commit abcdef012345, 2026-11-24" in once
    places = [once.index(word) for word in ("before", "between", "after")]
    assert places == sorted(places)
    assert readme.fill_sections(once, some_results(), some_steps()) == once


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("nothing here", "found none"),
        ("<!-- results:speed --><!-- /results:speed -->", "expected one of origin, gains"),
        ("<!-- results:gains -->", "results:gains: expected the markers .* and <!-- /results:gains -->"),
    ],
)
def test_readme_markers_that_are_wrong_are_named(page, message):
    with pytest.raises(ValueError, match=message):
        readme.fill_sections(page, some_results(), some_steps())


def test_a_journal_is_gone_on_with(tmp_path):
    results, path = some_results(), tmp_path / "journal.jsonl"
    header = {"machine": results.machine, "commit": results.commit, "date": results.date, "absent": results.absent}
    assert measured_already(path) == set()
    first = Journal(path, header)
    first.add(results.records[0])
    with path.open("a") as file:
        file.write('{"record": {"operation": "gr')  # killed while it wrote
    faster = replace(results.records[0], median=1e-9)
    second = Journal(path, header | {"date": "2026-12-24", "machine": results.machine | {"limits": None}})
    for entry in (faster, results.records[1], *results.refusals):
        second.add(entry)
    assert {key[1:] for key in measured_already(path)} >= {(r.direction, r.contender) for r in results.records[:2]}
    found = read_results(path)
    assert found.records == (faster, results.records[1])
    assert found.refusals == results.refusals
    assert found.date == results.date
    with pytest.raises(ValueError, match=r"journal.jsonl: expected a journal of this machine .*'other'.*, got one of"):
        Journal(path, header | {"machine": results.machine | {"device": "other"}})


def test_a_run_that_was_cut_off_measures_what_is_left(tmp_path):
    """In a process of its own, on the smallest workload of the CPU's; contenders of one workload stay together."""
    path = tmp_path / "j.jsonl"
    command = [
        sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--device=cpu", "-q", "-p", "no:cacheprovider",
        "-k", "patch_mean and patch4 and forward and not backward", f"--journal={path}",
    ]  # fmt: skip
    # In a worker of xdist pytest-benchmark would refuse to measure.
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTEST_XDIST")}

    def measure():
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=180)
        return done.returncode, path.read_text().splitlines()

    status, lines = measure()
    assert status == 0
    assert len(lines) > 2
    path.write_text("\n".join(lines[:-1]) + "\n")  # the last contender is missing
    status, again = measure()
    assert status == 0
    assert again[: len(lines) - 1] == lines[:-1]
    assert "continued" in json.loads(again[len(lines) - 1])
    contenders = {json.loads(line)["record"]["contender"] for line in again[len(lines) :]}
    assert json.loads(lines[-1])["record"]["contender"] in contenders
    assert measure() == (5, again)  # pytest: no tests are left


def test_a_journal_reads_as_the_json_does(tmp_path):
    results = some_results()
    header = {"machine": results.machine, "commit": results.commit, "date": results.date, "absent": results.absent}
    journal = Journal(tmp_path / "journal.jsonl", header)
    for entry in (*results.records, *results.refusals):
        journal.add(entry)
    assert read_results(tmp_path / "journal.jsonl") == results
    content = {
        "machine_info": results.machine,
        "commit_info": results.commit,
        "datetime": results.date,
        "absent": results.absent,
        "refusals": [asdict(refusal) for refusal in results.refusals],
        "benchmarks": [{"extra_info": {"record": asdict(record)}} for record in results.records],
    }
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "results.json") == results
