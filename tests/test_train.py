import errno
import functools
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm

import fineweb
import hardware
import hellaswag
import runs
import train_gpt2
from common import UserError, to_toml
from runs import finish
from train_gpt2 import (
    ARCHITECTURE,
    GPT,
    Config,
    Runtime,
    TokenShards,
    batch_layout,
    evaluate_loss,
    largest_micro_batch,
    load_config,
    load_model,
    lr_at,
)

ROOT = Path(__file__).parents[1]


class PowerCut(Exception):
    pass


def cut_power():
    raise PowerCut


@pytest.fixture
def after_step(monkeypatch):
    """Do something once, as soon as the given step is done."""

    def arrange(step, action):
        original, todo = train_gpt2.train_step, [action]

        def train_step(model, state, *args, **kwargs):
            told = original(model, state, *args, **kwargs)
            if state.step == step and todo:
                todo.pop()()
            return told

        monkeypatch.setattr(train_gpt2, "train_step", train_step)

    return arrange


def load(path):
    return torch.load(path, weights_only=True)


def without_speed(log):
    return {stream: values for stream, values in log.items() if stream != "tps"}


def assert_same_run(actual, expected, last):
    """Equal losses, rates and norms at every step, and equal state at the end, bit for bit."""
    (folder, log), (expected_folder, expected_log) = actual, expected
    assert without_speed(log) == without_speed(expected_log)
    state, expected_state = (load(f / f"step_{last:06d}.pt") for f in (folder, expected_folder))
    for key in ("model", "optimizer", "step", "best"):
        torch.testing.assert_close(state[key], expected_state[key], rtol=0, atol=0)


# ---------------------------------------------------------------- a run


def test_training_learns_a_simple_text(tiny_run, train, write_shards, tmp_path):
    text = np.arange(2000) % 32
    cfg = replace(tiny_run, data_dir=write_shards(tmp_path / "cycle", text), max_steps=60)
    _, log = train(replace(cfg, eval_interval=60))
    assert log["train"][0] == pytest.approx(math.log(512), abs=0.1)
    assert log["train"][59] < 0.5 and log["val"][60] < 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_too_and_keeps_weights_in_float32(tiny_run, train, runtime, dtype):
    exact = train(replace(tiny_run, run_name="exact", max_steps=20))[1]["train"]
    runtime.dtype = getattr(torch, dtype)
    folder, log = train(replace(tiny_run, max_steps=20))
    assert log["train"][19] == pytest.approx(exact[19], abs=0.1) and exact[19] < exact[0] - 0.5
    saved = load(folder / "step_000020.pt")
    assert all(w.dtype == torch.float32 for w in saved["model"].values())
    assert bool(saved["scaler"]) == (dtype == "float16")  # which alone needs its loss scaled


def test_log_holds_every_number_of_every_step_at_full_precision(tiny_run, train):
    cfg = replace(tiny_run, eval_interval=3)
    folder, log = train(cfg)
    assert log.keys() == {"batch", "train", "lr", "norm", "tps", "val"}
    assert log["batch"] == {0: 128}
    for stream in ("train", "lr", "norm", "tps"):
        assert list(log[stream]) == list(range(8))
    assert list(log["val"]) == [0, 3, 6, 8]
    assert list(log["lr"].values()) == [lr_at(step, cfg, 8) for step in range(8)]
    first = (folder / "log.txt").read_text().splitlines()[:2]
    assert first == ["0 batch 128", f"0 val {log['val'][0]!r}"]


@pytest.fixture
def console(tiny, make_model, runtime, monkeypatch, capsys):
    """The console's lines for given seconds a step, of 4 GPUs that reach half of their speed."""

    def lines(*seconds, **keys):
        model = make_model(replace(tiny, **keys))
        runtime.world, runtime.peak_memory = 4, lambda: 3 * 2**29
        peak = model.flops_per_token() * 1000 / 4 / 0.5  # 1000 tokens a second over all ranks
        monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: peak)
        log = train_gpt2.RunLog(None, model, SimpleNamespace(**vars(runtime) | {"rank": 1}),
                                tokens=1000, max_steps=len(seconds), start=0)  # fmt: skip
        log.runtime = runtime
        capsys.readouterr()
        for step, dt in enumerate(seconds):
            log.step(step, 2.5, 1e-3, 0.75, dt)
        return capsys.readouterr().out.splitlines()

    return lines


def test_console_tells_speed_of_all_ranks_share_of_their_peak_memory_and_time_left(console):
    first, second, last = console(60.0, 1.0, 2.0, log_interval=1)
    assert "| 17 tok/s | 1,000 tokens | mfu 0.8% | 1.5 GiB | eta ..." in first  # it compiles
    assert second.startswith("step     1/3 | loss 2.5000 | lr 1.00e-03 | norm 0.750 | dt 1000 ms |")
    assert second.endswith("| 1,000 tok/s | 2,000 tokens | mfu 50.0% | 1.5 GiB | eta 0:00:01")
    assert last.endswith("| 500 tok/s | 3,000 tokens | mfu 25.0% | 1.5 GiB | eta 0:00:00")


def test_console_has_every_nth_step_and_the_last(console):
    shown = [int(line[5:10]) for line in console(*[1.0] * 8, log_interval=3)]
    assert shown == [0, 3, 6, 7]


def test_speed_is_that_of_the_steps_without_what_is_done_between_them(tiny_run, train, monkeypatch):
    clock = [0.0]

    def taking(seconds, function):
        def slow(*args):
            clock[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(train_gpt2, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(train_gpt2, "train_step", taking(2.0, train_gpt2.train_step))
    monkeypatch.setattr(train_gpt2, "evaluate", taking(1000.0, train_gpt2.evaluate))
    save = train_gpt2.RunLog.save
    monkeypatch.setattr(train_gpt2.RunLog, "save", taking(1000.0, save))
    _, log = train(replace(tiny_run, eval_interval=2, checkpoint_interval=3))
    assert clock[0] > 5000 and log["tps"] == dict.fromkeys(range(8), 128 / 2)


def test_tokens_are_counted_through_a_change_of_batch(tiny_run, train, capsys):
    cfg = replace(tiny_run, log_interval=1)
    train(cfg)
    train(replace(cfg, max_steps=9, resume=True))
    _, log = train(replace(cfg, max_steps=10, resume=True, total_batch_size=256))
    seen = [
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens \|", capsys.readouterr().out)
    ]
    assert seen == [128 * (step + 1) for step in range(9)] + [9 * 128 + 256]
    assert log["batch"] == {0: 128, 9: 256}


def test_config_in_the_run_folder_is_the_runs(tiny_run, train):
    folder, _ = train(tiny_run)
    assert load_config([str(folder / "config.toml")])[0] == tiny_run


def test_max_steps_zero_is_one_epoch_rounded_up(tiny_run, train):
    _, log = train(replace(tiny_run, max_steps=0))
    windows, sequences = 2076 // 16, 8
    assert len(log["train"]) == math.ceil(windows / sequences)


def test_same_seed_repeats_a_run_and_another_does_not(tiny_run, train):
    runs = [
        without_speed(train(replace(tiny_run, run_name=name, seed=seed, dropout=0.1))[1])
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_micro_batch_does_not_change_the_training(tiny_run, train):
    small, big = (train(replace(tiny_run, run_name=f"B{B}", micro_batch_size=B))[1] for B in (1, 8))
    for step, loss in big["train"].items():
        assert small["train"][step] == pytest.approx(loss, abs=1e-5)


def test_what_init_from_overrules_is_told_once(tiny_run, monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        runs.tell_overruled(replace(tiny_run, init_from="x"), {"n_layer": 3, "mlp": "relu2"})
    assert capsys.readouterr().out == "init_from=x has n_layer=3, whatever else was set\n"


def test_finetuning_takes_weights_and_architecture_from_a_checkpoint(tiny_run, train, capsys):
    source, log = train(replace(tiny_run, mlp="relu2", eval_interval=8))
    cfg = replace(
        tiny_run, run_name="tuned", n_layer=1, init_from=str(source / "best.pt"), eval_interval=8
    )
    tuned, tuned_log = train(cfg)
    assert "best.pt has n_layer=2, whatever else was set" in capsys.readouterr().out
    assert load_model(tuned / "best.pt").cfg.mlp == "relu2"
    assert tuned_log["val"][0] == log["val"][8]


def test_resumed_finetuning_needs_the_pretrained_weights_no_more(tiny_run, train, after_step):
    source, _ = train(replace(tiny_run, mlp="relu2"))
    cfg = replace(tiny_run, checkpoint_interval=3, init_from=str(source / "step_000008.pt"))
    whole = train(replace(cfg, run_name="whole"))
    after_step(5, cut_power)
    with pytest.raises(PowerCut):
        train(replace(cfg, run_name="tuned"))
    (source / "step_000008.pt").unlink()
    tuned = train(replace(cfg, run_name="tuned", resume=True))
    assert_same_run(tuned, whole, last=8)
    assert load_model(tuned[0] / "step_000008.pt").cfg.mlp == "relu2"
    (tuned[0] / "config.toml").unlink()
    with pytest.raises(UserError, match=r"step_000008.pt is not a readable .*No such file"):
        train(replace(cfg, run_name="tuned", resume=True))


def test_kernel_follows_the_context_of_the_model_that_is_trained_on(tiny_run, train, capsys):
    source, _ = train(tiny_run)
    cfg = replace(tiny_run, run_name="tuned", block_size=1024, dtype="bfloat16")
    cfg = replace(cfg, init_from=str(source / "step_000008.pt"))
    train_gpt2.train(cfg, Runtime("cpu", "bfloat16"))
    hardware.allow_attention("auto")
    assert "math attention" in capsys.readouterr().out.split("log/tuned/")[1]


def test_model_of_another_vocabulary_is_asked_nothing_in_gpt2s(tiny_run, train):
    source, _ = train(tiny_run)
    cfg = replace(tiny_run, vocab_size=50304, init_from=str(source / "step_000008.pt"))
    for keys in (dict(sample_prompt="Hello"), dict(hellaswag_examples=4)):
        with pytest.raises(UserError, match=f"vocab_size=512 .* try --.*{next(iter(keys))}="):
            train(replace(cfg, run_name="tuned", **keys))
    assert not Path(tiny_run.log_dir, "tuned").exists()


@pytest.mark.parametrize("eval_interval", [0, 4])
def test_commands_shown_at_the_end_name_files_that_are_there(
    tiny_run, train, runtime, monkeypatch, capsys, eval_interval
):
    folder, _ = train(replace(tiny_run, eval_interval=eval_interval))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # draws no picture
    finish(folder, replace(tiny_run, vocab_size=50304), runtime)
    told = capsys.readouterr().out
    models = re.findall(r"--model=(\S+)", told)
    assert models and all(Path(model).exists() for model in models), told


def test_signal_handlers_are_given_back(tiny_run, train):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(replace(tiny_run, max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def interrupt():
    for number in (signal.SIGINT, signal.SIGTERM):  # in a terminal torchrun passes on a second
        signal.raise_signal(number)


@pytest.mark.parametrize("before", [False, True])
def test_signal_about_an_evaluation_saves_before_that_ends(
    tiny_run, train, after_step, monkeypatch, before
):
    """torchrun kills 30 s after the signal that it passes on."""
    folder, saved = Path(tiny_run.log_dir) / "run", []
    evaluate_loss = train_gpt2.evaluate_loss

    def long(*args):
        if runs.checkpoints(folder):  # of step 6, which the second evaluation follows
            if not before:
                interrupt()
            saved.extend(path.name for path in runs.checkpoints(folder))
        return evaluate_loss(*args)

    keys = dict(eval_interval=8, checkpoint_interval=6, max_steps=20)
    if before:
        after_step(8, interrupt)
    monkeypatch.setattr(train_gpt2, "evaluate_loss", long)
    _, log = train(replace(tiny_run, **keys))
    assert saved == ["step_000006.pt", "step_000008.pt"] and len(log["train"]) == 9
    monkeypatch.undo()
    (folder / "step_000009.pt").unlink()
    resumed = train(replace(tiny_run, **keys, resume=True))
    assert_same_run(resumed, train(replace(tiny_run, **keys, run_name="whole")), last=20)


def test_signal_in_an_update_saves_when_the_step_is_whole(tiny_run, train, monkeypatch):
    step, saved = torch.amp.GradScaler.step, []

    def interrupted(scaler, optimizer):
        told = step(scaler, optimizer)
        interrupt()
        saved.append(runs.checkpoints(Path(tiny_run.log_dir) / "run"))
        return told

    monkeypatch.setattr(torch.amp.GradScaler, "step", interrupted)
    folder, _ = train(tiny_run)
    assert saved == [[], []]  # its own step had begun, the next one is told to stop
    assert [path.name for path in folder.glob("*.pt")] == ["step_000002.pt"]


def test_second_signal_ends_the_program_but_for_one_that_came_with_the_first(monkeypatch):
    saved, times = [], iter([10.0, 11.9, 12.1])
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(times)))
    before = signal.getsignal(signal.SIGINT)
    with runs.stop_on_signal(lambda: saved.append(None), in_step=lambda: False) as asked:
        assert not asked()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            assert asked() and saved == [None]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert saved == [None] and signal.getsignal(signal.SIGINT) == before


def test_reader_of_the_output_that_ends_costs_no_step(tiny_run, train, after_step, monkeypatch):
    """As `| tee` does at Ctrl-C, which goes to both."""

    def unread(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    after_step(5, lambda: monkeypatch.setattr(train_gpt2, "say", unread))
    cfg = replace(tiny_run, log_interval=1)
    with pytest.raises(BrokenPipeError):
        train(cfg)
    folder = Path(cfg.log_dir) / "run"
    assert [path.name for path in runs.checkpoints(folder)] == ["step_000005.pt"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("both", [False, True])
def test_output_to_a_full_disk_does_not_end_a_run(tiny_run, write_toml, tmp_path, unbuffered, both):
    name = write_toml(replace(tiny_run, log_interval=1, eval_interval=4))
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "train_gpt2.py"), name]
        how = dict(cwd=tmp_path, stdout=full, stderr=full if both else subprocess.PIPE)
        done = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, **how)
    assert done.returncode == 0 and not done.stderr
    assert (Path(tiny_run.log_dir) / "run" / "step_000008.pt").exists()


def test_log_on_a_full_disk_does_not_end_a_run(tiny_run, train, monkeypatch, capsys):
    written = []

    class Full(io.StringIO):
        def write(self, text):
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(text)

        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_log(folder, cfg):
        runs_open_log(folder, cfg).close()
        return Full()

    runs_open_log = runs.open_log
    monkeypatch.setattr(runs, "open_log", open_log)
    train(replace(tiny_run, log_interval=4))
    assert (Path(tiny_run.log_dir) / "run" / "step_000008.pt").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if "lack" in line]
    assert told == ["log.txt may lack step 4: [Errno 28] No space left on device"]


def test_compiler_that_fails_is_told_with_what_helps(tiny_run, runtime):
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    with pytest.raises(UserError) as told, runs.telling_obstacles(tiny_run, runtime):
        raise InductorError("InvalidCxxCompiler: No working C++ compiler\n\nSet TORCH_LOGS")
    first, second = str(told.value).split("\n")
    assert first == "torch.compile failed (InvalidCxxCompiler: No working C++ compiler)"
    assert second.strip().startswith("set --compile_model=False, and --resume=True")
    with pytest.raises(RuntimeError, match="a bug"), runs.telling_obstacles(tiny_run, runtime):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("place", ["file/log", "locked/log"])
def test_check_tells_where_nothing_can_be_written(tiny_run, runtime, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked")
    with pytest.raises(UserError, match=r"cannot be written: .*(file|locked) is no folder, or not"):
        train_gpt2.train(replace(tiny_run, log_dir=str(tmp_path / place), check=True), runtime)


def test_check_needs_room_for_the_checkpoints_that_stay_and_one_more(
    tiny, runtime, tmp_path, monkeypatch
):
    model = GPT(tiny)
    one = 3 * 4 * sum(p.numel() for p in model.parameters())  # weights and moments, in float32
    free = (1 + tiny.keep_checkpoints) * one
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    hardware.describe(model, tmp_path, runtime)
    free -= 1
    with pytest.raises(UserError, match=r"needs .* more, .* are free"):
        hardware.describe(model, tmp_path, runtime)


def test_a_run_is_trained_by_one_process_at_a_time(tiny_run, train, runtime):
    folder, _ = train(tiny_run)
    cfg = replace(tiny_run, resume=True, max_steps=10)
    held = runs.open_log(folder, cfg)
    with pytest.raises(UserError, match="run/ is being trained by another process: let that one"):
        train(cfg)
    held.close()
    assert len(train(cfg)[1]["train"]) == 10


def test_resuming_a_run_that_is_done_says_so(tiny_run, train, capsys):
    train(tiny_run)
    assert "is done" not in capsys.readouterr().out
    folder, _ = train(replace(tiny_run, resume=True))
    assert "step 8 is done: for more set --max_steps above 8" in capsys.readouterr().out
    before = (folder / "config.toml").read_bytes()
    with pytest.raises(UserError, match="max_steps=5 was passed: the run is at step 8"):
        train(replace(tiny_run, resume=True, max_steps=5))
    assert (folder / "config.toml").read_bytes() == before


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_evaluation_leaves_the_training_unchanged(tiny_run, train, dropout):
    cfg = replace(tiny_run, dropout=dropout)
    without, with_ = (train(replace(cfg, run_name=f"e{n}", eval_interval=n))[1] for n in (0, 1))
    assert len(with_.pop("val")) == 9
    assert without_speed(with_) == without_speed(without)


def test_validation_loss_is_the_mean_over_the_first_windows_whatever_the_batch(
    tiny_run, make_model, runtime
):
    cfg = replace(tiny_run, eval_tokens=16 * 21 + 5, dropout=0.5)
    model, shards = make_model(cfg).train(), TokenShards(cfg.data_dir, "val")
    tokens = torch.from_numpy(shards.read(0, 16 * 21 + 1).astype(np.int64))
    with torch.no_grad():
        losses = [
            model.eval()(tokens[None, i : i + 16], tokens[None, i + 1 : i + 17]).item()
            for i in range(0, 16 * 21, 16)
        ]
    model.train()
    for rows in (1, 2, 5, 21, 64):
        loss = evaluate_loss(model, shards, cfg, runtime, rows)
        assert loss == pytest.approx(sum(losses) / 21, abs=1e-6)
    assert model.training


def test_validation_reaches_the_last_token(tiny, tmp_path, write_shards):
    for tokens, windows in ((17, 1), (32, 1), (33, 2), (16 * 9 + 1, 9)):
        folder = write_shards(tmp_path / str(tokens), np.zeros(tokens))
        assert train_gpt2.validation_windows(tiny, TokenShards(folder, "val")) == windows


def test_evaluation_has_no_gradients_and_the_dtype_of_training(
    tiny_run, train, runtime, monkeypatch
):
    seen, features = set(), GPT.features

    def looked_at(self, *args):
        x = features(self, *args)
        seen.add((self.training, torch.is_grad_enabled(), self.lm_head(x).dtype))
        return x

    monkeypatch.setattr(GPT, "features", looked_at)
    runtime.dtype = torch.bfloat16
    train(replace(tiny_run, max_steps=1, eval_interval=1))
    assert seen == {(training, training, torch.bfloat16) for training in (True, False)}


def test_loss_beyond_all_bounds_does_not_end_a_run(tiny_run, train, monkeypatch):
    losses = iter([1e5, math.inf, math.nan, 1e5])
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: next(losses))
    _, log = train(replace(tiny_run, max_steps=3, eval_interval=1))
    assert len(log["train"]) == 3 and len(log["val"]) == 4


def test_run_that_is_asked_to_stop_ends_without_the_evaluation_that_is_due(
    tiny_run, train, after_step
):
    after_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    folder, log = train(replace(tiny_run, eval_interval=3))
    assert (folder / "step_000003.pt").exists()
    assert list(log["train"]) == [0, 1, 2] and list(log["val"]) == [0]


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_samples(tiny_run, make_model, runtime, monkeypatch, rank):
    drawn = []
    monkeypatch.setattr(train_gpt2, "complete", lambda *args: drawn.append(1) or [])
    runtime.rank = rank
    model = make_model(replace(tiny_run, sample_prompt="Hello", eval_only=True))
    state = train_gpt2.TrainState(model, None, None, step=1)
    log = train_gpt2.RunLog(None, model, runtime, tokens=1, max_steps=1, start=1)
    train_gpt2.evaluate(state, TokenShards(tiny_run.data_dir, "val"), 8, log, runtime)
    assert bool(drawn) == (rank == 0)


def test_each_validation_window_falls_to_one_rank(tiny_run, make_model, runtime):
    cfg = replace(tiny_run, eval_tokens=16 * 21)
    model, shards = make_model(cfg), TokenShards(cfg.data_dir, "val")
    expected = evaluate_loss(model, shards, cfg, runtime, 4)
    for world in (2, 4, 30):
        parts = []
        for rank in range(world):
            runtime.rank, runtime.world, runtime.sum = rank, world, lambda total: total
            parts.append(evaluate_loss(model, shards, cfg, runtime, 4))
        assert sum(parts) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tty, rank, shown", [(True, 0, True), (True, 1, False), (False, 0, False)])
def test_bars_are_for_the_terminal_of_one_rank(
    tiny_run, make_model, runtime, monkeypatch, tty, rank, shown
):
    class Prompt(tqdm.tqdm):
        def __init__(self, *args, **keys):
            super().__init__(*args, **keys | dict(delay=0, mininterval=0))

    class Screen(io.StringIO):
        def isatty(self):
            return tty

    monkeypatch.setattr(tqdm, "tqdm", Prompt)
    monkeypatch.setattr(train_gpt2, "tqdm", Prompt)
    runtime.rank, runtime.world, runtime.sum = rank, 2, lambda total: total
    model = make_model(replace(tiny_run, n_embd=8, vocab_size=50304, block_size=64))
    tasks = hellaswag.load(ROOT / "tests" / "data" / "hellaswag_own.jsonl", 4)
    shards = TokenShards(tiny_run.data_dir, "val")
    for scored in (
        lambda: evaluate_loss(model, shards, tiny_run, runtime, 4),
        lambda: hellaswag.evaluate(model, tasks, "cpu", rank, 2, batch_tokens=64),
    ):
        monkeypatch.setattr(sys, "stderr", Screen())
        with torch.no_grad():
            scored()
        assert bool(sys.stderr.getvalue()) == shown


def test_best_checkpoint_loads_and_has_the_loss_that_was_logged(tiny_run, train, runtime):
    cfg = replace(tiny_run, eval_interval=4)
    folder, log = train(cfg)
    model = load_model(folder / "best.pt")
    assert not model.training and model.cfg == cfg
    loss = evaluate_loss(model, TokenShards(cfg.data_dir, "val"), cfg, runtime, 2)
    assert loss == pytest.approx(min(log["val"].values()), abs=1e-6)


def test_best_checkpoint_is_that_of_the_lowest_loss_after_a_resume_too(
    tiny_run, train, monkeypatch
):
    losses = iter([0.5, 4.0, 3.0, 3.5, 3.5, 3.2, 3.1])  # at steps 0 to 3, and 3 to 5 again
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: next(losses))
    folder, _ = train(replace(tiny_run, eval_interval=1, max_steps=3))
    train(replace(tiny_run, eval_interval=1, max_steps=5, resume=True))
    best = load(folder / "best.pt")
    assert (best["step"], best["best"]) == (2, 3.0)
    assert best.keys() == {"model", "config", "step", "best"}


def test_run_that_is_made_longer_knows_its_best_loss(tiny_run, train, monkeypatch):
    losses = iter([0.5, 4.0, 3.0, 3.5])  # at steps 0, 4 and 6, the last, then at 8
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: next(losses))
    folder, _ = train(replace(tiny_run, eval_interval=4, max_steps=6))
    train(replace(tiny_run, eval_interval=4, max_steps=8, resume=True))
    best = load(folder / "best.pt")
    assert (best["step"], best["best"]) == (6, 3.0)


def test_best_checkpoint_that_could_not_be_saved_leaves_the_next_a_chance(
    tiny_run, train, monkeypatch
):
    losses = iter([0.5, 4.0, 3.0, 3.5, 3.6])  # at steps 0 to 4
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: next(losses))
    write = train_gpt2.RunLog.write_checkpoint

    def full_at_step_2(log, name, state, more):
        return state.step != 2 and write(log, name, state, more)

    monkeypatch.setattr(train_gpt2.RunLog, "write_checkpoint", full_at_step_2)
    folder, _ = train(replace(tiny_run, eval_interval=1, max_steps=4))
    best = load(folder / "best.pt")
    assert (best["step"], best["best"]) == (3, 3.5)


def test_old_checkpoint_in_use_goes_with_the_next(tiny_run, train, monkeypatch):
    unlink, asked = Path.unlink, []

    def in_use(path, missing_ok=False):
        if path.name == "step_000002.pt" and not asked:
            asked.append(path)
            raise PermissionError(13, "used by another process", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", in_use)
    folder, log = train(replace(tiny_run, checkpoint_interval=2, keep_checkpoints=1, max_steps=6))
    assert asked and len(log["train"]) == 6
    assert [path.name for path in folder.glob("step_*")] == ["step_000006.pt"]


def test_missing_hellaswag_is_one_warning_and_the_run_goes_on(tiny_run, train, capsys, tmp_path):
    nowhere = str(tmp_path / "nowhere.jsonl")
    cfg = replace(tiny_run, hellaswag_examples=4, hellaswag_path=nowhere, eval_interval=2)
    _, log = train(cfg)
    assert "hella" not in log and len(log["train"]) == 8
    told = capsys.readouterr().out
    assert told.count("HellaSwag is skipped") == 1 and told.count(nowhere) == 1


def test_evaluation_scores_hellaswag_and_samples(tiny_run, train, capsys):
    tasks = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
    cfg = replace(
        tiny_run, n_embd=8, block_size=32, vocab_size=50304, max_steps=1, eval_interval=1,
        hellaswag_examples=8, hellaswag_path=str(tasks), sample_prompt="Hello,",
    )  # fmt: skip
    _, log = train(cfg)
    assert list(log["hella"]) == [1] and log["hella"][1] * 8 in range(9)
    told = capsys.readouterr().out
    assert re.search(r"step +1 \| HellaSwag acc_norm 0\.\d+ \+- 0\.\d+ \| acc 0\.\d+", told)
    assert told.count("  > Hello,") == 2


def test_hellaswag_in_log_txt_is_acc_norm(tiny_run, train, tmp_path, capsys):
    """One token costs less than eight, whatever it is; a mean of any of them may be the lowest."""
    words = ["one", "between", "red", "something", "sea", "government", "man", "development"]
    path = tmp_path / "tasks.jsonl"
    longer = [" ".join([word] * 8) for word in [*words, *words]]
    tasks = [[words[i], *longer[i + 1 : i + 4]] for i in range(8)]
    tasks = [{"ctx": "A", "endings": endings, "label": 0} for endings in tasks]
    path.write_text("\n".join(map(json.dumps, tasks)), encoding="utf-8")
    cfg = replace(tiny_run, n_embd=8, vocab_size=50304, max_steps=1, eval_interval=1)
    _, log = train(replace(cfg, hellaswag_examples=8, hellaswag_path=str(path)))
    told = f"HellaSwag acc_norm {log['hella'][1]:.4f} "
    said = capsys.readouterr().out
    assert log["hella"][1] < 1 and told in said and "| acc 1.0000\n" in said


def test_all_of_an_evaluation_is_without_dropout_and_training_goes_on_with_it(
    tiny_run, train, monkeypatch
):
    cfg = replace(tiny_run, n_embd=8, vocab_size=50304, max_steps=2, eval_interval=1, dropout=0.5)
    cfg = replace(cfg, sample_prompt="Hello,", hellaswag_examples=4)
    cfg = replace(cfg, hellaswag_path=str(ROOT / "tests" / "data" / "hellaswag_own.jsonl"))
    modes, score, complete = [], hellaswag.score, train_gpt2.complete

    def looked_at(function, model, *args):
        modes.append(model.training)
        return function(model, *args)

    monkeypatch.setattr(hellaswag, "score", functools.partial(looked_at, score))
    monkeypatch.setattr(train_gpt2, "complete", functools.partial(looked_at, complete))
    step = train_gpt2.train_step
    monkeypatch.setattr(train_gpt2, "train_step", functools.partial(looked_at, step))
    train(cfg)
    assert modes == [True, False, False] * 2


def test_eval_only_prints_what_the_trainings_evaluation_did_and_writes_nothing(
    tiny_run, run_cli, write_toml, tmp_path
):
    tasks = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
    cfg = replace(tiny_run, n_embd=8, vocab_size=50304, block_size=64, total_batch_size=256)
    cfg = replace(cfg, max_steps=1, eval_interval=1, sample_prompt="Hello,")
    cfg = replace(cfg, hellaswag_examples=8, hellaswag_path=str(tasks))
    trained = run_cli("train_gpt2.py", write_toml(cfg)).stdout.splitlines()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    keys = f"--init_from={cfg.log_dir}/run/best.pt", "--eval_only=True", "--eval_interval=0"
    done = run_cli("train_gpt2.py", "x.toml", *keys, "--micro_batch_size=2")
    assert (done.returncode, done.stderr) == (0, "")
    told = done.stdout.replace("step     0", "step     1").splitlines()
    assert [line for line in told if line.startswith("step")] == [
        line for line in trained if line.startswith("step     1 |") and "lr" not in line
    ]
    assert len(told) == 4 and all(line.startswith("  > Hello,") for line in told[2:])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "keys, says",
    [
        (
            dict(eval_tokens=15),
            r"validation tokens: \d+ in .*, eval_tokens=15, but block_size=16 needs more",
        ),
        (dict(data_dir="nowhere", init_from="nowhere.pt"), "no val shards in nowhere"),
    ],
)
def test_eval_only_names_what_is_missing_before_the_model_is_fetched(
    tiny_run, train, runtime, keys, says
):
    folder, _ = train(tiny_run)
    known = dict(init_from=str(folder / "step_000008.pt"), eval_only=True)
    with pytest.raises(UserError, match=says):
        train_gpt2.evaluate_only(replace(tiny_run, **known | keys), runtime)


def test_eval_only_tells_lack_of_memory_takes_the_kernel_and_refuses_check(
    tiny_run, train, write_toml, monkeypatch
):
    folder, _ = train(tiny_run)
    config = write_toml(replace(tiny_run, init_from=str(folder / "step_000008.pt")))
    words = ["train_gpt2.py", f"{folder.parents[1] / config}", "--eval_only=True"]
    monkeypatch.setattr(sys, "argv", [*words, "--check"])
    with pytest.raises(UserError, match="check=True is for a run that trains"):
        train_gpt2.main()
    taken = []

    def short(*_):
        taken.append(torch.backends.cuda.flash_sdp_enabled())
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt2, "evaluate_loss", short)
    monkeypatch.setattr(sys, "argv", [*words, "--attention=math"])
    with pytest.raises(UserError, match="rank 0 is out of memory: set --micro_batch_size=1"):
        train_gpt2.main()
    hardware.allow_attention("auto")
    assert taken == [False]


# ---------------------------------------------------------------- where else a run is logged


def test_trackers_get_what_log_txt_gets_and_samples(tiny_run, train, monkeypatch):
    class Recorder:
        def __init__(self):
            self.streams, self.texts, self.closed = {}, [], False

        def log(self, step, values):
            for stream, value in values.items():
                self.streams.setdefault(stream, {})[step] = value

        def text(self, step, name, text):
            self.texts.append((step, name, text))

        def close(self):
            self.closed = True

    made, opened = Recorder(), []
    monkeypatch.setattr(
        train_gpt2.trackers, "open_trackers", lambda *args: opened.append(args) or [made]
    )
    cfg = replace(tiny_run, vocab_size=50304, n_embd=8, sample_prompt="Hello", eval_interval=4)
    folder, log = train(cfg)
    assert made.streams == log and made.closed
    assert [(step, name) for step, name, _ in made.texts] == [
        (step, f"sample_{i}") for step in (4, 8) for i in range(2)
    ]
    assert all(text.startswith("Hello") for *_, text in made.texts)
    train(replace(cfg, resume=True, max_steps=10))
    assert [(str(args[1]), args[2]) for args in opened] == [(str(folder), 0), (str(folder), 8)]


def test_missing_tracker_is_one_error_before_anything_is_written(tiny_run, write_toml, monkeypatch):
    monkeypatch.chdir(Path(tiny_run.data_dir).parent)
    write_toml(tiny_run)
    monkeypatch.setattr(train_gpt2.trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "x.toml", "--wandb_project=p"])
    with pytest.raises(UserError, match="wandb is missing: pip install wandb"):
        train_gpt2.main()
    assert not Path(tiny_run.log_dir).exists()


NORMS = [f"{what}_{kind}" for what in ("norm", "update")
         for kind in ("embedding", "attention", "mlp", "norm")]  # fmt: skip


@pytest.mark.parametrize("keys", [{}, {"pos_embedding": "rope", "tie_embeddings": False}])
def test_norms_of_the_kinds_of_layers_make_up_the_gradient_norm(tiny_run, train, keys):
    _, plain = train(replace(tiny_run, run_name="plain", **keys))
    _, log = train(replace(tiny_run, log_norms=True, grad_clip=0.1, **keys))
    assert log.keys() == {*plain, *NORMS}
    for step, norm in log["norm"].items():
        squares = sum(log[name][step] ** 2 for name in NORMS[:4])
        assert math.sqrt(squares) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("used", [True, False])
def test_norms_count_a_layer_of_a_new_kind_and_weights_that_a_step_left_out(tiny, make_model, used):
    model = make_model(tiny).train()
    model.transformer.router = torch.nn.Linear(8, 8)
    model.transformer.expert = torch.nn.Linear(8, 8)
    norms = train_gpt2.trackers.Norms(model)
    idx = torch.arange(16)[None]
    routed = model.transformer.router(torch.ones(8)).sum() if used else 0
    (model(idx, idx) + routed).backward()
    norms.before()
    norms.after()
    gradients = [p.grad for p in model.transformer.router.parameters() if used]
    squares = sum(float(g.square().sum()) for g in gradients)
    assert norms.values["norm_other"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert norms.values.keys() == {*NORMS, "norm_other", "update_other"}


def test_looking_at_norms_changes_no_number_of_the_training(tiny_run, train):
    runs = [
        without_speed(train(replace(tiny_run, run_name=name, log_norms=on))[1])
        for name, on in (("off", False), ("on", True))
    ]
    assert {key: runs[1][key] for key in runs[0]} == runs[0]


def test_head_of_its_own_counts_among_the_embeddings(tiny, make_model):
    model = make_model(replace(tiny, tie_embeddings=False))
    head = model.lm_head.weight
    assert any(p is head for p in train_gpt2.trackers.Norms(model).groups["embedding"])


def test_norms_leave_out_what_is_frozen(tiny, make_model):
    model = make_model(tiny).train()
    model.transformer.wpe.weight.requires_grad_(False)
    for p in model.transformer.h.parameters():
        if p.dim() == 1:
            p.requires_grad_(False)
    for p in model.transformer.ln_f.parameters():
        p.requires_grad_(False)
    norms = train_gpt2.trackers.Norms(model)
    idx = torch.arange(16)[None]
    model(idx, idx).backward()
    norms.before()
    norms.after()
    assert norms.values.keys() == {name for name in NORMS if not name.endswith("_norm")}
    assert norms.values["norm_embedding"] > 0 == norms.values["update_embedding"]


def test_update_is_the_change_of_the_weights_over_the_weights(tiny_run, train):
    cfg = replace(tiny_run, max_steps=1, log_norms=True)
    folder, log = train(cfg)
    after = load_model(folder / "step_000001.pt").state_dict()
    torch.manual_seed(cfg.seed)
    before = GPT(cfg).state_dict()
    for kind, part in (("attention", ".attn."), ("mlp", ".mlp."), ("norm", ".ln_")):
        names = [name for name in before if part in name]
        moved = sum(((after[name] - before[name]) ** 2).sum() for name in names)
        size = sum((before[name] ** 2).sum() for name in names)
        assert log[f"update_{kind}"][0] == pytest.approx(math.sqrt(moved / size), rel=1e-4)


# ---------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_run_is_bitwise_the_uninterrupted_one(
    tiny_run, train, after_step, capsys, dropout, number
):
    cfg = replace(tiny_run, dropout=dropout, max_steps=20, eval_interval=3)
    expected = train(replace(cfg, run_name="whole"))
    after_step(6, lambda: signal.raise_signal(number))
    folder, log = train(cfg)
    assert list(log["train"]) == list(range(7)) and (folder / "step_000007.pt").exists()
    command = (
        rf"to continue: \S+ train_gpt2.py {re.escape(str(folder))}/config.toml --resume=True\n"
    )
    assert re.search(command, capsys.readouterr().out)
    assert_same_run(train(replace(cfg, resume=True)), expected, last=20)


def test_killed_and_resumed_run_is_bitwise_the_uninterrupted_one(tiny_run, train, after_step):
    cfg = replace(tiny_run, dropout=0.2, max_steps=20, eval_interval=4, checkpoint_interval=3)
    expected = train(replace(cfg, run_name="whole"))
    for step in (2, 8, 9, 17):  # before the first checkpoint, too
        after_step(step, cut_power)
        with pytest.raises(PowerCut):
            train(replace(cfg, resume=True))
    assert_same_run(train(replace(cfg, resume=True)), expected, last=20)


@pytest.mark.parametrize("left", [0, 100, -1000])
def test_torn_checkpoint_is_skipped_for_the_one_before(tiny_run, train, capsys, left):
    cfg = replace(tiny_run, checkpoint_interval=3)
    expected = train(replace(cfg, run_name="whole"))
    folder, _ = train(cfg)
    newest = folder / "step_000008.pt"
    newest.write_bytes(newest.read_bytes()[:left])
    capsys.readouterr()
    actual = train(replace(cfg, resume=True))
    told = capsys.readouterr().out
    assert re.search(rf"{re.escape(str(newest))} .*going back to the one before\n", told)
    assert f"continuing {folder / 'step_000006.pt'}: step 6" in told
    assert_same_run(actual, expected, last=8)


def test_resume_without_a_checkpoint_begins_and_says_so(tiny_run, train, capsys):
    _, log = train(replace(tiny_run, resume=True))
    assert len(log["train"]) == 8
    assert "no checkpoint in" in capsys.readouterr().out


def test_resumed_run_may_go_further_with_another_learning_rate(tiny_run, train):
    train(tiny_run)
    cfg = replace(tiny_run, resume=True, max_steps=12, learning_rate=1e-4, weight_decay=0.0)
    folder, log = train(cfg)
    assert len(log["train"]) == 12 and log["lr"][11] < 1e-4
    groups = load(folder / "step_000012.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]


def test_resume_with_other_batches_says_so(tiny_run, train, write_shards, tmp_path, capsys):
    cfg = replace(tiny_run, grad_accum_steps=2, max_steps=2)
    train(cfg)
    train(replace(cfg, max_steps=3, resume=True))
    assert "of data" not in capsys.readouterr().out
    tokens = np.arange(3000, dtype=np.uint16) % 512
    more = write_shards(tmp_path / "more", tokens, val=tokens[:600])
    train(replace(cfg, max_steps=4, resume=True, data_dir=more, grad_accum_steps=3))
    was, now = (
        "2,077 tokens of data, 8 sequences a step",
        "3,000 tokens of data, 12 sequences a step",
    )
    assert f"the batches change from here on: {was} before, {now} now" in capsys.readouterr().out


@pytest.mark.parametrize(("eval_tokens", "best"), [(512, 0.1), (256, 6.0)], ids=["same", "other"])
def test_best_is_of_the_tokens_that_are_evaluated(tiny_run, train, eval_tokens, best):
    cfg = replace(tiny_run, max_steps=2, eval_interval=2)
    folder, _ = train(cfg)
    newest = load(folder / "step_000002.pt")
    torch.save(newest | {"best": 0.1}, folder / "step_000002.pt")  # as of tokens easy to predict
    train(replace(cfg, max_steps=4, resume=True, eval_tokens=eval_tokens))
    assert load(folder / "step_000004.pt")["best"] == pytest.approx(best, abs=0.5)


def test_a_resume_on_other_data_has_a_best_of_its_own(tiny_run, train, write_shards, tmp_path):
    easy = write_shards(tmp_path / "easy", np.arange(2000) % 32)
    cfg = replace(tiny_run, max_steps=30, eval_interval=30)
    folder, learned = train(replace(cfg, data_dir=easy))
    _, log = train(replace(cfg, max_steps=31, resume=True))
    assert log["val"][31] > learned["val"][30]
    assert load(folder / "best.pt")["step"] == 31


def test_resume_with_another_architecture_names_what_differs(tiny_run, train):
    train(tiny_run)
    with pytest.raises(UserError, match=r"n_embd=32, now 64.*mlp=gelu, now swiglu"):
        train(replace(tiny_run, resume=True, n_embd=64, mlp="swiglu"))


def test_resume_ends_a_torn_line_of_the_log(tiny_run, train, after_step):
    after_step(4, lambda: signal.raise_signal(signal.SIGTERM))
    folder, _ = train(tiny_run)
    with open(folder / "log.txt", "a") as log:
        log.write("5 trai")
    with pytest.raises(ValueError):
        train(replace(tiny_run, resume=True))  # the reader of the tests takes whole lines only
    lines = (folder / "log.txt").read_text().splitlines()
    assert [line for line in lines if len(line.split()) != 3] == ["5 trai"]
    assert lines[-1].startswith("7 ")


# ---------------------------------------------------------------- the run's folder


def test_without_evaluations_no_validation_shards_are_needed(tiny_run, train, tmp_path):
    shutil.copytree(tiny_run.data_dir, tmp_path / "copy")
    tiny_run = replace(tiny_run, data_dir=str(tmp_path / "copy"))
    for shard in (tmp_path / "copy").glob("*_val_*"):
        shard.unlink()
    with pytest.raises(UserError, match="no val shards"):
        train(replace(tiny_run, eval_interval=5))
    _, log = train(replace(tiny_run, eval_interval=0, max_steps=2))
    assert len(log["train"]) == 2 and "val" not in log


def test_newest_checkpoints_stay(tiny_run, train):
    folder, _ = train(replace(tiny_run, checkpoint_interval=2, keep_checkpoints=3, max_steps=9))
    steps = sorted(path.name for path in folder.glob("step_*.pt"))
    assert steps == ["step_000006.pt", "step_000008.pt", "step_000009.pt"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "log.txt", *steps]


def test_checkpoint_holds_plain_values_and_raw_keys(tiny_run, train):
    folder, _ = train(tiny_run)
    checkpoint = load(folder / "step_000008.pt")
    assert checkpoint["config"] == asdict(tiny_run) and checkpoint["step"] == 8
    assert checkpoint["model"].keys() == GPT(tiny_run).state_dict().keys()
    assert "transformer.h.1.attn.c_attn.weight" in checkpoint["model"]


def test_compiled_model_is_for_the_steps_alone(tiny_run, train, runtime):
    """Its keys would be of no plain model, and each new shape would be compiled anew."""
    shapes = []

    class Compiled(torch.nn.Module):  # as torch.compile's: all but a call is the model's own
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def __getattr__(self, name):
            own = self.__dict__["_modules"]
            return own[name] if name in own else getattr(own["_orig_mod"], name)

        def forward(self, idx, targets):
            shapes.append(tuple(idx.shape))
            return self._orig_mod(idx, targets)

    runtime.compile = Compiled
    keys = dict(vocab_size=50304, n_embd=8, sample_prompt="Hello,", hellaswag_examples=4)
    tasks = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
    cfg = replace(tiny_run, compile_model=True, eval_interval=1, max_steps=2, **keys)
    folder, _ = train(replace(cfg, hellaswag_path=str(tasks)))
    assert shapes == [(4, 16)] * 4  # two steps of two micro-steps
    for name in ("best.pt", "step_000002.pt"):
        assert load(folder / name)["model"].keys() == GPT(cfg).state_dict().keys()


@pytest.fixture
def command(monkeypatch, tmp_path, tiny_run):
    """Call main() as the command does, for tiny.toml with few steps and no run_name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "finish", lambda folder, cfg, runtime: None)
    cfg = replace(tiny_run, run_name="", max_steps=2)
    Path("tiny.toml").write_text(to_toml(cfg), encoding="utf-8")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "tiny.toml", *args])
        train_gpt2.main()

    return call


def contents(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_default_names_count_up_and_nothing_is_overwritten(command):
    command()
    first = contents("log")
    command()
    command()
    assert sorted(path.name for path in Path("log").iterdir()) == ["tiny", "tiny-2", "tiny-3"]
    assert contents("log").items() >= first.items()


def test_explicit_name_that_is_taken_is_refused(command):
    command("--run_name=mine")
    before = contents("log")
    with pytest.raises(UserError, match=r"mine/ holds a run: add --resume=True, or .*--run_name"):
        command("--run_name=mine")
    assert contents("log") == before
    command("--run_name=mine", "--resume=True", "--max_steps=3")
    assert Path("log/mine/step_000003.pt").exists()


def test_checkpoints_without_their_log_are_a_run_too(command):
    command("--run_name=mine")
    Path("log/mine/log.txt").unlink()
    before = contents("log")
    with pytest.raises(UserError, match="mine/ holds a run"):
        command("--run_name=mine", "--max_steps=1")
    assert contents("log") == before
    command("--run_name=mine", "--resume=True", "--max_steps=3")
    assert Path("log/mine/step_000003.pt").exists()


def test_run_that_finds_no_room_for_its_config_may_be_tried_again(command, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "replacing", full)
        with pytest.raises(OSError, match="no space"):
            command("--run_name=mine")
    command("--run_name=mine")
    assert Path("log/mine/step_000002.pt").exists()


def test_run_that_diverged_is_told_what_is_left_to_try(tmp_path):
    (tmp_path / "step_000001.pt").touch()
    told = str(runs.diverged(tmp_path, 1, 10, unsaved=""))
    assert "holds step 1" in told and "begin a new run" in told  # nothing older to go on from
    (tmp_path / "step_000009.pt").touch()
    told = str(runs.diverged(tmp_path, 9, 10, unsaved=""))
    assert "holds step 9" in told and "go on from an older one" in told
    told = str(runs.diverged(tmp_path, 12, 10, unsaved="step_000012.pt"))
    assert "could not be saved" in told and "begin" not in told


def test_config_of_a_run_folder_starts_another_run_or_resumes_it(command, capsys):
    command()
    command("log/tiny/config.toml", "--run_name=again")
    command("log/again/config.toml", "--resume=True", "--max_steps=4")
    assert sorted(path.name for path in Path("log").iterdir()) == ["again", "tiny"]
    assert Path("log/again/step_000004.pt").exists()


def test_resume_takes_the_last_of_the_default_names(tiny_run):
    log = Path(tiny_run.log_dir)
    cfg = replace(tiny_run, run_name="", resume=True)
    assert runs.choose_run_name(cfg, "a") == "a"
    for name in ("a", "a-2"):
        (log / name).mkdir(parents=True)
        (log / name / "log.txt").touch()
    assert runs.choose_run_name(cfg, "a") == "a-2"
    assert runs.choose_run_name(replace(cfg, resume=False), "a") == "a-3"


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(micro_batch_size=3), "total_batch_size=128 is not a multiple"),
        (dict(total_batch_size=100, micro_batch_size=2), r"world=2\*16\*1=32; try 96"),
        (dict(data_dir="nowhere"), "no train shards in nowhere/"),
        (dict(block_size=4096, total_batch_size=16384), "block_size=4096, but .* has 2077 tokens"),
        (dict(init_from="nowhere.pt"), r"nowhere\.pt .*No such file"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tiny_run, train, keys, message):
    with pytest.raises(UserError, match=message):
        train(replace(tiny_run, **keys))
    assert not Path(tiny_run.log_dir).exists()


# ---------------------------------------------------------------- the micro-batch that fits


LACKS = (  # of memory; MPS has no class for it
    torch.OutOfMemoryError("out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GiB, other allocations: ...)."),
    RuntimeError("Invalid buffer size: 12.00 GiB"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
)


@pytest.fixture
def fit(monkeypatch, tiny, runtime, capsys):
    """Fit the micro-batch on a stand-in device with memory for `room` sequences.

    The other ranks of `world` have memory for `least`.
    """

    def run(room, world=1, least=None, lack=LACKS[0], resumed=False, **keys):
        def forward(self, idx, targets=None):
            tried.append(idx.size(0))
            if idx.size(0) > room:
                raise lack
            return self.transformer.ln_f.weight.sum()

        def add_others(mine):
            return mine + (world - 1) * (least is None or tried[-1] <= least)

        tried = []
        monkeypatch.setattr(GPT, "forward", forward)
        runtime.device, runtime.world, runtime.sum = torch.device("meta"), world, add_others
        cfg = replace(tiny, micro_batch_size=0, **keys)
        with torch.device("meta"):
            model = GPT(cfg)
        most = largest_micro_batch(cfg, runtime)
        rows = hardware.fit_micro_batch(model, most, runtime, resumed)
        assert all(p.grad is None for p in model.parameters())
        assert f"micro_batch_size={rows}" in capsys.readouterr().out
        assert rows <= room
        return rows, batch_layout(cfg, world, rows)

    return run


def test_micro_batch_halves_until_it_fits_and_tokens_a_step_stay(fit):
    # 512 sequences of 16 tokens a step
    for room, expected in ((1000, 64), (64, 64), (63, 32), (5, 4), (1, 1)):
        rows, (micro_steps, sequences) = fit(room, total_batch_size=8192)
        assert rows == expected and sequences == 512 == rows * micro_steps


def test_micro_batch_halves_for_lack_of_memory_alone(fit):
    for lack in LACKS:
        assert fit(5, total_batch_size=8192, lack=lack)[0] == 4
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        fit(5, total_batch_size=8192, lack=RuntimeError("a bug"))


def test_micro_batch_that_fits_divides_every_ranks_share(fit):
    for sequences, world, expected in ((24, 1, 8), (24, 3, 8), (24, 4, 2), (7, 1, 1)):
        rows, (micro_steps, G) = fit(1000, world=world, total_batch_size=16 * sequences)
        assert rows == expected and G == sequences == rows * micro_steps * world


@pytest.mark.parametrize("world, before", [(1, 0), (4, 1)])
@pytest.mark.parametrize(
    "resumed, log_norms, after", [(False, False, 2), (True, False, 0), (False, True, 3)]
)
def test_micro_batch_leaves_room_for_what_is_to_come(
    fit, monkeypatch, tiny, world, before, resumed, log_norms, after
):
    """DDP's buckets come before the first pass; between the first and the second, as in training,
    AdamW's moments, unless a resumed run has them, and the copies of log_norms."""
    happened, empty_like, backward = [], torch.empty_like, torch.Tensor.backward
    monkeypatch.setattr(torch, "empty_like", lambda p: happened.append(p.shape) or empty_like(p))
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: happened.append(()) or backward(x))
    fit(1000, world=world, resumed=resumed, total_batch_size=8192, log_norms=log_norms)
    shapes = [p.shape for p in GPT(tiny).parameters()]
    first, second = (i for i, shape in enumerate(happened) if shape == ())
    assert sorted(happened[:first]) == sorted(before * shapes)
    assert sorted(happened[first + 1 : second]) == sorted(after * shapes)
    assert second == len(happened) - 1


def test_ranks_agree_on_the_micro_batch_that_fits_all(fit):
    assert fit(32, world=2, least=4, total_batch_size=8192)[0] == 4
    assert fit(4, world=2, least=32, total_batch_size=8192)[0] == 4


def test_no_room_for_one_sequence_is_an_error(fit):
    with pytest.raises(UserError, match="not even one sequence fits in memory"):
        fit(0, total_batch_size=8192)


@pytest.mark.parametrize(
    "world, told", [(1, "not even one sequence"), (2, "rank 0 is out of memory: its weights alone")]
)
def test_no_room_for_moments_or_buckets_is_an_error(fit, monkeypatch, world, told):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(UserError, match=told):
        fit(8, world=world, total_batch_size=8192)


def test_micro_batch_on_cpu_is_at_most_four(tiny, runtime):
    for total, expected in ((16 * 64, 4), (16 * 6, 2), (16 * 3, 1)):
        cfg = replace(tiny, micro_batch_size=0, total_batch_size=total)
        most = largest_micro_batch(cfg, runtime)
        assert hardware.fit_micro_batch(GPT(cfg), most, runtime) == most == expected


# ---------------------------------------------------------------- devices


def test_device_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "tpu"):
        with pytest.raises(UserError, match=f"device={name} .* try --device=auto"):
            Runtime(name)


@pytest.mark.parametrize(
    "gpus, mps, device", [(2, True, "cuda:0"), (0, True, "mps"), (0, False, "cpu")]
)
def test_best_device_that_is_there_is_taken(monkeypatch, runtime, gpus, mps, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    found = hardware.find_device("auto", print)
    assert found == torch.device(device)
    if device == "mps":  # where float16 would need a scaler, and bfloat16 is slow
        assert hardware.find_dtype("auto", found, runtime.print) == torch.float32


@pytest.mark.parametrize(
    "dtype, precision", [("float32", "highest"), ("bfloat16", "high"), ("auto", "high")]
)
def test_tf32_is_used_unless_float32_is_asked_for(monkeypatch, dtype, precision):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1))
    monkeypatch.setenv("LOCAL_RANK", "3")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    before = torch.get_float32_matmul_precision()
    try:
        Runtime("cuda", dtype)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen == [torch.device("cuda", 3)]  # NCCL and the memory's figures are of that one


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_tf32_is_set_by_one_of_torchs_apis_alone(path):
    """Mixed with the others, torch.compile raises an error."""
    others = r"allow_tf32|fp32_precision|conv\.allow|NVIDIA_TF32"
    assert not re.search(others, path.read_text(encoding="utf-8"))


def test_torch_without_cuda_beside_an_nvidia_driver_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "nvidia-smi").touch(0o777)
    monkeypatch.setenv("PATH", str(tmp_path))
    Runtime("auto")
    assert "NVIDIA driver is here, but this torch is for CPUs" in capsys.readouterr().out
    Runtime("cpu")
    assert "NVIDIA" not in capsys.readouterr().out


def test_wrong_gradients_of_mps_are_refused(tiny, runtime):
    cfg = replace(tiny, gradient_checkpointing=True, dropout=0.1)
    hardware.refuse_wrong(cfg, runtime)
    runtime.device = torch.device("mps")
    hardware.refuse_wrong(replace(cfg, dropout=0.0), runtime)
    with pytest.raises(UserError, match=r"another dropout on MPS .*: set --dropout=0"):
        hardware.refuse_wrong(cfg, runtime)


def test_each_rank_takes_its_gpu_and_too_many_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.find_device("auto", print) == torch.device("cuda", 1)
    assert hardware.find_device("cpu", print) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"^rank 2 finds no GPU .*; try --nproc_per_node=2"):
        Runtime("cuda")


@pytest.mark.parametrize(
    "capability, dtype", [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")]
)
def test_precision_and_compiler_follow_the_compute_capability(
    monkeypatch, runtime, capsys, capability, dtype
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.find_dtype("auto", torch.device("cuda"), runtime.print) == getattr(torch, dtype)
    assert ("no bfloat16" in capsys.readouterr().out) == (dtype == "float16")


@pytest.mark.parametrize(
    "native, dtype",
    [
        ("", "float32"),
        ("_is_avx512_bf16_supported", "bfloat16"),
        ("_is_amx_tile_supported", "bfloat16"),
    ],
)
def test_precision_follows_what_the_cpu_multiplies_in(monkeypatch, runtime, capsys, native, dtype):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == native, raising=False)
    assert hardware.find_dtype("auto", torch.device("cpu"), runtime.print) == getattr(torch, dtype)
    assert ("without native bfloat16" in capsys.readouterr().out) == (dtype == "float32")


def test_model_is_not_compiled_where_that_cannot_work(monkeypatch, runtime, capsys):
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    for device, told in (("cuda", "capability 7.0"), ("mps", "not ready for MPS")):
        runtime.device = torch.device(device)
        assert runtime.compile(model) is model
        assert told in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert "capability" not in hardware.compile_obstacle(torch.device("cuda"))


@pytest.mark.skipif(sys.platform != "linux", reason="another system has another compiler")
def test_the_compiler_that_inductor_takes_decides_whether_there_is_one(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name if name == "g++" else None)
    cpu = torch.device("cpu")
    assert hardware.compile_obstacle(cpu) == ""
    monkeypatch.setenv("CXX", "clang++")
    assert hardware.compile_obstacle(cpu) == "there is no C++ compiler clang++"
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name if name == "clang++" else None)
    assert hardware.compile_obstacle(cpu) == "there is no C++ compiler g++"


def test_a_python_without_its_header_cannot_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name)
    monkeypatch.setattr(hardware.sysconfig, "get_path", lambda name: str(tmp_path))
    assert hardware.compile_obstacle(torch.device("cpu")).startswith("no Python.h; install ")
    (tmp_path / "Python.h").touch()
    assert hardware.compile_obstacle(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
        ("NVIDIA RTX A1000", 0),
        ("NVIDIA GeForce GTX 1080", 0),
    ],
)
def test_peak_flops_are_the_gpus_or_unknown(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert hardware.peak_flops(cuda, torch.bfloat16) == teraflops * 1e12
    assert hardware.peak_flops(cuda, torch.float32) == 0
    assert hardware.peak_flops(torch.device("cpu"), torch.bfloat16) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a malloc of another kind")
@pytest.mark.parametrize("make_runtime, kept", [("", False), ("Runtime('cpu', 'float32')", True)])
def test_run_on_a_cpu_keeps_the_memory_it_frees(make_runtime, kept):
    code = f"""
import os, torch
from train_gpt2 import Runtime

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

{make_runtime}
x = torch.ones(2**25)  # 128 MB
before = resident()
del x
print(before - resident() < 2**26)
"""
    where = Path(train_gpt2.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True)
    assert done.stdout.split() == [str(kept)], done.stderr


# ---------------------------------------------------------------- foreign checkpoints


@pytest.mark.parametrize(
    "content",
    [b"", b"text", {"model": {}}, [1, 2], {"config": {"n_layers": 3}, "model": {}}],
    ids=["empty", "text", "no config", "a list", "another version"],
)
def test_file_that_is_no_checkpoint_is_one_clear_error(tmp_path, content):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_of_a_gpu_is_read_where_there_is_none(tmp_path, tiny, make_model, monkeypatch):
    model = make_model(tiny)
    content = {"model": model.state_dict(), "config": asdict(tiny)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save(content, tmp_path / "x.pt")
    read = load_model(tmp_path / "x.pt").state_dict()
    torch.testing.assert_close(read, model.state_dict(), rtol=0, atol=0)


def test_checkpoint_cannot_run_code(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "hacked",)

    torch.save({"config": asdict(Config()), "model": Touch()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        load_model(tmp_path / "x.pt")
    assert not (tmp_path / "hacked").exists()


# ---------------------------------------------------------------- as a command


@pytest.fixture
def tiny_toml(tmp_path, tiny_run):
    """tiny.toml: long enough to be stopped, with a line on the console for every step."""
    cfg = replace(tiny_run, run_name="", log_dir="log", max_steps=2000, log_interval=1)
    (tmp_path / "tiny.toml").write_text(to_toml(cfg), encoding="utf-8")
    return tmp_path / "tiny.toml"


def start(tiny_toml, *args):
    command = [sys.executable, ROOT / "train_gpt2.py", tiny_toml, *args]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=tiny_toml.parent, text=True, **pipes)


def read_until(process, start_of_line):
    for line in process.stdout:
        if line.startswith(start_of_line):
            return
    raise AssertionError(f"no line begins {start_of_line!r}")


def test_command_trains_draws_and_says_what_it_wrote(run_cli, tiny_toml):
    done = run_cli("train_gpt2.py", tiny_toml, "--max_steps=3", "--eval_interval=3")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    shown = r"step {5}[012]/3 \| loss \d\.\d{4} \| lr \d.* \| norm \d.* \| dt \d+ ms \| .* tok/s \|"
    assert sum(bool(re.match(shown, line)) for line in lines) == 3
    files = sorted(path.name for path in (tiny_toml.parent / "log" / "tiny").iterdir())
    assert files == ["best.pt", "config.toml", "log.txt", "loss.png", "step_000003.pt"]
    assert f"wrote log/tiny/: {', '.join(files)}" in done.stdout.replace(os.sep, "/")
    assert lines[-1].startswith("next:  ") and "train_gpt2.py log" in lines[-1]


@pytest.mark.parametrize("vocab_size, scripts", [(512, 1), (50304, 3)])
def test_of_ids_that_are_of_no_text_no_text_is_asked(
    tiny_run, runtime, train, capfd, vocab_size, scripts
):
    folder, _ = train(replace(tiny_run, max_steps=1))
    capfd.readouterr()
    finish(folder, replace(tiny_run, vocab_size=vocab_size), runtime)
    told = re.findall(r"(\w+)\.py ", capfd.readouterr().out)
    assert told == ["sample", "attention", "train_gpt2"][-scripts:]


def test_rank_0_alone_draws_and_tells_what_to_do_next(tiny, tmp_path, capfd):
    finish(tmp_path, tiny, SimpleNamespace(rank=1))
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_sigterm_saves_and_the_command_it_prints_resumes(run_cli, tiny_toml):
    process = start(tiny_toml)
    read_until(process, "step     5/")
    process.send_signal(signal.SIGTERM)
    told, warned = process.communicate(timeout=60)
    assert process.returncode == 0 and warned.startswith("\nstopping after this step; once more")
    done, args = re.search(r"stopped after step (\d+); to continue: \S+ (.*)\n", told).groups()
    script, *args = args.split()
    again = run_cli(script, *args, f"--max_steps={int(done) + 2}", "--log_interval=1")
    assert again.returncode == 0, again.stderr
    assert f"step_{int(done):06d}.pt: step {done}\n" in again.stdout
    assert len(re.findall(r"^step .*\| loss", again.stdout, re.MULTILINE)) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_sigkill_at_any_time_loses_nothing_but_time(run_cli, tiny_toml, tiny_run, train):
    keys = dict(max_steps=60, checkpoint_interval=1, dropout=0.1)
    expected = train(replace(tiny_run, run_name="whole", **keys))
    args = ["--run_name=run", "--resume=True", *(f"--{k}={v}" for k, v in keys.items())]
    for step in (10, 25, 40):
        process = start(tiny_toml, *args)
        read_until(process, f"step    {step}/")
        time.sleep(0.01 * (step % 7))  # into the middle of a step, or of a checkpoint
        process.kill()
        process.communicate()
    assert run_cli("train_gpt2.py", tiny_toml, *args).returncode == 0
    log = tiny_toml.parent / "log"
    assert not list((log / "run").glob(".*.tmp"))
    for key in ("model", "optimizer"):
        torch.testing.assert_close(
            load(log / "run" / "step_000060.pt")[key],
            load(expected[0] / "step_000060.pt")[key], rtol=0, atol=0,
        )  # fmt: skip


@pytest.mark.slow
def test_compiled_training_equals_eager_training(tiny_run, train, toggles):
    cfg = replace(tiny_run, eval_interval=4, **toggles)
    eager, compiled = (
        train(replace(cfg, run_name=f"c{on}", compile_model=on)) for on in (False, True)
    )
    for stream in ("train", "val"):
        for step, value in eager[1][stream].items():
            assert compiled[1][stream][step] == pytest.approx(value, abs=1e-4)
    assert load(compiled[0] / "step_000008.pt")["model"].keys() == GPT(cfg).state_dict().keys()


def test_architecture_names_fields_of_the_config():
    assert set(ARCHITECTURE) < set(asdict(Config()))


def test_train_runs_in_a_thread_which_gets_no_signals(tiny_run, runtime, read_log):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_gpt2.train, tiny_run, runtime).result()
    assert len(read_log(Path(tiny_run.log_dir) / "run")["train"]) == tiny_run.max_steps


def test_run_without_a_name_is_refused_not_strewn_over_log_dir(tiny_run, runtime):
    with pytest.raises(UserError, match="run_name is empty"):
        train_gpt2.train(replace(tiny_run, run_name=""), runtime)
    assert not Path(tiny_run.log_dir).exists()


def test_two_runs_that_start_at_once_do_not_share_a_folder(tiny_run, train, runtime):
    folder, log = train(tiny_run)  # the other, which took the name after both had looked
    (folder / ".step_000009.pt.1.tmp").touch()  # which it is writing just now
    with pytest.raises(UserError, match=r"run/ holds a run by now: start again with"):
        train_gpt2.train(replace(tiny_run, seed=2), runtime)
    assert "seed = 1337" in (folder / "config.toml").read_text(encoding="utf-8")
    assert (folder / ".step_000009.pt.1.tmp").exists()
    assert list(log["train"]) == list(range(8)) and len(list(folder.glob("step_*.pt"))) == 1


def test_newest_checkpoint_is_the_newest_beyond_six_digits(tmp_path):
    names = ["step_998000.pt", "step_999000.pt", "step_1000000.pt"]
    for name in [*reversed(names), "step_998000_good.pt", "step_1000000-copy.pt", "step_.pt"]:
        (tmp_path / name).touch()
    assert [path.name for path in runs.checkpoints(tmp_path)] == names


def test_run_without_float16_resumes_with_it(tiny_run, train):
    folder, _ = train(replace(tiny_run, max_steps=4, warmup_steps=99))
    state = train_gpt2.TrainState(
        GPT(tiny_run), None, torch.amp.GradScaler("cpu", enabled=True), best=0.0
    )
    state.optimizer = train_gpt2.make_optimizer(state.model, tiny_run)
    train_gpt2.resume(folder, state, Runtime("cpu", "float32"))
    assert state.step == 4 and state.scaler.get_scale() == 65536


def test_scale_of_the_loss_is_resumed(tiny_run, train, runtime):
    runtime.dtype = torch.float16
    folder, _ = train(replace(tiny_run, max_steps=4))
    saved = load(folder / "step_000004.pt")
    assert saved["scaler"]["_growth_tracker"] == 4
    torch.save(saved | {"scaler": saved["scaler"] | {"scale": 512.0}}, folder / "step_000004.pt")
    train(replace(tiny_run, max_steps=5, resume=True))
    scaler = load(folder / "step_000005.pt")["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (512.0, 5)


def test_scale_that_is_too_high_is_halved_at_each_skipped_step(tiny_run, train, runtime):
    runtime.dtype = torch.float16
    folder, _ = train(replace(tiny_run, max_steps=1))
    saved = load(folder / "step_000001.pt")
    torch.save(saved | {"scaler": saved["scaler"] | {"scale": 2.0**25}}, folder / "step_000001.pt")
    folder, log = train(replace(tiny_run, max_steps=12, resume=True))
    skipped = [step for step in log["norm"] if not math.isfinite(log["norm"][step])]
    assert 1 < len(skipped) < 10 and skipped[0] == 1
    assert load(folder / "step_000012.pt")["scaler"]["scale"] == 2.0 ** (25 - len(skipped))


def test_resumed_optimizer_has_the_rate_of_the_last_step_until_the_next(tiny_run, train, runtime):
    folder, log = train(tiny_run)
    state = train_gpt2.TrainState(GPT(tiny_run), None, torch.amp.GradScaler("cpu", enabled=False))
    state.optimizer = train_gpt2.make_optimizer(state.model, tiny_run)
    train_gpt2.resume(folder, state, runtime)
    assert [group["lr"] for group in state.optimizer.param_groups] == [log["lr"][7]] * 2


def test_hellaswag_is_skipped_on_all_ranks_if_one_has_no_tasks(runtime, capsys):
    own = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
    assert len(hellaswag.shared(str(own), 4, runtime)) == 4
    assert capsys.readouterr().out == ""
    alone = Runtime("cpu", "float32")
    alone.world, alone.sum = 2, lambda ready: ready  # the other rank has none
    alone.agree = lambda decide: decide()
    assert hellaswag.shared(str(own), 4, alone) == []
    assert capsys.readouterr().out.startswith("HellaSwag is skipped: another ")


@pytest.mark.parametrize("world, near", [(3, 540672), (6, 491520), (7, 573440)])
def test_gpus_that_cannot_share_a_step_are_told_a_step_they_can(runtime, world, near):
    runtime.device, runtime.world = torch.device("meta"), world
    with pytest.raises(UserError, match=f"=16\\*1024\\*{world}=.*try {near}"):
        largest_micro_batch(Config(), runtime)


def test_impossible_eval_tokens_and_foreign_ids_leave_no_folder(tiny_run, train):
    for wrong in (dict(eval_tokens=5, eval_interval=4), dict(vocab_size=300)):
        with pytest.raises(UserError):
            train(replace(tiny_run, **wrong))
    assert not (Path(tiny_run.log_dir) / "run").exists()


# ---------------------------------------------------------------- precision


@pytest.mark.slow
def test_two_hundred_steps_end_at_the_loss_of_plain_float32_whatever_is_switched_on(
    tiny_run, tmp_path, train, read_log
):
    data_dir = str(tmp_path / "docs")
    fineweb.prepare(fineweb.Options(source="python-docs", out_dir=data_dir))
    cfg = replace(tiny_run, data_dir=data_dir, vocab_size=50304, block_size=64, warmup_steps=20)
    cfg = replace(cfg, total_batch_size=512, micro_batch_size=8, max_steps=200, eval_interval=200)
    cfg = replace(cfg, eval_tokens=32_768, learning_rate=3e-3)
    bf16 = {"dtype": "bfloat16"}
    switched_on = {
        "plain": {}, "bf16": bf16, "compiled": {"compile_model": True, **bf16},
        "saving": {"gradient_checkpointing": True, "loss_chunks": 4, **bf16},
    }  # fmt: skip
    losses = {}
    for name, keys in switched_on.items():
        run = replace(cfg, run_name=name, **keys)
        train_gpt2.train(run, Runtime("cpu", run.dtype))
        losses[name] = read_log(Path(run.log_dir) / name)["val"][200]
    assert losses["plain"] < 7
    assert all(abs(loss - losses["plain"]) < 0.01 for loss in losses.values()), losses
