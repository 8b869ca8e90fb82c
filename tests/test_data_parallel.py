"""Several processes: what they compute together is what one computes, they go on in any number, and notice a loss."""

import csv
import doctest
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

import reference.training.data_parallel
from reference import train
from reference.network.model import Transformer
from reference.training.checkpoint import checkpoints, load_latest, load_model, read
from reference.training.config import parse
from reference.training.data_parallel import DataParallelAdamW, Sharing, divided
from reference.training.step import StepConfig, TrainStep
from tests import parallel_runs
from tests.processes import environment, run_in, wait_until

ON_THE_CPU = [way for way in parallel_runs.WAYS if way not in ("bf16 compiled", "bf16 without a graph")]
SHARDED = ("sharded", "bf16 sharded", "bf16 sharded parts")


def results_of(folder, processes, ways, device="cpu"):
    """Run ways in so many processes; return what each process has, by way."""
    run_in(processes, "tests.parallel_runs", folder, *ways, device=device)
    return {
        way: [torch.load(folder / f"{way}-{rank}.pt", weights_only=True) for rank in range(processes)] for way in ways
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("two"), 2, ON_THE_CPU)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("four"), 4, [*SHARDED, "bf16 replicated", "replicated", "fsdp"])


@pytest.fixture(scope="module")
def one():
    ways = ("sharded", "sharded parts", "bf16 sharded")
    return {way: parallel_runs.trained("cpu", **parallel_runs.WAYS[way]) for way in ways}


def assert_same(results, others):
    """The same numbers, bit for bit."""
    assert results["losses"] == others["losses"]
    assert results["norms"] == others["norms"]
    for part in ("model", "ema", "exp_avg", "exp_avg_sq", "counters"):
        assert results["state"][part].keys() == others["state"][part].keys()
        for name, tensor in results["state"][part].items():
            assert torch.equal(tensor, others["state"][part][name]), f"{part} {name}"
    for name, tensor in results["weights"].items():
        assert torch.equal(tensor, others["weights"][name]), name


def assert_close(results, others, *, gradients, losses):
    """The same numbers, but for roundings: in the first gradient, and in all losses and norms."""
    assert results["gradients"].keys() == others["gradients"].keys()
    for name, gradient in others["gradients"].items():
        assert (results["gradients"][name] - gradient).norm() <= gradients * gradient.norm(), name
    assert results["losses"] == pytest.approx(others["losses"], rel=losses)
    assert results["norms"] == pytest.approx(others["norms"], rel=10 * losses)


def test_docstrings_run():
    assert doctest.testmod(reference.training.data_parallel).failed == 0


def test_buckets_are_whole_layers(monkeypatch):
    monkeypatch.setattr(reference.training.data_parallel, "BUCKET_SIZE", parallel_runs.BUCKET_SIZE)
    named = [entry for entry in Transformer(parallel_runs.CONFIG).named_parameters() if entry[1].ndim >= 2]
    buckets = [[name for name, _ in bucket] for bucket in divided(named)]
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in named]
    layers = [{".".join(name.split(".")[:2]) for name in bucket if name.startswith("layers")} for bucket in buckets]
    assert layers == [{"layers.0"}, {"layers.1"}, {"layers.2"}, set()]
    assert buckets[0][:2] == ["cls_embedding.embedding_table.weight", "tok_embeddings.weight"]


@pytest.mark.parametrize("way", ["sharded", "replicated", "ddp", "fsdp", "fsdp parts", "sharded parts"])
def test_two_processes_train_like_one(two, one, way):
    assert_close(two[way][0], one["sharded parts" if "parts" in way else "sharded"], gradients=1e-5, losses=1e-5)


@pytest.mark.parametrize("way", ["sharded", "replicated", "fsdp"])
def test_four_processes_train_like_one(four, one, way):
    assert_close(four[way][0], one["sharded"], gradients=1e-5, losses=1e-5)


def test_one_process_of_fsdp_trains_like_one_without_and_asks_for_no_graph(one, tmp_path):
    (alone,) = results_of(tmp_path, 1, ["fsdp"])["fsdp"]
    assert_close(alone, one["sharded"], gradients=1e-5, losses=1e-5)
    assert not alone["asks for graphs"]
    assert one["sharded"]["asks for graphs"]


def test_gradients_in_16_bits_follow_those_in_32(two, one):
    for way in ("bf16 sharded", "bf16 fp32 gradients", "bf16 sharded parts", "bf16 replicated"):
        assert two[way][0]["losses"] == pytest.approx(one["bf16 sharded"]["losses"], rel=1e-2)
    assert two["bf16 fp32 gradients"][0]["losses"] != two["bf16 sharded"][0]["losses"]


@pytest.mark.parametrize("pair", [("sharded", "replicated"), ("bf16 sharded", "bf16 replicated")])
def test_a_sharded_update_is_the_whole_one(two, four, pair):
    for results in (two, four):
        assert_same(*(results[way][0] for way in pair))


def test_a_sharded_update_of_added_parts_is_the_whole_one(two):
    assert_same(two["bf16 sharded parts"][0], two["bf16 replicated parts"][0])


def test_the_same_again_is_the_same(two):
    assert_same(two["sharded again"][0], two["sharded"][0])


def test_all_processes_have_the_same_weights(two, four):
    for results in (two, four):
        for way, (first, *others) in results.items():
            for name, weight in first["weights"].items():
                assert all(torch.equal(other["weights"][name], weight) for other in others), f"{way}: {name}"


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.usefixtures("group_of_one")
def test_a_missing_gradient_and_a_foreign_state_are_named(sharded):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    sharing = Sharing(sharded=sharded)
    optimizer = DataParallelAdamW(model, parallel_runs.ADAMW, dtype=torch.float32, sharing=sharing)
    model[0](torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"^model: expected a gradient of every parameter, got none of 1\.bias"):
        optimizer.collect(first=True)
    state = optimizer.state()
    state["exp_avg"].pop("1.bias")
    with pytest.raises(ValueError, match=r"^state\['exp_avg'\]: .* 1.bias is not in both"):
        optimizer.load(state)
    optimizer.close()


def test_fsdp_without_processes_is_refused():
    with pytest.raises(ValueError, match=r"^parallel: expected fsdp under torchrun"):
        TrainStep(parallel_runs.model_on("cpu"), StepConfig(parallel="fsdp"), parallel_runs.ADAMW, batch_size=2)
    with pytest.raises(ValueError, match=r"^parallel: expected one of sharded, .*, none, got 'zero'"):
        StepConfig(parallel="zero")


def arguments_of(folder, *others):
    """A run of 16 steps, 8 of them at patch 2, with a checkpoint after each 8."""
    fixed = ["--model", "tiny", "--epochs", "0.2", "--batch-size", "20", "--workers", "0", "--checkpoint-every", "8"]
    fixed += ["--log-every", "4", "--ema", "0.9", "--dropout", "0", "--class-dropout", "0"]
    return [*fixed, "--output", str(folder), *others]


def logged(folder, *columns):
    columns = columns or ("step", "loss", "gradient_norm")
    with (folder / "log.csv").open(newline="") as file:
        return [[float(row[name] or 0) for name in columns] for row in csv.DictReader(file)]


def half_of(folder, copy):
    """Copy a run as it was after half of its steps."""
    shutil.copytree(folder, copy)
    removed = checkpoints(copy)[-1]
    shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
    assert [path.stem for path in checkpoints(copy)] == ["step-00000008"]
    return copy


def tensors_of(state):
    return {
        f"{part} {name}": tensor
        for part in ("model", "ema", "exp_avg", "exp_avg_sq", "counters")
        for name, tensor in state[part].items()
    }


def assert_resumed(folder, whole, *, exactly, rtol=1e-3):
    if exactly:
        assert logged(folder) == logged(whole)
    for row, expected in zip(logged(folder), logged(whole), strict=True):
        assert row == pytest.approx(expected, rel=rtol)
    ours, theirs = (tensors_of(load_latest(path)) for path in (folder, whole))
    assert ours.keys() == theirs.keys()
    if exactly:
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_goes_on_in_any_number_of_processes(tmp_path, capfd):
    whole = tmp_path / "whole"
    run_in(2, "reference.train", *arguments_of(whole))
    for processes in (2, 4):
        folder = half_of(whole, tmp_path / str(processes))
        result = run_in(processes, "reference.train", *arguments_of(folder))
        assert "training from step 8 of 16 steps" in result.stdout
        assert ("2 processes before, 4 now" in result.stderr) == (processes == 4)
        assert_resumed(folder, whole, exactly=processes == 2)
        assert len(load_latest(folder)["random"]) == processes

    folder = half_of(whole, tmp_path / "1")
    run = train.Run(parse(arguments_of(folder)), torch.device("cpu"))
    saved, loaded = tensors_of(load_latest(folder)), tensors_of(run.trainer.state())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert train.main(arguments_of(folder)) == 0
    assert_resumed(folder, whole, exactly=False)
    assert load_model(whole).config == load_model(folder).config


@pytest.fixture(scope="module")
def fsdp_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp") / "whole"
    run_in(2, "reference.train", *arguments_of(folder, "--parallel", "fsdp", "--evaluate-every", "16"))
    return folder


def test_a_sharded_model_goes_on_in_any_number_of_processes_and_in_any_way(fsdp_run, tmp_path):
    assert [path.name for path in checkpoints(fsdp_run)] == ["step-00000008.sharded", "step-00000016.sharded"]
    assert 0 < logged(fsdp_run, "test_nll")[-1][0] < 7
    fsdp = ("--parallel", "fsdp", "--evaluate-every", "16")
    for processes in (2, 4):
        folder = half_of(fsdp_run, tmp_path / str(processes))
        run_in(processes, "reference.train", *arguments_of(folder, *fsdp))
        assert_resumed(folder, fsdp_run, exactly=processes == 2)

    folder = half_of(fsdp_run, tmp_path / "one process")
    assert train.main(arguments_of(folder)) == 0
    assert [path.name for path in checkpoints(folder)] == ["step-00000008.sharded", "step-00000016.pt"]
    assert_resumed(folder, fsdp_run, exactly=False)
    checkpoints(folder)[0].rename(tmp_path / "gone")  # and back, from a whole checkpoint
    run_in(1, "reference.train", *arguments_of(folder, *fsdp))
    expected = load_latest(fsdp_run)["ema"]
    for path in (fsdp_run, checkpoints(fsdp_run)[-1]):
        weights = load_model(path).state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_a_sharded_checkpoint_that_is_not_whole_is_named(fsdp_run, tmp_path):
    folder = shutil.copytree(fsdp_run, tmp_path / "run")
    newest = checkpoints(folder)[-1]
    part = newest / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"00016.sharded: expected a whole checkpoint, but __1_0.* has \d+ of \d+ bytes"
    ):
        read(newest)
    assert load_latest(folder)["step"] == 8
    (newest / "run.pt").unlink()
    with pytest.raises(ValueError, match=r"expected a whole checkpoint, but run.pt has 0 of"):
        read(newest)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def started_in(stack, folder, processes, *arguments, device="cpu"):
    """Start a run's processes without torchrun, which would end the others itself; what they say goes to files."""
    variables = environment(device) | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(free_port())
    command, running = [sys.executable, "-m", "tests.rank", "reference.train", *arguments], []
    for rank in range(processes):
        own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = stack.enter_context((folder / f"said-{rank}").open("w"))
        process = subprocess.Popen(command, env=own, stderr=said, stdout=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        running.append(process)
    return running


def assert_others_stop(folder, lost, number, *arguments, device="cpu"):
    """Signal one process of two; return what the other says."""
    with ExitStack() as stack:
        running = started_in(stack, folder, 2, *arguments, device=device)
        wait_until(lambda: checkpoints(folder), running[0])
        running[lost].send_signal(number)
        status = running[1 - lost].wait(60)
    said = (folder / f"said-{1 - lost}").read_text()
    assert status == 1, said
    assert "the same command goes on from the last checkpoint" in said
    return said


@pytest.mark.parametrize(
    ("lost", "number", "message"),
    [
        (1, signal.SIGKILL, "stopped: process 1 has given no sign of life for 6 s"),
        (1, signal.SIGSTOP, "stopped: process 1 has given no sign of life for 6 s"),  # nothing else tells of this one
        (0, signal.SIGKILL, "stopped: the process that keeps the store, at 127.0.0.1, is gone"),
    ],
)
def test_when_one_process_is_lost_the_others_say_so_and_stop(tmp_path, lost, number, message):
    arguments = arguments_of(tmp_path, "--epochs", "20", "--lost-after", "6")
    assert message in assert_others_stop(tmp_path, lost, number, *arguments)
    saved = load_latest(tmp_path)["step"]
    assert 8 <= saved < 1600
    run = train.Run(parse(arguments), torch.device("cpu"))
    assert run.step == saved


def test_when_one_process_fails_the_others_hear_of_it_at_once(tmp_path):
    (tmp_path / "step-00000008.partial").symlink_to("/dev/full")
    arguments = arguments_of(tmp_path, "--epochs", "20", "--lost-after", "1000")
    with ExitStack() as stack:
        running = started_in(stack, tmp_path, 2, *arguments)
        assert [process.wait(60) for process in running] == [1, 1]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert "stopped: [Errno 28] cannot be written, No space left on device" in said[0]
    assert "stopped: process 0 stopped: OSError: [Errno 28] cannot be written" in said[1]
