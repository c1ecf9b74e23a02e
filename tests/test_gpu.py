"""What runs on a GPU, on one that is pretended (pretended.py)."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import read_log

ROOT = Path(__file__).parents[1]
COMMANDS = """
import json, sys
sys.path.insert(0, "tests")
from pretended import pretend
pretend()
import hellaswag, sample, train_gpt2
for name, *sys.argv in json.loads(sys.argv[1]):
    globals()[name].main()
"""
MIXED = """
import sys, torch
sys.path.insert(0, "tests")
from pretended import pretend
pretend()
gpu, cpu = torch.ones(2, device="cuda"), torch.ones(2)
assert (gpu + 1 + cpu.sum()).tolist() == [4, 4] == (gpu * 3 + cpu.to("cuda")).tolist()
gpu += cpu
"""


def python(code, *args):
    words = [sys.executable, "-c", code, *args]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_pretended_gpu_refuses_tensors_of_two_devices():
    assert "tensors of two devices" in python(MIXED).stderr.splitlines()[-1]


@pytest.mark.parametrize("toggles", [{}, dict(pos_embedding="rope", log_norms=True)])
def test_gpu_runs_every_command_and_computes_what_a_cpu_does(
    tiny_run, train, write_toml, run_cli, tmp_path, toggles
):
    tasks = str(ROOT / "tests" / "data" / "hellaswag_own.jsonl")
    cfg = replace(tiny_run, vocab_size=50304, eval_interval=4, sample_prompt="Hello", **toggles)
    cfg = replace(cfg, hellaswag_examples=4, hellaswag_path=tasks, min_lr_ratio=1.0)
    _, expected = train(replace(cfg, run_name="cpu"))
    config, best = tmp_path / write_toml(replace(cfg, run_name="gpu")), f"{cfg.log_dir}/gpu/best.pt"
    on_gpu = [str(config), "--device=cuda", "--micro_batch_size=0"]
    sampling = [f"--model={best}", "--prompt=Hello", "--max_new_tokens=40", "--top_k=5"]
    done = python(COMMANDS, json.dumps([
        ["train_gpt2", "train_gpt2.py", *on_gpu, "--max_steps=6"],
        ["train_gpt2", "train_gpt2.py", *on_gpu, "--resume=True"],
        ["hellaswag", "hellaswag.py", f"--model={best}", f"--data={tasks}", "--examples=4"],
        ["sample", "sample.py", *sampling, "--dtype=float32"],
        ["sample", "sample.py", *sampling, "--dtype=bfloat16", "--num_samples=2"],
    ]))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = read_log(Path(best).with_name("log.txt"))
    for stream in ("train", "val", "norm"):
        for step, value in expected[stream].items():
            assert log[stream][step] == pytest.approx(value, rel=1e-5), f"{stream} at {step}"
    assert "H100" in done.stdout and "micro_batch_size=" in done.stdout
    on_cpu = run_cli("sample.py", *sampling, "--dtype=float32", "--device=cpu").stdout
    assert on_cpu.strip() in done.stdout
