"""A run's name and folder, how torchrun finds it again, how it stops, its first words and last."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import hardware
from common import (
    PROJECT,
    UserError,
    check_disk,
    command,
    first_rank,
    lock,
    read_log,
    replacing,
    say,
    to_toml,
)
from fineweb import END_OF_TEXT

RESTARTS = "torchrun.txt"  # in a run's folder: the torchrun that may restart it


def may_restart():
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def restarted(folder):
    """Whether torchrun --max-restarts is restarting this folder's run after a rank died."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    mark = folder / RESTARTS
    return again and mark.exists() and mark.read_text() == os.environ["TORCHELASTIC_RUN_ID"]


def forget_restarts(folder):
    """Delete the mark by which a restart finds its run, unless a process is training here.

    Else torchrun, which starts again what was refused, would have that resume the run.
    """
    if may_restart():
        with contextlib.suppress(OSError), open(folder / "log.txt", "rb+") as log:
            if lock(log):
                (folder / RESTARTS).unlink(missing_ok=True)


def choose_run_name(cfg, default):
    """run_name, or the first free of default, default-2, ... (with resume: the last taken)."""

    def taken(name):
        folder = Path(cfg.log_dir) / name
        # without its log.txt, too: resuming would go on from what another run had left
        return (folder / "log.txt").exists() or bool(checkpoints(folder))

    if not cfg.run_name and may_restart():
        raise UserError("--max-restarts needs a --run_name, by which a restart finds its run")
    if cfg.run_name:
        if taken(cfg.run_name) and not cfg.resume:
            there = Path(cfg.log_dir) / cfg.run_name
            forget_restarts(there)
            raise UserError(f"{there}/ holds a run: add --resume=True, or take another --run_name")
        return cfg.run_name
    names = [default, *(f"{default}-{i}" for i in range(2, 10_000))]
    free = next(i for i, name in enumerate(names) if not taken(name))
    return names[max(0, free - 1) if cfg.resume else free]


def open_log(folder, cfg):
    """log.txt, opened to append, of a folder that is this process's from now on; config.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.txt"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    mode = "a" if cfg.resume else "x"  # of two runs that start at once, one has the name
    try:
        file = open(path, mode, buffering=1, encoding="utf-8", newline="\n")  # noqa: SIM115
    except FileExistsError:
        remedy = "start again with --resume=True or another --run_name"
        raise UserError(f"{folder}/ holds a run by now: {remedy}") from None
    if not lock(file):
        raise UserError(f"{folder}/ is being trained by another process: let that one end first")
    file.write("\n" if torn else "")  # a kill may have left half a line
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()  # left by a kill in the middle of a checkpoint
    try:
        if may_restart():
            (folder / RESTARTS).write_text(os.environ["TORCHELASTIC_RUN_ID"])
        with replacing(folder / "config.toml") as temporary:
            temporary.write_text(to_toml(cfg), encoding="utf-8")
    except OSError:
        file.close()
        if not path.stat().st_size:  # else the same command, tried again, would find a run here
            path.unlink()
        raise
    return file


def batches(folder):
    """{step: tokens per optimizer step from there on} of a run, as common.tokens_at takes it."""
    return read_log(folder / "log.txt").get("batch", {})


def checkpoints(folder):
    """The step_N.pt of a run, oldest first; a user's step_N_good.pt is none of them."""
    steps = {path.stem.removeprefix("step_"): path for path in folder.glob("step_*.pt")}
    numbers = [step for step in steps if step.isascii() and step.isdecimal()]
    return [steps[step] for step in sorted(numbers, key=int)]


def prune(folder, newest, keep):
    """Delete all up to `newest` but the last `keep`; a later step's is torn: resuming passed it."""
    paths = checkpoints(folder)
    for old in paths[: max(0, paths.index(folder / newest) + 1 - keep)]:
        with contextlib.suppress(OSError):  # in use, on Windows: the next time, then
            old.unlink()


@contextlib.contextmanager
def stop_on_signal(save, in_step):
    """Yield a function: has SIGINT or SIGTERM come?

    If no step is under way, the first one saves: an evaluation may take more than the 30 s that
    torchrun waits before it kills. A second one ends the program, unless it comes within 2 s:
    torchrun passes on what came to all. An error because nobody reads the output saves, too.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: False
        return
    asked = []  # when: a list, as a lock might be what another signal interrupts
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number, frame):
        asked.append(time.monotonic())
        if len(asked) == 1:
            stepping = in_step()
            if first_rank():
                what = b"step" if stepping else b"evaluation"
                with contextlib.suppress(OSError):  # print may be what the signal interrupted
                    os.write(2, b"\nstopping after this %b; once more to stop at once\n" % what)
            if not stepping:
                save()
        elif asked[-1] - asked[0] > 2:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    try:
        for number in before:
            signal.signal(number, ask)
        yield lambda: bool(asked)
    except BrokenPipeError:  # Ctrl-C has ended `| tee`, too
        save()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def telling_obstacles(cfg, runtime):
    """Where a device's memory is too little, or torch.compile fails, say what to set."""
    remedy = "halve --micro_batch_size, double grad_accum_steps if set, add --resume=True"
    if cfg.eval_only:
        remedy = "set --micro_batch_size=1, or --device=cpu"
    try:
        with hardware.telling_memory(f"rank {runtime.rank}", remedy):
            yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"torch.compile failed ({reason})\n       set --compile_model=False, and --resume=True "
            "where the run has begun"
        ) from error


def tell_overruled(cfg, architecture):
    """Say which settings of cfg the architecture of init_from's model takes the place of."""
    default = type(cfg)  # what was left at its default was not asked for
    lost = [
        f"{k}={x}"
        for k, x in architecture.items()
        if getattr(cfg, k) not in (x, getattr(default, k))
    ]
    if lost and first_rank():
        say(f"init_from={cfg.init_from} has {', '.join(lost)}, whatever else was set")


def introduce(state, loader, micro_steps, max_steps, runtime):
    """Say on what, with what and how long the run trains; refuse what could only lose its work."""
    model, world, tokens = state.model, runtime.world, loader.G * loader.T
    cfg = model.cfg
    if not cfg.run_name:
        raise UserError("run_name is empty: name the run, whose folder will be below log_dir")
    if state.layout not in (None, loader.layout):
        text = "{:,} tokens of data, {:,} sequences a step"
        was, now = text.format(*state.layout), text.format(*loader.layout)
        runtime.print(f"the batches change from here on: {was} before, {now} now")
    if state.step > max_steps and cfg.max_steps:  # config.toml would tell of a run that never was
        raise UserError(f"max_steps={max_steps} was passed: the run is at step {state.step}")
    folder = Path(cfg.log_dir) / cfg.run_name
    if state.step >= max_steps:
        runtime.print(f"step {state.step} is done: for more set --max_steps above {state.step}")
    else:  # told now, not when the first is due
        runtime.agree(lambda: check_disk(folder, hardware.checkpoint_bytes(model)))
    name = torch.cuda.get_device_name() if runtime.device.type == "cuda" else runtime.device
    parameters = sum(p.numel() for p in model.parameters())
    runtime.print(
        f"run    {folder}/ on {name}, {runtime.dtype}, ranks: {world}, "
        f"{hardware.attention_kernel(cfg, runtime)}\n"
        f"model  {parameters:,} parameters, {model.flops_per_token() / 1e6:,.1f} MFLOP a token\n"
        f"data   {cfg.data_dir}/, {len(loader.shards):,} tokens, {loader.steps_per_epoch():,} "
        "steps an epoch\n"
        f"batch  {tokens:,} tokens a step = {loader.B} sequences x {loader.T} tokens "
        f"x {micro_steps} micro-steps x {world} ranks\n"
        f"steps  {max_steps:,}, {max_steps * tokens:,} tokens"
    )


def diverged(folder, step, skipped, unsaved):
    """The UserError of a run that is given up at `step`, after so many steps were skipped."""
    where = f"{folder}/\n       holds step {step}, from before them"
    older = " (should that fail, too, begin a new run)"  # its weights may be past saving
    if unsaved:
        where = f"Step {step}, from\n       before them, could not be saved"
        older = ""
    elif len(checkpoints(folder)) > 1:
        older = " (should that fail, too, delete that step's file to go on from an older one)"
    return UserError(
        f"{skipped} steps in a row had a non-finite loss or gradient. {where}: lower learning_rate "
        f"or set dtype=float32 or attention=flash, then --resume=True{older}"
    )


def refuse_unsaved(folder, unsaved):
    """A UserError where a run's last checkpoint could not be saved."""
    if unsaved:
        last = checkpoints(folder)
        rest = f"goes on from {last[-1]}" if last else "finds nothing to go on from"
        raise UserError(f"{unsaved} could not be saved, as told above: --resume=True {rest}")


def tell_how_to_continue(folder, step, runtime):
    again = command("train_gpt2.py", folder / "config.toml", "--resume=True")
    runtime.print(f"stopped after step {step}; to continue: {again}")


def finish(folder, cfg, runtime):
    """Draw the run's picture, say what the run left, and what to do with it."""
    if runtime.rank != 0:
        return
    if importlib.util.find_spec("matplotlib"):
        plot = [sys.executable, PROJECT / "plots" / "plot.py", folder]
        subprocess.run([*plot, f"--out={folder / 'loss.png'}"], stdout=subprocess.DEVNULL)
    best, saved = folder / "best.pt", checkpoints(folder)
    model = saved[-1] if saved and not best.exists() else best
    text, twice = cfg.sample_prompt or "Once upon a time", f"{2 * cfg.learning_rate:g}"
    again = f"--run_name={cfg.run_name}-lr{twice}", f"--learning_rate={twice}"
    todo = [command("train_gpt2.py", folder / "config.toml", *again)]
    if cfg.vocab_size > END_OF_TEXT:  # else its ids are of no text that is known here
        look = command("plots/attention.py", f"--model={model}", f"--text={text}")
        todo = [command("sample.py", f"--model={model}", f"--prompt={text}"), look, *todo]
    say(f"wrote {folder}/: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    say("next: ", "\n       ".join(todo))
