"""What the tests share: a tiny config, its variants, token shards, and commands run as users do."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import reading  # noqa: E402
import runs  # noqa: E402
import train_gpt2  # noqa: E402
from common import to_toml  # noqa: E402
from train_gpt2 import GPT, Config, Runtime  # noqa: E402

# Idle threads spin: where several processes share few cores, they cost more than they give.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start
os.environ["COLUMNS"] = "200"  # keeps messages unwrapped
# A script's background job ignores Ctrl-C, and so would every command that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOGGLES = {  # together they take every value of every architecture toggle
    "gpt2": {},
    "rope-swiglu-rmsnorm": dict(pos_embedding="rope", mlp="swiglu", norm="rmsnorm"),
    "relu2-qk_norm-softcap": dict(mlp="relu2", qk_norm=True, logit_softcap=5.0, qkv_bias=False),
    "rope-untied-no-bias": dict(
        pos_embedding="rope", rope_theta=100.0, tie_embeddings=False, bias=False, qk_norm=True
    ),
}


@pytest.fixture
def tiny():
    """A model that steps in milliseconds; no part of it needs GPT-2's vocabulary."""
    return Config(
        n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=512,
        total_batch_size=128, micro_batch_size=4, learning_rate=1e-2, warmup_steps=2, max_steps=8,
        eval_interval=0, eval_tokens=512, hellaswag_examples=0, sample_prompt="",
        checkpoint_interval=0, device="cpu", dtype="float32", compile_model=False,
    )  # fmt: skip


@pytest.fixture(params=TOGGLES.values(), ids=TOGGLES)
def toggles(request):
    return request.param


@pytest.fixture
def runtime():
    return Runtime("cpu", "float32")


@pytest.fixture
def make_model():
    """Weights ten times GPT-2's, so that attention is far from uniform and no part is idle."""

    def make(cfg, seed=1):
        torch.manual_seed(seed)
        model = GPT(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
        return model.eval()

    return make


@pytest.fixture
def write_shards():
    """Write tokens as the train shards of a folder, cut after the given sizes, and a val shard."""

    def write(folder, tokens, sizes=(), val=None):
        folder.mkdir(parents=True)
        tokens = np.asarray(tokens, dtype=np.uint16)
        np.save(folder / "edufineweb_val_000000.npy", tokens if val is None else val)
        for i, piece in enumerate(np.split(tokens, np.cumsum(sizes, dtype=int)), 1):
            np.save(folder / f"edufineweb_train_{i:06d}.npy", piece)
        return str(folder)

    return write


@pytest.fixture
def shards(tmp_path, write_shards):
    """Counting upwards modulo 512 in uneven files: a target is its input plus one."""
    tokens = np.arange(2077, dtype=np.uint16) % 512
    return write_shards(tmp_path / "shards", tokens, sizes=(700, 13, 1, 901), val=tokens[:600])


@pytest.fixture
def tiny_run(tiny, shards, tmp_path):
    """`tiny`, with data to train on and a folder to write to."""
    return replace(tiny, data_dir=shards, log_dir=str(tmp_path / "log"), run_name="run")


@pytest.fixture
def read_log():
    """common.read_log of a run's folder, whose log.txt may hold no line of another kind."""

    def read(folder):
        for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines():
            step, _, value = line.split()
            int(step), float(value)
        return common.read_log(folder / "log.txt")

    return read


@pytest.fixture
def train(monkeypatch, runtime, read_log):
    """Train in this process, without drawing at the end; returns (folder, what log.txt holds)."""
    monkeypatch.setattr(runs, "finish", lambda folder, cfg, runtime: None)

    def run(cfg):
        train_gpt2.train(cfg, runtime)
        folder = Path(cfg.log_dir) / cfg.run_name
        return folder, read_log(folder)

    return run


@pytest.fixture
def run_cli(tmp_path):
    """Run a command of the repository in tmp_path, as a user does: run_cli("fineweb.py", "-h")."""

    def run(script, *args, launcher=(), seconds=300):
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        how = dict(capture_output=True, text=True, encoding="utf-8", timeout=seconds)
        return subprocess.run(command, cwd=tmp_path, **how)

    return run


@pytest.fixture
def run_faulty(run_cli):
    """Train with faults (tests/faults.py): run_faulty([[["kill", "update", 3]], []], "x.toml")."""

    def run(lives, *args, launcher=()):
        return run_cli("tests/faults.py", json.dumps(lives), *args, launcher=launcher)

    return run


@pytest.fixture
def write_toml(tmp_path):
    """Write a Config where run_cli finds it."""

    def write(cfg, name="x.toml"):
        (tmp_path / name).write_text(to_toml(cfg), encoding="utf-8")
        return name

    return write


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    monkeypatch.setattr(reading, "STRETCH_BYTES", 20)
    monkeypatch.setattr(reading, "LONG_BYTES", 50)
    monkeypatch.setattr(reading, "ROWS", 2)


@pytest.fixture
def synced(monkeypatch):
    """The inodes of what was synced: of all that os.replace names from now on, else it fails."""
    inodes, fsync, replace = set(), os.fsync, os.replace

    def record(file):
        fsync(file)
        inodes.add(os.fstat(file).st_ino)

    def check(temporary, path):
        new = Path(temporary)
        assert {file.stat().st_ino for file in (new.iterdir() if new.is_dir() else [new])} <= inodes
        replace(temporary, path)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    return inodes


@pytest.fixture
def screen(monkeypatch):
    """What the bars draw, as at a terminal."""

    class Shown(tqdm.tqdm):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys | dict(disable=False, file=screen, mininterval=0))

    screen = io.StringIO()
    monkeypatch.setattr(tqdm, "tqdm", Shown)
    return screen


@pytest.fixture
def free_port():
    """A port for ranks that are started by hand, as MASTER_PORT has it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
