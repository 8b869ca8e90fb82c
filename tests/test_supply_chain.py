"""What is taken from outside: nothing from a network, no code from a data file, no more memory than a file is worth."""

import ast
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from reference.tokens import code_files
from reference.training import checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for top in ("npp_kernels", "reference", "bench", "examples", "tests", "run.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
)

# Refuses whatever Python would reach a network by, whichever library asks; connections on this machine's own sockets of
# a file (AF_UNIX) are let through.
REFUSE = """
import sys
def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"):
        raise RuntimeError(f"{event}: {arguments}")
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise RuntimeError(f"{event}: {arguments[1]}")
sys.addaudithook(refuse)
"""
IMPORT_ALL = """
import importlib, pkgutil
import npp_kernels, reference
for package in (npp_kernels, reference):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name != "npp_kernels.integrations.torchtitan":  # which needs torchtitan
            importlib.import_module(module.name)
"""


def run_without_network(code, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", REFUSE + code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_refusal_refuses():
    for code in (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://localhost:9')",
        "import socket; socket.socket().connect(('192.0.2.1', 80))",
    ):
        done = run_without_network(code)
        assert done.returncode == 1
        assert "RuntimeError" in done.stderr


def test_nothing_is_fetched_by_importing_or_by_running(tmp_path):
    done = run_without_network(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    snippet = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = run_without_network(snippet)
    assert done.returncode == 0, done.stderr
    options = ["--model", "tiny", "--epochs", "0.1", "--output", str(tmp_path)]
    train = f"from reference import train; sys.exit(train.main({options}))"
    done = run_without_network(train)
    assert done.returncode == 0, done.stderr


def calls(path):
    """Yield each call in a file, by its dotted name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_read_from_data(path):
    """Every `torch.load` says weights_only=True, no `np.load` allows pickles, and nothing asks a hub for code."""
    for name, call in calls(path):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "torch.load":
            assert isinstance(keywords.get("weights_only"), ast.Constant), f"{path}: {ast.unparse(call)}"
            assert keywords["weights_only"].value is True, f"{path}: {ast.unparse(call)}"
        assert "allow_pickle" not in keywords or path.parent.name == "tests", f"{path}: {ast.unparse(call)}"
        assert "trust_remote_code" not in keywords, f"{path}: {ast.unparse(call)}"
        if path.parent.name != "tests":
            assert name not in ("pickle.load", "pickle.loads", "torch.hub.load", "eval"), f"{path}: {ast.unparse(call)}"


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": _Bomb(tmp_path / "ran")}, tmp_path / "step-00000001.pt")
    with pytest.raises(
        ValueError, match=r"step-00000001.pt: expected a whole checkpoint, it cannot be read: Weights only"
    ):
        checkpoint.read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "ran").exists()


def test_an_array_that_would_run_code_is_refused(tmp_path):
    np.save(tmp_path / "0.npy", np.array([_Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "0.npz", tokens=np.array([_Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"0.npy: expected a whole .npy file, it cannot be read: "):
        code_files.read_array(tmp_path / "0.npy")
    with pytest.raises(ValueError, match=r"0.npz: expected a whole .npz file, it cannot be read: Object arrays cannot"):
        code_files.read_arrays(tmp_path / "0.npz", ["tokens"])
    assert not (tmp_path / "ran").exists()


def header_only(shape):
    """Return the first bytes of an array of this shape, without its contents."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1, 10, 10**9), (1, 1, 2**40), (2**62, 16)], ids=str)
def test_an_array_may_not_claim_more_than_its_file_holds(tmp_path, shape):
    """Refused by its header, before anything is allocated."""
    (tmp_path / "0.npy").write_bytes(header_only(shape) + b"\0" * 64)
    with pytest.raises(ValueError, match=r"0.npy: expected a whole .npy file, it cannot be read"):
        code_files.read_array(tmp_path / "0.npy")


def test_an_archive_may_not_unpack_to_far_more_than_it_is(tmp_path):
    """A thousandfold is nothing that tokens compress to; labels in order compress well, and are small."""
    path = tmp_path / "0.npz"
    np.savez_compressed(path, labels=np.repeat(np.arange(10, dtype=np.int64), 100_000))
    assert code_files.read_arrays(path, ["labels"])["labels"].shape == (1_000_000,)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", header_only((2**24,)) + bytes(2**27))
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match=r"0.npz: .* tokens.npy unpacks to 134217\d+ bytes from"):
        code_files.read_arrays(path, ["tokens"])


def test_a_checkpoint_may_not_unpack(tmp_path):
    """PyTorch stores tensors as they are; a packed part could be a thousand times as large as the file."""
    torch.save({"model": {"weight": torch.zeros(1000)}}, tmp_path / "plain.pt")
    packed = tmp_path / "step-00000001.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in plain.infolist():
            archive.writestr(part.filename, plain.read(part))
    checkpoint.read(tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"its part .* is packed, where PyTorch stores it as it is"):
        checkpoint.read(packed)


def test_a_model_may_not_be_larger_than_its_weights(tmp_path):
    """Dimensions that a checkpoint only claims are refused before a model of them is made."""
    weights = {
        "tok_embeddings.weight": torch.zeros(1, 1).expand(2**40, 2**20),
        "cls_embedding.embedding_table.weight": torch.zeros(11, 16),
    }
    claimed = {"vocab_size": 2**40, "grid": (16, 16), "num_classes": 10, "dim": 2**20, "num_layers": 1, "num_heads": 1}
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": 1, "model": weights, "model_config": claimed}, path)
    with pytest.raises(ValueError, match=r"tok_embeddings.weight .* more than its contents"):
        checkpoint.load_model(path)
    weights["tok_embeddings.weight"] = torch.zeros(4, 16)
    torch.save({"step": 1, "model": weights, "model_config": claimed}, path)
    with pytest.raises(ValueError, match=r"model_config: expected the sizes of the weights"):
        checkpoint.load_model(path)
