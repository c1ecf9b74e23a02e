"""Train GPT-2 (124M) from scratch: model to loop in one file.

    python fineweb.py --source=python-docs               # a small corpus that needs no download
    python train_gpt2.py configs/tiny.toml               # a 7M model on it: minutes on a laptop
    python train_gpt2.py --learning_rate=1.5e-3          # GPT-2 (124M) on FineWeb-Edu, one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py
    python train_gpt2.py log/gpt2/config.toml --resume=True
    python train_gpt2.py --check                         # can it train here, and with what?

Every knob is a field of `Config` below: defaults < TOML files in the order given < --key=value.
To read this file, start at `train` near the end, then go where it leads.
"""

import contextlib
import functools
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Literal

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch: doubles the speed on CPU

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fineweb
import hardware
import hellaswag
import pretrained
import runs
import trackers
from common import (
    UserError,
    check_disk,
    check_types,
    command_line,
    in_short,
    replacing,
    run,
    say,
    tokens_at,
    toml_flags,
)
from fineweb import END_OF_TEXT

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config:
    # model: the defaults are GPT-2 (124M)
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads; GPT-2's head size n_embd / n_head is 64
    n_embd: int = 768  # width of the residual stream, C
    block_size: int = 1024  # longest context, T, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 ids padded to a multiple of 128, for speed
    pos_embedding: Literal["learned", "rope"] = "learned"  # learned: GPT-2; rope: rotary
    rope_theta: float = 10000.0  # base of the rotary frequencies
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"  # gelu (tanh): GPT-2
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # layernorm: GPT-2
    bias: bool = True  # biases in Linear and LayerNorm
    qkv_bias: bool = True  # a bias in the query, key and value projection too
    tie_embeddings: bool = True  # the head is the token embedding transposed
    qk_norm: bool = False  # RMS-normalize queries and keys: steadier at high learning rates
    logit_softcap: float = 0.0  # bound logits to +-cap by tanh; 0 = off
    init_from: str = ""  # gpt2[-medium|-large|-xl], a folder or a .pt: sets all above
    dropout: float = 0.0  # 0 where data is plentiful; 0.1 for many epochs of little text
    # data and batch
    data_dir: str = "edu_fineweb10B"  # folder of token shards (python fineweb.py makes it)
    shuffle: bool = True  # visit the windows of an epoch in random order
    seed: int = 1337  # weights, data order and dropout
    total_batch_size: int = 524_288  # tokens per optimizer step, over all ranks
    micro_batch_size: int = 0  # sequences per forward pass and rank, B; 0 = what fits (CPU: 4)
    grad_accum_steps: int = 0  # micro-steps per optimizer step; > 0 overrides total_batch_size
    # optimizer: the GPT-3 paper's settings
    learning_rate: float = 6e-4  # peak, reached after warmup_steps
    min_lr_ratio: float = 0.1  # the cosine ends at learning_rate * min_lr_ratio
    warmup_steps: int = 715  # linear warm-up: 375M tokens, as GPT-3
    max_steps: int = 0  # optimizer steps; 0 = one epoch of the shards, rounded up
    weight_decay: float = 0.1  # of matrices and embeddings, not of biases and norms
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW; GPT-3's, steadier than 0.999
    grad_clip: float = 1.0  # largest global gradient norm; 0 = off
    # evaluation
    eval_interval: int = 250  # steps between evaluations; 0 = off
    eval_tokens: int = 10_485_760  # validation tokens per evaluation, whatever the batch size
    eval_only: bool = False  # evaluate init_from's model as it is, train and write nothing
    hellaswag_examples: int = 10_042  # tasks per evaluation; 10042 = all, 0 = off
    hellaswag_path: str = ""  # your copy of hellaswag_val.jsonl; "" = download it once
    sample_prompt: str = "Hello, I'm a language model,"  # continued at evaluations; "" = off
    # run
    run_name: str = ""  # folder under log_dir; default: the config's name, then -2, -3, ...
    log_dir: str = "log"  # where runs are kept
    log_interval: int = 10  # steps between console lines; log.txt has every step
    checkpoint_interval: int = 1000  # steps between checkpoints; 0 = only the last
    keep_checkpoints: int = 2  # newest checkpoints to keep, besides best.pt
    wandb_project: str = ""  # also log to this project of W&B; "" = off
    wandb_run_name: str = ""  # the run's name there; "" = run_name
    tensorboard: bool = False  # also write TensorBoard's event files into the run's folder
    log_norms: bool = False  # also log gradient norms and update sizes by kind of layer
    resume: bool = False  # continue from the run's newest checkpoint; if none, start anew
    check: bool = False  # only say what this run would use, and whether it can start
    # system
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"  # SDPA's kernel
    gradient_checkpointing: bool = False  # keep no activations inside blocks: less memory, slower
    loss_chunks: int = 0  # logits exist for one chunk at a time; 0 = chunks of 8,192 tokens
    compile_model: bool = True  # torch.compile: up to minutes at the start, then faster steps
    rank_timeout: int = 600  # seconds that a rank waits for the others before the run ends

    __post_init__ = check_types


# What must agree between a checkpoint and a model; a pretrained model decides all of it.
ARCHITECTURE = list(takewhile(lambda key: key != "init_from", Config.__annotations__))
AT_LEAST_ONE = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "total_batch_size",
    "eval_tokens", "log_interval", "keep_checkpoints", "rank_timeout", "rope_theta"]  # fmt: skip
VOCABULARY = END_OF_TEXT + 1  # ids from here up only pad the matrices
MAX_SKIPPED = 10  # non-finite steps in a row that end a run


def load_config(argv, kind=Config, about=__doc__):
    """`[x.toml ...] [--key=value ...]` -> (a `kind`, default run name); one parser checks both."""
    flags, from_files, name = list(argv), [], "gpt2"
    while flags and not flags[0].startswith("-"):
        path = Path(flags.pop(0))
        from_files += toml_flags(path, kind)
        name = path.stem
    if late := [word for word in flags if word.endswith(".toml") and not word.startswith("-")]:
        raise UserError(f"{late[0]} stands after a --flag: name the TOML files first")
    cfg = command_line(kind, about, from_files + flags)
    validate(cfg)
    return cfg, name


def validate(cfg):
    """Refuse impossible values by name, value and remedy, before anything is touched."""
    for key, value in asdict(cfg).items():
        least, most = int(key in AT_LEAST_ONE), 2**64 if key == "seed" else 2**31
        if isinstance(value, int | float) and not least <= value < most:
            raise UserError(f"{key}={value} must be {least} or more, and below {most}")
        if isinstance(value, str) and value.encode(errors="ignore").decode() != value:
            raise UserError(f"{key}={value!r} must be UTF-8")
    c, hs = cfg, cfg.n_embd // cfg.n_head
    rules = {  # message: whether it applies
        f"n_embd={c.n_embd} is not a multiple of n_head={c.n_head}; try {max(1, hs) * c.n_head}":
            c.n_embd % c.n_head,
        f"pos_embedding=rope turns pairs, but n_embd/n_head={hs} is odd; try another n_head":
            c.pos_embedding == "rope" and hs % 2,
        f"dropout={c.dropout}, beta1={c.beta1} and beta2={c.beta2} must be below 1":
            max(c.dropout, c.beta1, c.beta2) >= 1,
        f"vocab_size={c.vocab_size} is more than the 65536 ids that uint16 shards can hold":
            c.vocab_size > 65_536,
        f"vocab_size={c.vocab_size} is not GPT-2's, and so there is no text to score or to sample; "
        "try --hellaswag_examples=0 --sample_prompt=":
            c.vocab_size < VOCABULARY and (c.hellaswag_examples or c.sample_prompt),
        "eval_only=True needs a model; try --init_from=gpt2": c.eval_only and not c.init_from,
        "check=True is for a run that trains; try without eval_only": c.check and c.eval_only,
        f"run_name={c.run_name!r} must be a single folder name; its place is set by log_dir":
            Path(c.run_name).name != c.run_name or c.run_name == ".." or "\0" in c.run_name,
    }  # fmt: skip
    if wrong := [message for message, applies in rules.items() if applies]:
        raise UserError(wrong[0])


def batch_layout(cfg, world, B):
    """(Micro-steps, sequences G) per optimizer step, for B sequences per micro-step and rank."""
    T, tokens = cfg.block_size, B * cfg.block_size * world
    if not cfg.grad_accum_steps and cfg.total_batch_size % tokens:
        near = max(1, round(cfg.total_batch_size / tokens)) * tokens
        raise UserError(
            f"total_batch_size={cfg.total_batch_size} is not a multiple of "
            f"micro_batch_size*block_size*world={B}*{T}*{world}={tokens}; try {near}"
        )
    micro_steps = cfg.grad_accum_steps or cfg.total_batch_size // tokens
    return micro_steps, micro_steps * B * world


# ---------------------------------------------------------------- runtime


class Runtime:
    """Rank, world, device and precision, resolved once; the same calls work at world size 1."""

    def __init__(self, device="auto", dtype="auto", timeout=600):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = hardware.find_device(device, self.print)
        self.dtype = hardware.find_dtype(dtype, self.device, self.print)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
            # dtype=float32 means just that; otherwise the products left in float32 may use TF32
            torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
        hardware.prepare_memory(self.device)
        self.synchronize = torch.cuda.synchronize if cuda else lambda: None
        self.peak_memory = torch.cuda.max_memory_allocated if cuda else lambda: 0  # bytes
        if self.world > 1:
            nccl = cuda and dist.is_nccl_available()  # not on Windows
            how = {"backend": "nccl", "device_id": self.device} if nccl else {"backend": "gloo"}
            wait = timedelta(seconds=timeout)
            store, rank, world = next(dist.rendezvous("env://", timeout=wait))
            # keys of each restart's own: torchrun's store still has the addresses of the last one's
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(store=store, rank=rank, world_size=world, timeout=wait, **how)
            if self.dtype != self.agree(lambda: self.dtype):  # float16's gradients are scaled
                raise UserError(f"rank {self.rank}'s GPU is not like rank 0's: set --dtype=float16")

    def autocast(self):
        """Context in which matrix products run in `dtype`; weights stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def print(self, *args):
        if self.rank == 0:
            say(*args)

    def sum(self, tensor):
        """Sum over ranks. (SUM and divide, never AVG: gloo has none.)"""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def all(self, true):
        """Whether it is true on every rank."""
        return self.sum(torch.tensor(float(true))).item() == self.world

    def agree(self, decide):
        """Call decide() on rank 0; return its result, or raise its UserError, on every rank."""
        box = [None]
        if self.rank == 0:
            try:
                box = [decide()]
            except UserError as error:
                box = [error]
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def parallel(self, model, B, T):
        """Average gradients over ranks in the backward pass (DDP), for batches (B, T)."""
        if self.world == 1:
            return model
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        # compiled before wrapping, it is one graph, and reductions could only start at its end
        torch.compiler.reset()
        # DDP fixes its bucket order after a first pass; without it a resumed run sums differently
        idx = torch.zeros(B, T + 1, dtype=torch.long, device=self.device)
        with self.autocast():  # strides like a batch's, so that this compiles all that steps need
            model(idx[:, :-1], idx[:, 1:]).backward()
        model.zero_grad(set_to_none=True)
        return model

    def compile(self, model):
        """torch.compile where it works, the model itself where it does not."""
        if obstacle := hardware.compile_obstacle(self.device):
            self.print(f"compile_model is off: {obstacle}")
            return model
        self.print("compiling: the first step takes longer")
        return torch.compile(model, dynamic=False)

    def close(self):
        # after an error on one rank NCCL would wait here for the others, which wait for this one
        if self.world > 1 and not (sys.exc_info()[0] and self.device.type == "cuda"):
            dist.destroy_process_group()


# ---------------------------------------------------------------- model


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))  # torch warns where they differ


def make_norm(cfg):
    rms = cfg.norm == "rmsnorm"
    return RMSNorm(cfg.n_embd, eps=1e-5) if rms else nn.LayerNorm(cfg.n_embd, bias=cfg.bias)


def rope_table(cfg):
    """cos and sin of position * theta^(-2i/hs), (2, T, hs/2) (RoFormer, arXiv 2104.09864)."""
    hs = cfg.n_embd // cfg.n_head
    power = torch.arange(0, hs, 2, dtype=torch.float32) / hs
    frequency = 1.0 / cfg.rope_theta**power  # rounded as in transformers
    angle = torch.outer(torch.arange(cfg.block_size, dtype=torch.float32), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def apply_rope(x, rope):
    """Turn the pairs (x[i], x[i + hs/2]) of x (B, nh, T, hs) by their position's angle."""
    cos, sin = rope  # (..., 1, T, hs/2) each
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, cfg.n_head, cfg.dropout
        self.qk_norm = cfg.qk_norm
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias and cfg.qkv_bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def qkv(self, x, rope):
        """x (B, T, C) -> queries, keys, values (B, nh, T, hs), as the attention uses them."""
        B, T, C = x.shape
        parts = self.c_attn(x).split(C, dim=2)  # its backward is one concatenation
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def forward(self, x, rope, mask=None, cache=None):
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            q = q.contiguous()  # torch 2.11 ignores the stride of the batch on MPS
            k, v = cache.extend(self.layer, mask.size(-1), k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, nh, T, hs) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.c_proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.relu2 = cfg.mlp == "relu2"

    def forward(self, x):
        x = self.c_fc(x)
        x = F.relu(x).square() if self.relu2 else F.gelu(x, approximate="tanh")
        return self.c_proj(x)


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202), 8/3 C wide rounded up to 64, so that it costs what MLP does."""

    def __init__(self, cfg):
        super().__init__()
        width = math.ceil(8 * cfg.n_embd / 3 / 64) * 64
        self.c_gate = nn.Linear(cfg.n_embd, width, bias=cfg.bias)
        self.c_fc = nn.Linear(cfg.n_embd, width, bias=cfg.bias)
        self.c_proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.ln_1 = make_norm(cfg)
        self.attn = CausalSelfAttention(cfg, layer)
        self.ln_2 = make_norm(cfg)
        self.mlp = SwiGLU(cfg) if cfg.mlp == "swiglu" else MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), rope, mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


def overwrite_with_gradient(logits, targets, cap):
    """Summed cross-entropy of logits (n, V), soft-capped by cap; its gradient overwrites them."""
    rows, loss = len(logits), 0.0  # compiled, one kernel does all rows
    if not torch.compiler.is_compiling():  # else as many at a time as fit a cache
        rows = (2**21 if logits.device.type == "cpu" else 2**26) // logits.size(1) + 1
    for part, target in zip(logits.split(rows), targets[:, None].split(rows), strict=True):
        z = part.float()
        if cap:
            z = cap * torch.tanh(z / cap)
        d = z.softmax(-1)  # logsumexp(z) = max z - log max d: no second pass of exponentials
        nll = (z.amax(-1, keepdim=True) - z.gather(1, target)) - d.amax(-1, keepdim=True).log()
        d_target = torch.expm1(-nll)  # softmax minus one-hot
        if cap:
            slope = 1 - (z / cap) ** 2  # of the soft cap
            d, d_target = d * slope, d_target * slope.gather(1, target)
        part.copy_(d).scatter_(1, target, d_target.to(part.dtype))
        loss = loss + nll.sum()
    return loss


class HeadLoss(torch.autograd.Function):
    """Features x (n, C), head (V, C), targets (n,) -> mean cross-entropy in nats.

    The forward pass computes the gradients, too, so that it keeps neither logits nor softmax, and
    with chunks > 1 they never exist whole. Liger-Kernel does so in Triton (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, head, targets, cap, chunks):
        low = hardware.product_dtype(x)
        w, loss, dx, dw = head.to(low), 0.0, [], None
        ctx.scale = 2**-6 if low == torch.float16 else 1  # dw sums all rows: beyond float16's range
        for h, t in zip(x.to(low).chunk(chunks), targets.chunk(chunks), strict=True):
            d = h @ w.t()
            loss = loss + overwrite_with_gradient(d, t, cap)
            if any(ctx.needs_input_grad):
                dx.append((d @ w).to(x.dtype))
                part = d.t() @ (h * ctx.scale)
                dw = part.to(head.dtype) if dw is None else dw.add_(part)
        if dx:
            ctx.save_for_backward(dx[0] if len(dx) == 1 else torch.cat(dx), dw)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        grad = grad / len(dx)
        return dx * grad, dw * (grad / ctx.scale), None, None, None


class GPT(nn.Module):
    """The GPT-2 decoder with OpenAI's parameter names; `cfg` chooses its variants once, here."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.pos_embedding == "learned":
            self.transformer.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        else:
            self.register_buffer("rope", rope_table(cfg), persistent=False)
        self.transformer.drop = nn.Dropout(cfg.dropout)
        self.transformer.h = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.transformer.ln_f = make_norm(cfg)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Each matrix N(0, 0.02), 1/sqrt(2 n_layer) of that where a block ends; biases 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def features(self, idx, position=None, mask=None, cache=None):
        """Token ids (B, T) -> the final norm's output (B, T, C).

        position (T,) or (B, T): where the tokens stand, by default 0 to T - 1. mask (T, keys) or
        (B, 1, T, keys): True where a token sees a key, by default the causal one. With a cache,
        position (T,) and mask are given, and the keys are the first that it holds.
        """
        assert position is not None or idx.size(1) <= self.cfg.block_size, "more than block_size"
        if cache is not None:
            cache.position = position
        x, rope = self.transformer.wte(idx), None
        at = slice(idx.size(1)) if position is None else position
        if self.cfg.pos_embedding == "learned":
            x = x + self.transformer.wpe.weight[at]
        else:
            rope = self.rope[:, at].unsqueeze(-3)
        if self.training and hardware.product_dtype(x) == torch.bfloat16:
            x = x.bfloat16()  # the residual stream too, as in llm.c: half its memory traffic
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.cfg.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Features (..., C) -> logits (..., vocab_size); the loss makes its own, in HeadLoss."""
        logits, cap = self.lm_head(x), self.cfg.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def text_logits(self, x):
        """The same, but -inf for ids that only pad the matrices: never sampled, never scored."""
        logits = self.logits(x)
        logits[..., VOCABULARY:] = -math.inf
        return logits

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, vocab_size); with targets (B, T), the mean loss in nats."""
        x, c = self.features(idx), self.cfg
        if targets is None:
            return self.logits(x)
        head, chunks = self.lm_head.weight, c.loss_chunks or math.ceil(idx.numel() / 8192)
        head = head if torch.is_grad_enabled() else head.detach()  # HeadLoss does not see no_grad
        return HeadLoss.apply(x.flatten(0, 1), head, targets.flatten(), c.logit_softcap, chunks)

    def generate(self, prompt, max_new_tokens=64, seed=1337, **how):
        """The text that follows a prompt; `how` as in Sampling, such as temperature=0."""
        return complete(self, prompt, Sampling(**how), 1, max_new_tokens, seed)[0]

    def flops_per_token(self):
        """Training FLOPs a token: 6 a weight, plus attention's two products (PaLM, appendix B)."""
        c, multiply = self.cfg, (self.transformer.h, self.transformer.ln_f, self.lm_head)
        weights = sum(p.numel() for part in multiply for p in part.parameters())
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_checkpoint(cls, path):
        """The model of a checkpoint that `train` wrote, in evaluation mode, on the CPU."""
        cfg, saved = read_checkpoint(path)
        model = cls(cfg)
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:  # saved before this file was edited, or foreign
            raise UserError(f"{path} does not fit ({in_short(error, 1000)})") from None
        return model.eval()

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's gpt2[-medium|-large|-xl], or a GPT-2 or Llama on Hugging Face or in a folder."""
        sizes, weights = pretrained.read(name)
        model = cls(Config(**sizes))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise pretrained.unreadable(name, error) from None
        return model.eval()


def load_model(name, device="cpu"):
    """A checkpoint (.pt), or what GPT.from_pretrained takes -> GPT in evaluation mode."""
    model = GPT.from_checkpoint(name) if str(name).endswith(".pt") else GPT.from_pretrained(name)
    return model.to(device)


# ---------------------------------------------------------------- generation


class KVCache:
    """Keys and values of the tokens seen so far, so that each new token costs one position."""

    def __init__(self, size):
        self.size, self.layers = size, {}
        self.position = None  # (T,), where new tokens go: GPT.features sets it

    def extend(self, layer, keys, *new):
        """Put k, v (B, nh, T, hs) at `position`; return the layer's first (B, nh, keys, hs)."""
        if layer not in self.layers:
            B, nh, _, hs = new[0].shape
            self.layers[layer] = [x.new_zeros(B, nh, self.size, hs) for x in new]
        for held, x in zip(self.layers[layer], new, strict=True):
            held.index_copy_(2, self.position, x)
        return [held[:, :, :keys] for held in self.layers[layer]]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # below 1 likelier tokens get likelier still; 0 is greedy
    top_k: int = 0  # draw from the k likeliest tokens; 0 = all
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities reach p; 1 = all
    repetition_penalty: float = 1.0  # above 1 seen tokens get less likely (CTRL, arXiv 1909.05858)

    def __post_init__(self):
        rules = {  # field: whether a value is right, what it must be
            "temperature": (lambda x: 0 <= x < math.inf, "0 or more; 0 is greedy"),
            "top_k": (lambda x: x >= 0, "0 or more; 0 draws from all tokens"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1; 1 draws from all tokens"),
            "repetition_penalty": (lambda x: 0.01 <= x < math.inf, "0.01 or more; 1 is off"),
        }
        for key, value in asdict(self).items():
            right, expected = rules[key]
            if not right(value):
                raise UserError(f"{key}={value} is not possible: it must be {expected}")


def sample_token(logits, seen, how, generator):
    """logits (B, V) and the ids seen so far (B, T) -> one id a row (B, 1)."""
    logits = logits.float()
    if how.repetition_penalty != 1.0:
        score, penalty = logits.gather(1, seen), how.repetition_penalty
        less = torch.where(score < 0, score * penalty, score / penalty)
        logits = logits.scatter(1, seen, less)
    if how.temperature < 1e-6:  # greedy; dividing by so little would overflow
        return logits.argmax(-1, keepdim=True)
    logits, V = logits / how.temperature, logits.size(-1)
    ids = None  # of the columns, once these are sorted by likelihood
    if how.top_k:
        logits, ids = logits.topk(min(how.top_k, V))
    probs = logits.softmax(-1)
    if how.top_p < 1.0:
        if not how.top_k:
            probs, ids = probs.topk(min(1024, V))  # sorting all takes longer
            if probs.sum(-1).min() < how.top_p:
                probs, ids = logits.softmax(-1).sort(descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= how.top_p, 0.0)
    # as torch.multinomial draws, without its checks of probs, which wait for a GPU twice
    winner = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1, True)
    return winner if ids is None else ids.gather(1, winner)


def next_logits(model, idx, position, mask, cache):
    """Logits (B, vocab_size) after the last of idx (B, T), which stand at `position` (T,)."""
    return model.text_logits(model.features(idx, position, mask, cache)[:, -1])


@torch.no_grad()
def generate(model, idx, max_new_tokens, how, generator=None, step=next_logits):
    """Continue idx (B, T) on its device; yield the next ids (B, 1), one step at a time.

    A row that has ended goes on yielding <|endoftext|>; once all have, generation stops. When the
    context is full, its later half is read again and continued.
    """
    block_size, start, new = model.cfg.block_size, 0, idx[:, -model.cfg.block_size :]
    cache = KVCache(min(block_size, -(-(idx.size(1) + max_new_tokens) // 64) * 64))
    keys = torch.arange(cache.size, device=idx.device)
    ended = torch.zeros_like(idx[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        if start + new.size(1) > cache.size:
            start, new = 0, idx[:, -(block_size // 2 + 1) :]
        position = keys[start : start + new.size(1)]
        start += new.size(1)
        mask = keys[: -(-start // 64) * 64] <= position[:, None]  # few shapes, and few idle keys
        new = sample_token(step(model, new, position, mask, cache), idx, how, generator)
        new = new.masked_fill(ended, END_OF_TEXT)
        yield new
        idx, ended = torch.cat((idx, new), dim=1), ended | (new == END_OF_TEXT)
        if ended.all():
            return


def complete(model, prompt, how, num_samples=1, max_new_tokens=64, seed=1337, step=next_logits):
    """`num_samples` continuations of a prompt, as text, without the prompt."""
    device, tokenizer = next(model.parameters()).device, fineweb.tokenizer()
    tokens = tokenizer.encode_ordinary(prompt) or [END_OF_TEXT]
    idx = torch.tensor(tokens, device=device).repeat(num_samples, 1)
    generator = torch.Generator(device).manual_seed(seed)
    made = generate(model, idx, max_new_tokens, how, generator, step)
    new = torch.cat([idx[:, :0], *made], dim=1)
    return [tokenizer.decode([t for t in row if t != END_OF_TEXT]) for row in new.tolist()]


# ---------------------------------------------------------------- optimizer


def make_optimizer(model, cfg):
    """AdamW, with weight decay on matrices and embeddings (2-D) alone; `train_step` sets the lr."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, cfg.learning_rate, (cfg.beta1, cfg.beta2), fused=fused)


def lr_at(step, cfg, max_steps):
    """Linear warm-up to learning_rate, then a cosine down to learning_rate * min_lr_ratio."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = min(1.0, (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


# ---------------------------------------------------------------- data


class TokenShards:
    """The shards of one split as one stream of N tokens; at most 64 at a time are memory-mapped."""

    def __init__(self, data_dir, split):
        self.paths = fineweb.find_shards(data_dir, split)
        self.open = functools.lru_cache(64)(functools.partial(fineweb.open_shard, scattered=True))
        self.ends = np.cumsum([len(fineweb.open_shard(path)) for path in self.paths])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, length):
        """Tokens [start, start + length) of the stream, across shard borders, uint16."""
        parts, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while length > 0:
            shard = self.open(self.paths[i])
            first = start - int(self.ends[i]) + len(shard)
            parts.append(shard[first : first + length])
            start, length, i = start + len(parts[-1]), length - len(parts[-1]), i + 1
        return np.concatenate(parts)

    def windows(self, starts, cfg):
        """The windows of T + 1 tokens from each of starts, int64 (len(starts), T + 1)."""
        tokens = np.stack([self.read(int(start), cfg.block_size + 1) for start in starts])
        if tokens.max() >= cfg.vocab_size:  # on a GPU it would end in a device assert
            raise UserError(
                f"{cfg.data_dir}/ holds token id {tokens.max()}, vocab_size={cfg.vocab_size} is "
                "too small: shards and config are for different tokenizers"
            )
        return torch.from_numpy(tokens.astype(np.int64))


def random_words(*entropy, n):
    """n uint64 that depend on nothing but these integers."""
    return np.random.SeedSequence(entropy).generate_state(n, np.uint64)


def shuffled(index, n, keys):
    """Where a random permutation of range(n) puts each index, as uint64, without a table.

    A Feistel network permutes the next power of four; what falls outside range(n) walks on along
    its cycle until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)

    def permute(x):
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << half | right

    x = permute(np.asarray(index, dtype=np.uint64))
    while (outside := x >= n).any():
        x[outside] = permute(x[outside])
    return x


class Loader:
    """The batch of a step as a pure function of (seed, step): nothing to save, any step at once.

    An epoch is n = (N - 1) // T windows of T + 1 tokens, in an order and from an offset of its own.
    Sequences are numbered through all epochs; step s takes [sG, (s + 1)G) of them:

        step s:   | micro 0: rank 0 | micro 0: rank 1 | micro 1: rank 0 | micro 1: rank 1 |
                  sG                +B                +2B               +3B         (s + 1)G

    So any world size and micro-batch see the same G sequences a step.
    """

    def __init__(self, shards, cfg, runtime, B, G):
        self.shards, self.cfg, self.runtime = shards, cfg, runtime
        self.B, self.G, self.T = B, G, cfg.block_size
        self.n = (len(shards) - 1) // self.T
        self.layout = [len(shards), G]  # with the seed they decide the batches
        if self.n < 1:
            raise UserError(f"block_size={self.T}, but {cfg.data_dir}/ has {len(shards)} tokens")

    def steps_per_epoch(self):
        return math.ceil(self.n / self.G)

    def starts(self, first, length):
        """First token of each of the sequences [first, first + length)."""
        epoch, place = np.divmod(np.arange(first, first + length), self.n)
        if not self.cfg.shuffle:
            return place * self.T
        starts, spare = np.empty_like(place), (len(self.shards) - 1) % self.T
        for e in np.unique(epoch):
            offset, *keys = random_words(self.cfg.seed, int(e), n=7)
            here = epoch == e
            starts[here] = shuffled(place[here], self.n, keys) * self.T + int(offset) % (spare + 1)
        return starts

    def batch(self, step, micro):
        """This rank's tokens (B, T + 1), int64, on the CPU; pinned for CUDA."""
        first = step * self.G + (micro * self.runtime.world + self.runtime.rank) * self.B
        tokens = self.shards.windows(self.starts(first, self.B), self.cfg)
        return tokens.pin_memory() if self.runtime.device.type == "cuda" else tokens

    def stream(self, step, micro_steps):
        """Yield (inputs, targets) (B, T) on the device, from `step` on; a thread prefetches."""
        todo = ((s, micro) for s in count(step) for micro in range(micro_steps))
        with ThreadPoolExecutor(1, "loader") as pool:
            ahead = deque(pool.submit(self.batch, *at) for at in islice(todo, 4))
            while True:
                tokens = ahead.popleft().result()
                # only pinned memory is sure to outlive a non-blocking copy
                tokens = tokens.to(self.runtime.device, non_blocking=tokens.is_pinned())
                ahead.append(pool.submit(self.batch, *next(todo)))
                yield tokens[:, :-1], tokens[:, 1:]


# ---------------------------------------------------------------- evaluation


@contextlib.contextmanager
def evaluating(model, runtime):
    """No gradients, no dropout, training's precision. (inference_mode has no cache of casts.)"""
    was = model.training
    model.eval()
    with torch.no_grad(), runtime.autocast(), hardware.without_cudnn_attention():
        yield
    model.train(was)


def validation_windows(cfg, shards):
    if (n := min(cfg.eval_tokens, len(shards) - 1)) < cfg.block_size:
        found = f"{len(shards)} in {cfg.data_dir}/, eval_tokens={cfg.eval_tokens}"
        raise UserError(f"validation tokens: {found}, but block_size={cfg.block_size} needs more")
    return n // cfg.block_size


def evaluate_loss(model, shards, cfg, runtime, rows):
    """Mean loss (nats a token) over the first eval_tokens of the validation split, on all ranks.

    The same windows whatever the batch and the world; `rows`, windows a pass, sets memory alone.
    """
    n = validation_windows(cfg, shards)
    starts = range(0, n * cfg.block_size, cfg.block_size)[runtime.rank :: runtime.world]
    parts = [starts[i : i + rows] for i in range(0, len(starts), rows)]
    total, hidden = torch.zeros(1, dtype=torch.float64), runtime.rank > 0 or None  # None: if no tty
    with evaluating(model, runtime):
        for part in tqdm(parts, "validation", delay=5, leave=False, disable=hidden):
            tokens = shards.windows(part, cfg).to(runtime.device)
            total += model(tokens[:, :-1], tokens[:, 1:]).item() * len(tokens)
    return runtime.sum(total).item() / n


# ---------------------------------------------------------------- checkpoints


@dataclass
class TrainState:
    """All that a run carries from step to step; the loader and the generators carry nothing."""

    model: GPT  # neither compiled nor wrapped: its keys are the checkpoint's
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation loss so far
    layout: list | None = None  # the Loader's, when the checkpoint was written


def read_checkpoint(path, whole=False):
    """(Config, the dict on the CPU); weights_only runs no code. `whole`: fit to resume from."""
    needs = {"config", "model"} | ({"optimizer", "scaler", "step", "best"} if whole else set())
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if lacks := needs - saved.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        return Config(**saved["config"]), saved
    except Exception as error:  # torn and foreign files meet torch's unpickler in many ways
        raise UserError(f"{path} is not a readable checkpoint ({in_short(error, 90)})") from None


def load_moments(optimizer, saved):
    """Take the moments from a file; what the config decides, the hyperparameters, stay."""
    groups, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    moments = {i: x["exp_avg"].shape for i, x in saved["state"].items() if "exp_avg" in x}
    same = [group["params"] for group in groups] == [group["params"] for group in theirs]
    if not same or not moments.items() <= shapes.items():
        raise ValueError("its optimizer has parameters of other shapes, groups or order")
    for group, old in zip(groups, theirs, strict=True):
        group["lr"] = old["lr"]  # the last step's, should no other step follow
    optimizer.load_state_dict(saved | {"param_groups": groups})


def resume(folder, state, runtime):
    """Continue from the newest whole checkpoint in folder, if there is one."""
    paths = runs.checkpoints(folder)
    for path in reversed(paths):
        try:
            old, saved = read_checkpoint(path, whole=True)
            break
        except UserError as error:
            runtime.print(f"{error}; going back to the one before")
    else:
        if paths:
            raise UserError(f"{folder}/ holds no whole checkpoint: take another run_name")
        return runtime.print(f"no checkpoint in {folder}/ yet: starting from the beginning")
    was, now = asdict(old), asdict(state.model.cfg)
    differ = {k: f"{k}={was[k]}, now {now[k]}" for k in now if was[k] != now[k]}
    if fixed := [differ[key] for key in ARCHITECTURE if key in differ]:
        raise UserError(f"{path} has {'; '.join(fixed)}: not to be changed within a run")
    try:
        state.model.load_state_dict(saved["model"])
        load_moments(state.optimizer, saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit ({in_short(error, 1000)})") from None
    if saved["scaler"]:  # empty where the run so far had no float16
        state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best, state.layout = saved["step"], saved["best"], saved.get("layout")
    if differ.keys() & {"data_dir", "eval_tokens"}:
        state.best = math.inf  # a loss on other tokens
    runtime.print(f"continuing {path}: step {state.step}")
    if changed := [differ[key] for key in differ if key not in ("check", "resume", "run_name")]:
        runtime.print(f"changed: {'; '.join(changed)}")


# ---------------------------------------------------------------- the run's folder


class RunLog:
    """log/<run_name>: config.toml, and log.txt with a line `step stream value` for every number.

    Append-only; common.read_log leaves out what a restart repeats. Rank 0 alone writes.
    """

    def __init__(self, folder, model, runtime, tokens, max_steps, start):
        self.folder, self.model, self.runtime, self.file = folder, model, runtime, None
        self.tokens, self.start, self.max_steps = tokens, start, max_steps  # tokens of a step
        self.batch = {start: tokens}
        self.trackers, self.unsaved = [], ""  # a checkpoint's name, if the newest is not saved
        if runtime.rank != 0 or model.cfg.eval_only:
            return
        self.file = runs.open_log(folder, model.cfg)
        if model.cfg.resume:
            self.write(start, resumed=1)  # what a run had logged beyond it counts no more
        self.trackers = trackers.open_trackers(model.cfg, folder, start)
        self.batch = runs.batches(folder)
        if [*self.batch.values()][-1:] != [tokens]:
            self.batch[start] = tokens
            self.write(start, batch=tokens)

    def write(self, step, **values):
        if self.file:
            try:
                self.file.write("".join(f"{step} {key} {x!r}\n" for key, x in values.items()))
            except OSError as error:  # a full disk, above all
                if due(step, self.model.cfg.log_interval, last=False):
                    self.runtime.print(f"log.txt may lack step {step}: {error}")
        for tracker in self.trackers:
            tracker.log(step, values)

    def text(self, step, name, text):
        self.runtime.print("  >", *text.split())
        for tracker in self.trackers:
            tracker.text(step, name, text)

    def step(self, step, loss, lr, norm, dt, **more):
        """Each step to log.txt, some to the console; the first compiles and tells no ETA."""
        tps, runtime = self.tokens / dt, self.runtime
        self.write(step, train=loss, lr=lr, norm=norm, tps=tps, **more)
        left = self.max_steps - step - 1
        if not due(step, self.model.cfg.log_interval, last=left == 0):
            return
        line = f"step {step:5d}/{self.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f}"
        seen = tokens_at(step + 1, self.batch)
        line += f" | dt {1000 * dt:.0f} ms | {tps:,.0f} tok/s | {seen:,.0f} tokens"
        if peak := hardware.peak_flops(runtime.device, runtime.dtype):
            line += f" | mfu {self.model.flops_per_token() * tps / runtime.world / peak:.1%}"
        if memory := runtime.peak_memory():
            line += f" | {memory / 2**30:.1f} GiB"
        eta = timedelta(seconds=round(left * dt)) if step > self.start else "..."
        runtime.print(f"{line} | eta {eta}")

    def save(self, state, prune=True):
        """Write step_{step}.pt, all that resuming needs; keep the newest keep_checkpoints."""
        more = {"optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
        more["layout"] = state.layout
        name = f"step_{state.step:06d}.pt"
        saved = self.write_checkpoint(name, state, more)
        self.unsaved = "" if saved or not self.file else name
        if saved and prune:
            runs.prune(self.folder, name, self.model.cfg.keep_checkpoints)

    def write_checkpoint(self, name, state, more):
        """Weights, config, step, best loss and `more`, whole or not at all -> is it written?"""
        if not self.file:
            return False
        content = {"model": state.model.state_dict(), "config": asdict(state.model.cfg)}
        content |= {"step": state.step, "best": state.best} | more
        size = hardware.checkpoint_bytes(state.model)
        try:
            check_disk(self.folder, size if more else size // 3)  # best.pt has no moments
            with replacing(self.folder / name) as temporary, open(temporary, "wb") as file:
                torch.save(content, file)
        except (UserError, OSError, RuntimeError) as error:
            # torch.save may hide what the disk said behind an error of its own
            why = error if isinstance(error, OSError) else error.__context__ or error
            self.runtime.print(f"{name} is not saved: {why}")
            return False
        return True

    def close(self):
        for tracker in self.trackers:
            tracker.close()
        if self.file:
            with contextlib.suppress(OSError):  # what could not be written was told
                self.file.close()


def due(step, interval, last):
    """Every `interval` steps and at the end; 0 is off."""
    return interval > 0 and (last or step % interval == 0)


# ---------------------------------------------------------------- training


def largest_micro_batch(cfg, runtime):
    """The largest power of two, up to 64 (CPU: 4), that divides a rank's share of a step."""
    cpu, tokens = runtime.device.type == "cpu", cfg.block_size * runtime.world
    most = 4 if cpu else 64  # short of memory, Linux kills the process: nothing could be caught
    if cfg.grad_accum_steps:
        return most
    if cfg.total_batch_size % tokens:
        batch_layout(cfg, runtime.world, min(most, 16))  # raises: not even B=1 divides it
    return math.gcd(most, cfg.total_batch_size // tokens)


def train_step(model, state, batches, micro_steps, lr, runtime, stop=False, norms=None):
    """One optimizer step -> (mean loss, gradient norm before clipping, whether any rank must stop).

    A non-finite loss or norm skips the update on every rank. `norms` records norms by layer kind.
    """
    cfg = state.model.cfg
    torch.manual_seed(int(random_words(cfg.seed, state.step, runtime.rank, n=1)[0]))  # dropout's
    loss = 0.0
    for micro in range(micro_steps):
        inputs, targets = next(batches)
        model.require_backward_grad_sync = micro == micro_steps - 1  # DDP reads it in forward
        with runtime.autocast():
            part = model(inputs, targets) / micro_steps
        state.scaler.scale(part).backward()
        loss = loss + part.detach()
    state.scaler.unscale_(state.optimizer)
    if norms:
        norms.before()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf)
    # the step's one wait for the device, and its one small reduction
    sums = runtime.sum(torch.stack((loss, norm, loss.new_full((), float(stop)))))
    loss, norm, stops = (sums / runtime.world).tolist()
    if math.isfinite(loss) and math.isfinite(norm):
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.scaler.step(state.optimizer)
    if norms:
        norms.after()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss, norm, stops > 0


def evaluate(state, val_shards, rows, log, runtime):
    """Validation loss, HellaSwag and samples at state.step; the best loss so far writes best.pt."""
    model, cfg, label = state.model, state.model.cfg, f"step {state.step:5d}"
    with evaluating(model, runtime):
        loss = evaluate_loss(model, val_shards, cfg, runtime, rows)
        log.write(state.step, val=loss)
        runtime.print(f"{label} | val loss {loss:.4f} | perplexity {math.exp(min(loss, 99)):.2f}")
        if state.step == 0 and not cfg.init_from:
            return  # an untrained model: its loss is a check, the rest would be noise
        if loss < state.best and log.write_checkpoint("best.pt", replace(state, best=loss), {}):
            state.best = loss
        if tasks := hellaswag.shared(cfg.hellaswag_path, cfg.hellaswag_examples, runtime):
            scores = hellaswag.score(model, tasks, runtime)
            log.write(state.step, hella=scores["acc_norm"])
            result = "acc_norm {acc_norm:.4f} +- {acc_norm_stderr:.4f} | acc {acc:.4f}"
            runtime.print(f"{label} | HellaSwag {result.format(**scores)}")
        if cfg.sample_prompt and runtime.rank == 0:
            for i, text in enumerate(complete(model, cfg.sample_prompt, Sampling(top_k=50), 2, 48)):
                log.text(state.step, f"sample_{i}", f"{cfg.sample_prompt}{text}")


def initial_model(cfg, begun=None):
    """A GPT drawn from the seed, or init_from's weights and architecture with the rest of cfg.

    A run that goes on has its architecture in `begun`, its config.toml; resume() loads the weights.
    """
    torch.manual_seed(cfg.seed)
    if not cfg.init_from:
        return GPT(cfg)
    source = None if begun else load_model(cfg.init_from)
    known = load_config([str(begun)])[0] if begun else source.cfg
    architecture = {key: getattr(known, key) for key in ARCHITECTURE}
    runs.tell_overruled(cfg, architecture)
    cfg = replace(cfg, **architecture)
    validate(cfg)
    model = GPT(cfg)
    if source:
        model.load_state_dict(source.state_dict())
    return model


def set_up(cfg, runtime, shards):
    """What steps need: (TrainState, the model to call, Loader, micro-steps)."""
    hardware.refuse_wrong(cfg, runtime)
    folder = Path(cfg.log_dir) / cfg.run_name
    begun = folder / "config.toml"
    goes_on = cfg.resume and runs.checkpoints(folder) and begun.exists()
    model = initial_model(cfg, begun if goes_on else None).to(runtime.device)
    cfg = model.cfg
    hardware.choose_attention(cfg, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    state = TrainState(model, make_optimizer(model, cfg), scaler)
    if cfg.resume:
        resume(folder, state, runtime)
    fast = runtime.compile(model) if cfg.compile_model else model
    B = cfg.micro_batch_size or hardware.fit_micro_batch(
        fast, largest_micro_batch(cfg, runtime), runtime, state.step > 0
    )
    micro_steps, G = batch_layout(cfg, runtime.world, B)
    loader = Loader(shards, cfg, runtime, B, G)
    own = [state.step, *loader.layout]
    if not runtime.all(own == runtime.agree(lambda: own)):  # training apart, nothing would show it
        remedy = "log_dir and data_dir must be folders that every machine sees"
        raise UserError(f"not all ranks have the same checkpoint and data: {remedy}")
    return state, runtime.parallel(fast, B, cfg.block_size), loader, micro_steps


def train(cfg, runtime):
    """Train to max_steps or until asked to stop; with cfg.check only say what that would use."""
    shards = TokenShards(cfg.data_dir, "train")
    val_shards = TokenShards(cfg.data_dir, "val") if cfg.eval_interval else None
    state, fast, loader, micro_steps = set_up(cfg, runtime, shards)
    model, cfg, B = state.model, state.model.cfg, loader.B
    # too little text and another tokenizer's ids show before anything is written
    if val_shards:
        validation_windows(cfg, val_shards)
    for split in filter(None, (shards, val_shards)):
        split.windows(np.linspace(0, len(split) - loader.T - 1, 64, dtype=int), cfg)
    folder = Path(cfg.log_dir) / cfg.run_name
    start, max_steps = state.step, cfg.max_steps or loader.steps_per_epoch()
    runs.introduce(state, loader, micro_steps, max_steps, runtime)
    state.layout = loader.layout
    if cfg.check:
        return hardware.describe(model, folder, runtime)
    log = RunLog(folder, model, runtime, loader.G * loader.T, max_steps, start)

    skipped, stop, batches = 0, False, loader.stream(start, micro_steps)
    norms = trackers.Norms(model) if cfg.log_norms else None
    stopping = runs.stop_on_signal(lambda: log.save(state), lambda: model.training)
    with contextlib.closing(log), contextlib.closing(batches), stopping as asked:
        for step in range(start, max_steps + 1):  # one turn more, to save and evaluate at the end
            last = step == max_steps
            # while steps are skipped, the newest checkpoint stays one from before them
            regular = due(step, cfg.checkpoint_interval, last) and not skipped
            evaluates = due(step, cfg.eval_interval, last) and (last or not stop)
            # asked since that step: torchrun kills after 30 s, an evaluation may take longer
            if step > start and (regular or last or stop or (evaluates and asked())):
                log.save(state)
            if evaluates:
                best = state.best
                evaluate(state, val_shards, max(1, B // 2), log, runtime)  # eager: more memory
                if last and state.best < best:
                    log.save(state)  # with the new best loss, should max_steps be raised
            if last or stop:
                break
            lr, begin = lr_at(step, cfg, max_steps), time.perf_counter()
            loss, norm, stop = train_step(
                fast, state, batches, micro_steps, lr, runtime, asked(), norms
            )
            dt = time.perf_counter() - begin
            log.step(step, loss, lr, norm, dt, **(norms.values if norms else {}))
            skipped = 0 if math.isfinite(loss + norm) else skipped + 1
            if skipped:
                runtime.print(f"step {step:5d} | not finite: update skipped, {skipped} in a row")
            if skipped == MAX_SKIPPED:
                state.step -= MAX_SKIPPED  # the weights have not moved since
                log.save(state, prune=False)  # should these be broken, an older one is needed
                raise runs.diverged(folder, state.step, skipped, log.unsaved)
    runs.refuse_unsaved(folder, log.unsaved)
    if stop and state.step < max_steps:
        runs.tell_how_to_continue(folder, state.step, runtime)
    else:
        runs.finish(folder, cfg, runtime)


def evaluate_only(cfg, runtime):
    val_shards, rows = TokenShards(cfg.data_dir, "val"), cfg.micro_batch_size or 4
    model = initial_model(cfg).to(runtime.device)
    hardware.choose_attention(model.cfg, runtime)
    log = RunLog(None, model, runtime, tokens=0, max_steps=0, start=0)
    evaluate(TrainState(model, None, None), val_shards, rows, log, runtime)


# ---------------------------------------------------------------- main


def main():
    cfg, name = load_config(sys.argv[1:])
    trackers.check(cfg)
    if runs.restarted(Path(cfg.log_dir, cfg.run_name)):
        cfg = replace(cfg, resume=True)
    runtime = Runtime(cfg.device, cfg.dtype, cfg.rank_timeout)
    with contextlib.closing(runtime), runs.telling_obstacles(cfg, runtime):
        if cfg.eval_only:
            return evaluate_only(cfg, runtime)
        run_name = runtime.agree(lambda: runs.choose_run_name(cfg, name))
        train(replace(cfg, run_name=run_name), runtime)


if __name__ == "__main__":
    run(main)
