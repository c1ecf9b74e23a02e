"""train_gpt2.py in processes that break: how the tests kill a run or spoil its numbers.

    python tests/faults.py '[[["kill", "update", 5]], []]' x.toml --resume=True
    torchrun --nproc_per_node=2 tests/faults.py '[[["kill", "update", 5, 1]]]' x.toml

The first argument lists lives, the rest is the command's. Each life is a process that runs the
whole command; it begins when the one before it has ended, with faults of its own. A fault is
[what, place, n, rank]: do it at the n-th time that this rank (or, left out, each) comes to a place.
["outside", path, bytes, seconds] kills from outside: once path has grown by so much, and a moment.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # which an optimizer imports when it is made: once, not in every life

import fineweb
import runs
import train_gpt2
from common import run
from train_gpt2 import GPT, RunLog

RANK = int(os.environ.get("RANK", 0))


def tell(text):
    """In one piece, so that the lines of two ranks cannot mix."""
    sys.stdout.flush()
    os.write(1, f"{text}\n".encode())


# ---------------------------------------------------------------- what goes wrong


def kill(*args, **kwargs):
    tell(f"killed on rank {RANK}")
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*args, **kwargs):
    tell(f"stopped on rank {RANK}")
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(*args, **kwargs):
    tell(f"asleep on rank {RANK}")
    time.sleep(1e6)


def lack_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")


def spoil_loss(factor):
    """The loss of one micro-step of this step times factor."""

    def spoil(model, state, *args):
        def multiply(module, args, loss):
            hook.remove()
            return loss * factor

        hook = state.model.register_forward_hook(multiply)

    return spoil


def spoil_gradient(factor):
    """The gradient of one weight in one micro-step of this step times factor."""

    def spoil(model, state, *args):
        def multiply(gradient):
            hook.remove()
            return gradient * factor

        hook = state.model.transformer.ln_f.weight.register_hook(multiply)

    return spoil


def digest(model, state, *args):
    """Tell a checksum of weights and moments, to be compared between ranks."""
    told = hashlib.sha256()
    for p in state.model.parameters():
        moments = [state.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")]
        for tensor in (p.detach(), *moments):
            told.update(tensor.numpy().tobytes())
    tell(f"digest {told.hexdigest()} rank {RANK} step {state.step}")


WHAT = {
    "kill": kill, "stop": stop, "sleep": sleep, "out of memory": lack_memory, "digest": digest,
    "loss*nan": spoil_loss(math.nan), "loss*inf": spoil_loss(math.inf),
    "loss*1e4": spoil_loss(1e4), "gradient*nan": spoil_gradient(math.nan),
    "gradient*inf": spoil_gradient(math.inf), "gradient*1e4": spoil_gradient(1e4),
}  # fmt: skip


# ---------------------------------------------------------------- where


def half_written(content, file):
    """The first half of a checkpoint, on the disk."""
    whole = io.BytesIO()
    torch.save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.fsync(file.fileno())


def half_logged(log, step, **values):
    log.file.write(f"{step} {next(iter(values))} 1.2"[:-1])
    log.file.flush()


def renames(ending):
    return lambda source, target: str(target).endswith(ending)


# name: (whose, which function, before or after it, what is done there first, which calls count)
PLACES = {
    "step": (train_gpt2, "train_step", "before", None, None),
    "backward": (torch.Tensor, "backward", "before", None, None),
    "update": (torch.optim.AdamW, "step", "before", None, None),
    "updated": (torch.optim.AdamW, "step", "after", None, None),
    "half a checkpoint": (torch, "save", "before", half_written, None),
    "rename": (os, "replace", "before", None, renames(".pt")),
    "renamed": (os, "replace", "after", None, renames(".pt")),
    "config": (os, "replace", "before", None, renames("config.toml")),
    "half a line": (RunLog, "write", "before", half_logged, None),
    "evaluation": (GPT, "features", "before", None, lambda self, *args: not self.training),
}


def arrange(what, place, n, rank=None):
    """Let it happen at the n-th time that this process comes to the place."""
    if rank not in (None, RANK):
        return
    owner, name, when, first, counts = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        now = (counts is None or counts(*args)) and next(calls) == n
        if now and when == "before":
            if first:
                first(*args, **kwargs)
            WHAT[what](*args, **kwargs)
        result = original(*args, **kwargs)
        if now and when == "after":
            WHAT[what](*args, **kwargs)
        return result

    setattr(owner, name, wrapper)


def kill_from_outside(process, path, grown, seconds):
    """SIGKILL to a process, `seconds` after `path` has grown by `grown` bytes, unless it ends."""
    path = Path(path)

    def size():
        return path.stat().st_size if path.exists() else 0

    enough = size() + grown
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if size() >= enough:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)
        time.sleep(0.0005)
    return ended


# ---------------------------------------------------------------- lives


def live(faults):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # no second time in a new group
        for fault in faults:
            arrange(*fault)
    runs.finish = lambda folder, cfg, runtime: None  # without drawing at the end
    run(train_gpt2.main)


def main():
    lives = json.loads(sys.argv.pop(1))
    fineweb.tokenizer()
    for number, faults in enumerate(lives, 1):
        outside = [fault[1:] for fault in faults if fault[0] == "outside"]
        if len(lives) == 1 and not outside:
            return live(faults)
        # nothing has been computed here yet: a fork is a new process without the imports' second
        if (process := os.fork()) == 0:
            return live([fault for fault in faults if fault[0] != "outside"])
        ended = kill_from_outside(process, *outside[0]) if outside else os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(ended[1])
        tell(f"life {number} ended with {code}")
    sys.exit(code)


if __name__ == "__main__":
    main()
