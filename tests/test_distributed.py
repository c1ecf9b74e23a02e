"""Two processes on the CPU, joined by gloo, as torchrun starts them."""

import functools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common import to_toml

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")


def test_two_ranks_equal_one_process_and_rank_zero_alone_writes(
    tiny_run, train, read_log, run_cli, tmp_path
):
    cfg = replace(
        tiny_run, n_embd=16, vocab_size=50304, max_steps=10, eval_interval=5, eval_tokens=200,
        micro_batch_size=2, sample_prompt="Hello,", log_interval=1,
        hellaswag_examples=10, hellaswag_path=str(ROOT / "tests" / "data" / "hellaswag_own.jsonl"),
    )  # fmt: skip
    one = train(cfg)[1]
    (tmp_path / "two.toml").write_text(to_toml(replace(cfg, run_name="")), encoding="utf-8")
    done = run_cli("train_gpt2.py", "two.toml", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr

    folder = Path(cfg.log_dir) / "two"
    two = read_log(folder)
    assert all(two[stream] == one[stream] for stream in ("lr", "hella", "batch"))
    for stream in ("train", "norm", "val"):
        for step, value in one[stream].items():
            assert two[stream][step] == pytest.approx(value, abs=1e-5), f"{stream} at {step}"

    keys = [line.rsplit(maxsplit=1)[0] for line in (folder / "log.txt").read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 4 * 10 + 3 + 2 + 1
    files = {"config.toml", "log.txt", "best.pt", "step_000010.pt", "loss.png"}
    assert {path.name for path in folder.iterdir()} <= files
    assert "2 micro-steps x 2 ranks" in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("  > ")]
    assert len(re.findall(r"^step +\d+/10 ", done.stdout, re.MULTILINE)) == 10
    assert len(lines) == len(set(lines)), "something is printed twice"


@pytest.mark.parametrize(
    "mistake, told", [("--data_dir=nowhere", "no train shards"), ("--n_layr=3", "--n_layer INT")]
)
def test_mistake_under_torchrun_is_told_once(run_cli, tmp_path, mistake, told):
    done = run_cli("train_gpt2.py", mistake, "--device=cpu", launcher=TORCHRUN)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(told) == 1
    assert list(tmp_path.iterdir()) == []


COUNTED = """
import contextlib, torch
from common import UserError
from train_gpt2 import Runtime

def fail():
    raise UserError(f"rank{runtime.rank}")

with contextlib.closing(Runtime("cpu", "float32", timeout=60)) as runtime:
    print(runtime.rank, runtime.world, runtime.sum(torch.tensor(1.0 + runtime.rank)).item())
    try:
        runtime.agree(fail)
    except UserError as error:
        print(error)
"""


def test_ranks_are_counted_over_all_machines_and_fail_as_rank_0_does(free_port):
    here = dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTED], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | here | dict(MASTER_PORT=free_port, RANK=rank),
        )
        for rank in "01"
    ]  # fmt: skip
    told = [machine.communicate(timeout=120)[0].split() for machine in machines]
    assert told == [["0", "2", "3.0", "rank0"], ["1", "2", "3.0", "rank0"]]


COMPILED_BEFORE_IT_IS_WRAPPED = """
import torch
from train_gpt2 import GPT, Config, Runtime

def backend(graph, inputs):
    made.append(graph)
    return graph.forward

made, runtime = [], Runtime("cpu", "float32")
model = GPT(Config(n_layer=3, n_head=2, n_embd=256, block_size=16, vocab_size=512))
fast, idx = torch.compile(model, backend=backend), torch.zeros(2, 16, dtype=torch.long)
fast(idx, idx).backward()  # as fitting the micro-batch does
alone = len(made)
runtime.parallel(fast, 2, 16)
runtime.print(f"{alone} graph alone, {len(made) - alone} graphs in DDP")
runtime.close()
"""


def test_compiled_model_is_cut_at_ddp_s_buckets(run_cli, tmp_path, monkeypatch):
    """As one graph it would have no gradient ready before its end, for DDP to overlap."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "x.py"
    script.write_text(COMPILED_BEFORE_IT_IS_WRAPPED)
    done = run_cli(script, launcher=TORCHRUN)
    graphs = re.search(r"^1 graph alone, (\d+) graphs in DDP$", done.stdout, re.MULTILINE)
    assert graphs and int(graphs[1]) > 1, done.stderr


COMPILED_BEFORE_THE_FIRST_STEP = """
import contextlib
import torch
import train_gpt2

cfg, _ = train_gpt2.load_config(["two.toml"])
with contextlib.closing(train_gpt2.Runtime("cpu", "float32")) as runtime:
    made = []
    runtime.compile = lambda model: torch.compile(
        model, dynamic=False, backend=lambda graph, inputs: made.append(graph) or graph.forward)
    shards = train_gpt2.TokenShards(cfg.data_dir, "train")
    state, fast, loader, micro_steps = train_gpt2.set_up(cfg, runtime, shards)
    before = len(made)
    with contextlib.closing(loader.stream(0, micro_steps)) as batches:
        for _ in range(2):
            train_gpt2.train_step(fast, state, batches, micro_steps, 0.001, runtime)
    runtime.print(f"{before} graphs, then {len(made) - before}")
"""


def test_nothing_is_compiled_in_the_steps_of_two_ranks(run_cli, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cfg = replace(tiny_run, compile_model=True, run_name="")
    (tmp_path / "two.toml").write_text(to_toml(cfg), encoding="utf-8")
    (tmp_path / "x.py").write_text(COMPILED_BEFORE_THE_FIRST_STEP)
    done = run_cli(tmp_path / "x.py", launcher=TORCHRUN)
    graphs = re.search(r"^(\d+) graphs, then (\d+)$", done.stdout, re.MULTILINE)
    assert graphs and int(graphs[1]) > 0 and int(graphs[2]) == 0, done.stdout + done.stderr


FAILING_ON_ONE_RANK = """
import contextlib
import torch
import torch.distributed as dist
from common import UserError, run
from train_gpt2 import Runtime

def main():
    with contextlib.closing(Runtime("cpu", "float32")) as runtime:
        dist.destroy_process_group = lambda: print(f"rank {runtime.rank} waits for the others")
        if runtime.rank == 1:
            runtime.device = torch.device("cuda")
            raise UserError("rank 1 is out of memory")
        runtime.sum(torch.ones(1))

run(main)
"""


def test_rank_that_fails_waits_for_no_other(run_cli, tmp_path, monkeypatch):
    """NCCL's destroy_process_group would, and its error would never be told."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "x.py").write_text(FAILING_ON_ONE_RANK)
    done = run_cli(tmp_path / "x.py", launcher=TORCHRUN)
    assert "error: rank 1 is out of memory" in done.stderr
    assert "rank 1 waits" not in done.stdout


def test_ranks_of_different_precision_are_refused(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "x.py").write_text(
        "import os, common, torch, train_gpt2\n"
        "dtype = ['bfloat16', 'float16'][int(os.environ['RANK'])]\n"
        "common.run(lambda: train_gpt2.Runtime('cpu', dtype).sum(torch.ones(1)))\n"
    )
    done = run_cli(tmp_path / "x.py", launcher=TORCHRUN)
    assert "error: rank 1's GPU is not like rank 0's: set --dtype=float16" in done.stderr


def test_ranks_that_see_other_checkpoints_are_refused(run_cli, tiny_run, tmp_path, monkeypatch):
    """Two machines whose log/ is not shared: the first run needs none, and a resume would."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cfg = replace(tiny_run, log_dir="log", max_steps=2)
    (tmp_path / "run.toml").write_text(to_toml(cfg), encoding="utf-8")
    (tmp_path / "x.py").write_text(
        "import os, common, train_gpt2\n"
        "os.makedirs(machine := 'machine' + os.environ['RANK'], exist_ok=True)\n"
        "os.chdir(machine)\n"
        "common.run(train_gpt2.main)\n"
    )
    train = functools.partial(run_cli, tmp_path / "x.py", "../run.toml", launcher=TORCHRUN)
    assert train().returncode == 0
    done = train("--resume", "--max_steps=4")
    assert done.returncode != 0 and "error: not all ranks have the same checkpoint" in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "in train\n" not in done.stderr  # no traceback but torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize("number, everyone", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_stopped_torchrun_saves_one_checkpoint(tiny_run, tmp_path, number, everyone):
    """A scheduler signals torchrun, Ctrl-C in a terminal all processes; torchrun passes both on."""
    cfg = replace(tiny_run, max_steps=100_000, total_batch_size=256, log_interval=1)
    (tmp_path / "x.toml").write_text(to_toml(cfg), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, *TORCHRUN, str(ROOT / "train_gpt2.py"), "x.toml"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step     5/"):
            break
    (os.killpg if everyone else os.kill)(process.pid, number)
    told, _ = process.communicate(timeout=60)
    step = int(re.search(r"stopped after step (\d+); to continue", told)[1])
    saved = [path.name for path in (Path(cfg.log_dir) / "run").glob("*.pt")]
    assert saved == [f"step_{step:06d}.pt"]


def test_mistake_that_one_rank_meets_is_told(tiny_run, run_cli, tmp_path):
    """Only rank 1 reads the window with the impossible id, in the middle of the run."""
    tokens = np.load(Path(tiny_run.data_dir) / "edufineweb_train_000001.npy")
    folder = tmp_path / "odd"
    folder.mkdir()
    np.save(folder / "edufineweb_val_000000.npy", tokens)
    bad = np.tile(tokens, 3)
    bad[16 * 6 + 3] = 60_000  # window 6: sequences 4 to 7 of a step of 8 are rank 1's
    np.save(folder / "edufineweb_train_000001.npy", bad)
    keys = dict(data_dir=str(folder), shuffle=False, total_batch_size=128, run_name="")
    (tmp_path / "odd.toml").write_text(to_toml(replace(tiny_run, **keys)), encoding="utf-8")
    done = run_cli("train_gpt2.py", "odd.toml", launcher=TORCHRUN)
    assert done.returncode != 0 and "error: " in done.stderr and "token id 60000" in done.stderr
