"""Where else a run can be watched: W&B, TensorBoard, and norms inside the model.

    python train_gpt2.py --wandb_project=gpt2            # WANDB_MODE=offline: only files, for later
    python train_gpt2.py --tensorboard=True              # then: tensorboard --logdir=log

Neither is imported unless its flag is set. A tracker that fails is left out from then on, with one
warning: log.txt has everything, so no run ends or waits for long because a server is away.
"""

import html
import importlib.util
import os
import secrets
import sys
import textwrap
from dataclasses import asdict

import torch

from common import UserError, replacing, say

PACKAGES = {"wandb_project": "wandb", "tensorboard": "tensorboard"}  # flag: what it needs
PATIENCE = {  # W&B's own variables, where the user has not set them: seconds
    "WANDB_LOGIN_TIMEOUT": "60",  # for a key to be typed
    "WANDB_INIT_TIMEOUT": "60",  # for the server, while other ranks wait
    "WANDB_FINISH_TIMEOUT": "600",  # for the last upload; `wandb sync` does what was left
}


def check(cfg):
    """UserError if a tracker is asked for whose package is not installed."""
    for flag, package in PACKAGES.items():
        if getattr(cfg, flag):
            spec = importlib.util.find_spec(package)
            if not (spec and spec.origin):  # without origin it is a mere folder, such as wandb/
                raise UserError(
                    f"{package} is missing: pip install {package}, or leave --{flag} out"
                )


def open_trackers(cfg, folder, step):
    """The trackers that cfg asks for, of the run in `folder`; `step`, the first they will get."""
    kinds = {"wandb_project": Wandb, "tensorboard": TensorBoard}
    return [Tracker(kind, cfg, folder, step) for flag, kind in kinds.items() if getattr(cfg, flag)]


class Tracker:
    """A Wandb or TensorBoard; its first error is printed as a warning and turns it off."""

    def __init__(self, kind, *args):
        self.name = kind.__name__
        self.target = self.attempt(kind, *args)

    def attempt(self, call, *args):
        try:
            return call(*args)
        except Exception as error:  # of any kind: the network's, the service's, the package's own
            why = str(error).partition("\n")[0] or type(error).__name__
            say(f"{self.name} is off: {why}; log.txt has everything")
            self.target = None

    def log(self, step, values):
        """values: {stream: float}"""
        if self.target:
            self.attempt(self.target.log, step, values)

    def text(self, step, name, text):
        if self.target:
            self.attempt(self.target.text, step, name, text)

    def close(self):
        if self.target:
            self.attempt(self.target.close)


class Wandb:
    def __init__(self, cfg, folder, step):
        for name, seconds in PATIENCE.items():
            os.environ.setdefault(name, seconds)
        import wandb

        known = folder / "wandb_id"  # with it a resumed run goes on in the same W&B run
        if not known.exists():
            with replacing(known) as temporary:
                temporary.write_text(secrets.token_hex(8), encoding="utf-8")
        self.html = wandb.Html
        self.run = wandb.init(
            project=cfg.wandb_project,
            name=cfg.wandb_run_name or cfg.run_name,
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=asdict(cfg),
            allow_val_change=True,  # max_steps may be another when a run is resumed
        )
        # A resumed run repeats the steps after its checkpoint. W&B's own step never goes back, it
        # would drop them with a warning each; as a stream of its own, `step` may.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        self.run.log({"step": step, **values})

    def text(self, step, name, text):
        body = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self.run.log({"step": step, name: self.html(body)})

    def close(self):
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))  # 1: W&B shows it as failed


class TensorBoard:
    def __init__(self, cfg, folder, step):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: of steps that a resumed run repeats, TensorBoard shows the new ones only.
        self.writer = SummaryWriter(str(folder), purge_step=step, flush_secs=1)

    def log(self, step, values):
        for stream, value in values.items():
            self.writer.add_scalar(stream, value, step)

    def text(self, step, name, text):
        self.writer.add_text(name, textwrap.indent(text, "    "), step)  # as code: no Markdown

    def close(self):
        self.writer.close()


# ---------------------------------------------------------------- what moves in the model

KINDS = {  # kind of layer: what is in its parameters' names
    "embedding": (".wte.", ".wpe.", "lm_head."),
    "attention": (".attn.",),
    "mlp": (".mlp.",),
    "norm": (".ln_",),
}


class Norms:
    """Norms of gradients, and of a step's change beside the weights', by kind of layer.

    After a step `values` holds norm_embedding, update_embedding and so on, for attention, mlp and
    norm too, and for `other` where an edit has added a new kind. Gradients are those before
    clipping; updates are usually about 1e-3 of the weights.
    """

    def __init__(self, model):
        self.groups, self.values = {kind: [] for kind in (*KINDS, "other")}, {}
        for name, p in model.named_parameters():
            kinds = [kind for kind, parts in KINDS.items() if any(part in name for part in parts)]
            if p.requires_grad:
                self.groups[kinds[0] if kinds else "other"].append(p)
        self.groups = {kind: group for kind, group in self.groups.items() if group}

    def before(self):
        zero = next(iter(self.groups.values()))[0].new_zeros(())  # of what a step left out
        self.gradients = [
            norm(zero if p.grad is None else p.grad for p in group)
            for group in self.groups.values()
        ]
        self.old = [[p.detach().clone() for p in group] for group in self.groups.values()]

    def after(self):
        moved = [
            norm(p.detach() - q for p, q in zip(group, old, strict=True)) / norm(old)
            for group, old in zip(self.groups.values(), self.old, strict=True)
        ]
        names = [f"{what}_{kind}" for what in ("norm", "update") for kind in self.groups]
        values = torch.stack(self.gradients + moved).tolist()  # one wait for the device
        self.values, self.old = dict(zip(names, values, strict=True)), None


def norm(tensors):
    """The 2-norm of all their numbers."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
