"""Measure the real code: training steps, memory, data, tokenizing, HellaSwag and sampling.

    python bench.py train configs/tiny.toml --steps=50     # takes every option of train_gpt2.py
    python bench.py train --against=transformers           # or plain, after build-nanogpt
    python bench.py memory --gradient_checkpointing=True   # what fits on which card
    python bench.py precision configs/tiny.toml            # beside float32 of the same seed
    python bench.py loader --data_dir=edu_fineweb10B
    python bench.py tokenize --input my_texts/
    python bench.py hellaswag --model=gpt2 --examples=500
    python bench.py sample --model=gpt2 --batch=64 --json=sample.json
    python bench.py all --json=bench.json                  # all of it, on a GPU, in ten minutes

What is compared takes turns in one run, and a ratio is the median over the turns: what else the
machine does slows both sides. Above 1, the side named first is the faster.
"""

import collections
import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import export
import fineweb
import hardware
import hellaswag
import reading
import train_gpt2 as gpt
from common import UserError, alone, check_json, command_line, first_rank, run, write_json
from pretrained import KINDS
from sample import best_step, by_columns

NEEDED = 600_000  # tokens/s of training on one fast GPU, which the loader has to feed
UTF8 = {"PYTHONUTF8": "1"}  # for commands whose output is read
CPU = torch.profiler.ProfilerActivity.CPU
# tokens of the loader's holes, which Windows fills
SIZES = (10**6,) if os.name == "nt" else (10**6, 10**9, 10**12, 15 * 10**12)


# ---------------------------------------------------------------- timing


def take_turns(sides, rounds):
    """Call each of {name: function} once a round -> ({name: seconds}, {name: last result})."""
    seconds, results = {name: [] for name in sides}, {}
    for _ in tqdm(range(rounds), ", ".join(sides), delay=5, leave=False, disable=None):
        for name, function in sides.items():
            begin = time.perf_counter()
            results[name] = function()
            seconds[name].append(time.perf_counter() - begin)
    return seconds, results


def compare(seconds, amount, unit):
    """Each side's median rate in units a second, and the first side's speed over each other's."""
    figures = {f"{side}_{unit}_per_s": amount / np.median(t) for side, t in seconds.items()}
    first, *others = seconds
    for side in others:
        figures[f"ratio_to_{side}"] = np.median(np.divide(seconds[side], seconds[first]))
    return {key: float(value) for key, value in figures.items()}


def described(runtime, model):
    """What a model's figures depend on besides its options."""
    cuda = runtime.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(runtime.device) if cuda else str(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "ranks": runtime.world,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def show(figures):
    """Print figures as a table; those of a table in it below its name."""
    for key, value in figures.items():
        if isinstance(value, dict):
            print(key)
            show({f"  {name}": number for name, number in value.items()})
            continue
        if type(value) in (int, float):
            value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        print(f"{key[:60]:26} {'unknown' if value is None else value}")


def environment():
    """What else the figures were taken with."""
    figures = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    figures |= {"machine": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}
    return figures | {"python": platform.python_version()} | hardware.versions()


# ---------------------------------------------------------------- training and its data


@dataclass(frozen=True)
class TrainOptions(gpt.Config):
    steps: int = 20  # to time, after two that warm up: optimizer steps, or the loader's batches
    tokens: int = 10_000_000  # random ones to read where data_dir holds no shards
    against: Literal["none", "plain", "transformers"] = "none"  # a peer that takes turns with it
    profile: str = ""  # folder for a trace of one more step, and its operators by time
    json: str = ""  # also write the figures to this file


@contextlib.contextmanager
def training_data(cfg):
    """Yield (cfg, what its data is): data_dir's shards, or else random tokens, for the time being.

    They come from the seed, so every rank can have its own copy.
    """
    if fineweb.shard_paths(cfg.data_dir, "train"):
        yield cfg, cfg.data_dir
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        draw = np.random.default_rng(cfg.seed).integers
        ids = min(cfg.vocab_size, gpt.VOCABULARY)
        tokens = draw(ids, size=cfg.tokens, dtype=np.uint16)
        np.save(Path(folder, "random_train_000001.npy"), tokens)
        yield replace(cfg, data_dir=folder), f"random tokens: {cfg.data_dir}/ holds no shards"


def timed(iterator, waits):
    """Pass items on; append to `waits` the seconds that each took to come."""
    while True:
        begin = time.perf_counter()
        item = next(iterator)
        waits.append(time.perf_counter() - begin)
        yield item


# ---------------------------------------------------------------- peers


class PlainBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(C)
        self.c_attn = nn.Linear(C, 3 * C)
        self.attn_proj = nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.c_fc = nn.Linear(C, 4 * C)
        self.mlp_proj = nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.size()
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Plain(nn.Module):
    """GPT-2 as build-nanogpt has it, with a GPT's weights: all logits, then cross_entropy."""

    def __init__(self, model):
        super().__init__()
        c = model.cfg
        only = dict(bias=True, qkv_bias=True, tie_embeddings=True, dropout=0.0)
        only |= KINDS["gpt2"].toggles
        if wrong := export.differing(c, only):
            raise UserError(f"against=plain is GPT-2's own architecture: no {', '.join(wrong)}")
        self.wte, self.wpe = (nn.Embedding(n, c.n_embd) for n in (c.vocab_size, c.block_size))
        self.h = nn.ModuleList(PlainBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        # both have them in the order of computation
        self.load_state_dict(dict(zip(self.state_dict(), model.parameters(), strict=True)))

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class Transformers(nn.Module):
    """transformers' model with a GPT's architecture and weights, and the loss of its own."""

    def __init__(self, model):
        super().__init__()
        if not importlib.util.find_spec("transformers"):
            raise UserError("against=transformers needs it: pip install transformers")
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            model_type = export.find_kind(model.cfg)
        except UserError as error:
            reason, _, _ = str(error).partition("\n")
            raise UserError(f"against=transformers: {reason}") from None
        llama = dict(dropout=0.0)  # it drops other activations out
        only = dict(bias=True, qkv_bias=True) if model_type == "gpt2" else llama
        if wrong := export.differing(model.cfg, only):
            kind = KINDS[model_type].name
            raise UserError(f"against=transformers: {kind} has no {', '.join(wrong)}")
        cfg = export.configs(model.cfg, model_type)["config.json"]
        cfg = AutoConfig.for_model(**cfg | {"vocab_size": model.cfg.vocab_size})
        self.model = AutoModelForCausalLM.from_config(cfg)
        weights = dict(model.named_parameters())
        weights = KINDS[model_type].to_theirs(weights, model.cfg.n_layer)
        self.model.load_state_dict(weights, strict=False)  # a tied head comes without a name
        self.model.loss_type = "ForCausalLM"  # else a warning breaks the compiled graph in two
        self.model.train()

    def forward(self, idx, targets):
        return self.model(idx, labels=targets, shift_labels=targets, use_cache=False).loss


PEERS = {"plain": Plain, "transformers": Transformers}


def peer_side(peer, cfg, loader, runtime, closing):
    """The usual training loop, of a peer on the loader's batches -> (what takes a step,)."""
    # a copy, so that its weights count as its memory on a CPU, too
    peer, micro_steps = copy.deepcopy(peer).to(runtime.device), loader.G // loader.B
    optimizer = gpt.make_optimizer(peer, cfg)
    if isinstance(peer, Plain) and runtime.device.type != "cuda":  # as build-nanogpt chooses
        for group in optimizer.param_groups:
            group["fused"] = False
    fast = runtime.compile(peer) if cfg.compile_model else peer
    batches, steps = loader.stream(0, micro_steps), itertools.count()
    closing.enter_context(contextlib.closing(batches))
    max_steps = cfg.max_steps or loader.steps_per_epoch()

    def step():
        hardware.allow_attention("auto")
        optimizer.zero_grad()
        total = 0.0
        for _ in range(micro_steps):
            inputs, targets = (part.contiguous() for part in next(batches))
            with runtime.autocast():
                loss = fast(inputs, targets) / micro_steps
            total += loss.detach()
            loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), cfg.grad_clip or math.inf)
        lr = gpt.lr_at(next(steps), cfg, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        runtime.synchronize()
        return total.item()

    return (step,)


# ---------------------------------------------------------------- training and its memory


def own_side(cfg, runtime, shards, closing, waits):
    """train_gpt2.py's training, real to the last line -> (what takes a step, Loader, GPT)."""
    state, fast, loader, micro_steps = gpt.set_up(cfg, runtime, shards)
    cfg, batches = state.model.cfg, timed(loader.stream(0, micro_steps), waits)
    closing.enter_context(contextlib.closing(batches))
    max_steps = cfg.max_steps or loader.steps_per_epoch()

    def step():
        hardware.choose_attention(cfg, runtime)  # a peer has the default
        lr = gpt.lr_at(state.step, cfg, max_steps)
        loss, _, _ = gpt.train_step(fast, state, batches, micro_steps, lr, runtime)
        runtime.synchronize()  # train_step leaves the optimizer running
        return loss

    return step, loader, state.model


@contextlib.contextmanager
def watch_memory(runtime):
    """Yield a list that gets the peak, in bytes, of what is allocated inside the block."""
    peak = []
    if runtime.device.type == "cuda":
        x = torch.ones(8, 8, device=runtime.device, requires_grad=True)
        (x @ x).sum().backward()  # cuBLAS's workspaces stay, one for each direction
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    with torch.profiler.profile(activities=[CPU], profile_memory=True) as profiler:
        yield peak
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak.append(max(itertools.accumulate(sizes), default=0))


def warm_up(make, runtime):
    """Make a side and take two steps -> (what makes gave, figures)."""
    begin = time.perf_counter()
    with watch_memory(runtime) as peak:
        made = make()
        made[0]()
        first_step = time.perf_counter() - begin
        hardware.forget_memory(runtime)  # what compiling took for itself is not a step's
        made[0]()  # the first with AdamW's moments
    return made, {"first_step_s": first_step, "peak_memory_gib": peak[0] / 2**30}


def profiled(step, folder, cuda):
    """Trace one step into `folder` -> {operator: its own ms}, the longest first."""
    with torch.profiler.profile() as profiler:
        step()
    profiler.export_chrome_trace(str(Path(folder, "trace.json.gz")))
    averages = profiler.key_averages()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = averages.table(sort_by=own, row_limit=40, max_name_column_width=60)
    Path(folder, "operators.txt").write_text(table, encoding="utf-8")
    if cuda:  # a kernel's time stands at the operator that launched it, too
        on_gpu = torch.autograd.DeviceType.CUDA
        averages = [a for a in averages if a.device_type == on_gpu and not a.is_user_annotation]
    longest = sorted(averages, key=lambda a: getattr(a, own), reverse=True)[:12]
    return {a.key: getattr(a, own) / 1000 for a in longest}


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"profile={path} cannot be created: {error.strerror}") from None


def step_figures(seconds, tokens, flops, peak):
    """Of the seconds that each step took: their middle, their spread, and what they come to."""
    median, p10, p90 = np.percentile(seconds, [50, 10, 90]).tolist()
    return {
        "step_s_median": median,
        "step_s_p10": p10,
        "step_s_p90": p90,
        "tokens_per_s": tokens / median,
        "mfu": flops * tokens / median / peak if peak else None,
    }


def bench_train(options):
    """optimizer steps: compiling, step time, tokens/s, MFU, memory; beside a peer; profiled"""
    runtime, name, waits = gpt.Runtime(options.device, options.dtype), options.against, []
    if name != "none" and runtime.world > 1:
        raise UserError(f"against={name} compares on one rank: leave torchrun out")
    if name != "none" and (options.gradient_checkpointing or runtime.dtype == torch.float16):
        raise UserError(f"against={name} has neither gradient_checkpointing nor dtype=float16")
    if options.profile:  # before the time is spent
        make_folder(options.profile)
    with (
        contextlib.closing(runtime),
        training_data(options) as (cfg, data),
        contextlib.ExitStack() as closing,
    ):
        peer = PEERS[name](gpt.initial_model(cfg)) if name != "none" else None
        shards = gpt.TokenShards(cfg.data_dir, "train")
        make = functools.partial(own_side, cfg, runtime, shards, closing, waits)
        (step, loader, model), own = warm_up(make, runtime)
        kernel, flops = hardware.attention_kernel(model.cfg, runtime), model.flops_per_token()
        sides, tokens = {"ours": step}, loader.G * loader.T
        if peer:
            make = functools.partial(peer_side, peer, model.cfg, loader, runtime, closing)
            (sides[name],), theirs = warm_up(make, runtime)
        del waits[:]
        seconds, losses = take_turns(sides, cfg.steps)
        peak = hardware.peak_flops(runtime.device, runtime.dtype) * runtime.world
        micro_steps = loader.G // loader.B // runtime.world
        figures = {
            **described(runtime, model),
            "data": data,
            "compiled": cfg.compile_model and not hardware.compile_obstacle(runtime.device),
            "attention": kernel,
            "batch": f"{loader.B} x {loader.T} x {micro_steps} micro-steps",
            "tokens_per_step": tokens,
            **own,
            **step_figures(seconds["ours"], tokens, flops, peak),
            "data_wait_s_per_step": sum(waits) / cfg.steps,
            "last_loss": losses["ours"],
        }
        if peer:
            theirs |= step_figures(seconds[name], tokens, flops, peak)
            theirs["last_loss"] = losses[name]
            figures |= {f"{name}_{key}": value for key, value in theirs.items()}
            ratio = f"ratio_to_{name}"
            figures[ratio] = compare(seconds, tokens, "tokens")[ratio]
        if cfg.profile:
            figures["operators_ms"] = profiled(step, cfg.profile, runtime.device.type == "cuda")
        return figures


@dataclass(frozen=True)
class MemoryOptions(gpt.Config):
    cards: tuple[int, ...] = (4, 8, 16, 24, 32, 80)  # sizes of GPUs, GiB
    reserve: float = 0.75  # GiB of a card that CUDA, its libraries and fragments take
    tokens: int = 1_000_000  # random ones to read where data_dir holds no shards
    json: str = ""  # also write the figures to this file


def bench_memory(options):
    """peak memory by layers and sequences, from small models, and what fits on which card"""
    runtime = gpt.Runtime(options.device, options.dtype)
    if options.init_from:
        raise UserError("memory is measured of new models: leave init_from out")
    with contextlib.closing(runtime), training_data(options) as (cfg, data):
        shards = gpt.TokenShards(cfg.data_dir, "train")

        def terms(layers, B, chunks):
            """What the peak is a sum of: weights, activations, and one chunk's logits."""
            tokens = B * cfg.block_size
            rows = math.ceil(tokens / (chunks or math.ceil(tokens / 8192)))
            return 1, layers, B, layers * B, rows / cfg.block_size

        def measured(layers, B, chunks):
            torch._dynamo.reset()
            gc.collect()  # what goes while it is measured would count as less
            size = dict(n_layer=layers, micro_batch_size=B, loss_chunks=chunks, grad_accum_steps=2)
            with contextlib.ExitStack() as closing:
                small = replace(cfg, **size)
                make = functools.partial(own_side, small, runtime, shards, closing, [])
                return warm_up(make, runtime)[1]["peak_memory_gib"]

        few, many = 2, 4  # layers
        points = [(few, 8, 1), (few, 12, 1), (many, 8, 1), (many, 12, 1), (few, 12, 2)]
        parts = np.linalg.solve([terms(*p) for p in points], [measured(*p) for p in points])
        # with few activations the peak is at the end, where the head's gradients meet
        ends = [measured(layers, 1, 1) for layers in (few, many)]

        def predicted(layers, B, chunks=cfg.loss_chunks):
            end = ends[0] + (ends[1] - ends[0]) * (layers - few) / (many - few)
            return float(max(end, parts @ terms(layers, B, chunks)))

        free = torch.cuda.mem_get_info()[0] / 2**30 if runtime.device.type == "cuda" else 0
        check = cfg.n_layer, 8, 1  # the model itself, where there is room for it
        check = check if predicted(*check) < free else (3, 10, 1)
        found, L = measured(*check), cfg.n_layer
        weights, per_layer, sequence, layer_sequence, logits = parts.tolist()
        with torch.device("meta"):
            model = gpt.GPT(cfg)
        figures = described(runtime, model) | {
            "data": data,
            "weights_gib": weights + L * per_layer,  # with gradients and AdamW's moments
            "activations_gib_per_sequence": sequence + L * layer_sequence,
            "logits_gib_per_sequence": logits,
            "checked_at": f"{check[0]} layers, {check[1]} sequences",
            "measured_gib": found,
            "predicted_over_measured": predicted(*check) / found,
        }
        for card in options.cards:
            room = card * (1 - hardware.SPARE) - options.reserve
            fits = [B for B in (2**i for i in range(7)) if predicted(L, B) <= room]
            most = max(fits, default=0)
            told = f"{most} sequences, {predicted(L, most):.1f} GiB" if most else "too little"
            figures[f"card_{card}_gib"] = told
        return figures


@dataclass(frozen=True)
class PrecisionOptions(gpt.Config):
    steps: int = 200  # optimizer steps of either side
    json: str = ""  # also write the figures to this file


def bench_precision(options):
    """validation loss after some steps, as configured and in eager float32 from the same seed"""
    plain = dict(dtype="float32", compile_model=False, attention="math", loss_chunks=1)
    sides = {"as_configured": options, "float32": replace(options, **plain)}
    figures = {}
    for name, cfg in sides.items():
        runtime = gpt.Runtime(cfg.device, cfg.dtype)
        train_shards, val_shards = (gpt.TokenShards(cfg.data_dir, x) for x in ("train", "val"))
        with contextlib.closing(runtime), contextlib.ExitStack() as closing:
            step, loader, model = own_side(cfg, runtime, train_shards, closing, [])
            for _ in tqdm(range(cfg.steps), name, delay=5, leave=False, disable=None):
                step()
            rows = max(1, loader.B // 2)
            figures |= {} if figures else described(runtime, model) | {"data": cfg.data_dir}
            figures[name] = gpt.evaluate_loss(model, val_shards, model.cfg, runtime, rows)
    return figures | {"difference": figures["as_configured"] - figures["float32"]}


def bench_loader(options):
    """start-up and batches of the data loader, beside what the fastest training needs"""
    runtime = gpt.Runtime(options.device, options.dtype)
    B = options.micro_batch_size or 64
    with contextlib.closing(runtime), training_data(options) as (cfg, data):
        begin = time.perf_counter()
        loader = gpt.Loader(gpt.TokenShards(cfg.data_dir, "train"), cfg, runtime, B, B)
        loader.batch(0, 0)
        start_up = time.perf_counter() - begin
        steps = iter(range(1, cfg.steps + 1))
        seconds, _ = take_turns({"batch": lambda: loader.batch(next(steps), 0)}, cfg.steps)
        median = float(np.median(seconds["batch"]))
        figures = {
            "data": data,
            "tokens": len(loader.shards),
            "batch": f"{B} x {cfg.block_size}",
            "start_up_s": start_up,  # until the first batch is there
            "batch_s_median": median,
            "tokens_per_s": B * cfg.block_size / median,
            "share_of_a_step": NEEDED * median / (B * cfg.block_size),  # at so many tokens/s:
            "needed_tokens_per_s": NEEDED,
        }
        for tokens in SIZES:
            figures |= time_sparse(tokens, cfg, runtime, B)
    return figures


def time_sparse(tokens, cfg, runtime, B):
    """Start-up, memory and a batch of so many tokens, in files that are nothing but a hole."""
    import tracemalloc

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: in use
        each = 10**12  # tokens a file: file systems end at 16 TB
        for number, start in enumerate(range(0, tokens, each), 1):
            size = min(each, tokens - start)
            path = Path(folder, f"edufineweb_train_{number:06d}.npy")
            with open(path, "wb") as file:
                fineweb.write_header(file, size)
                file.truncate(file.tell() + 2 * size)
        tracemalloc.start()
        begin = time.perf_counter()
        loader = gpt.Loader(gpt.TokenShards(folder, "train"), cfg, runtime, B, B)
        loader.batch(0, 0)
        start_up, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        begin = time.perf_counter()
        loader.batch(loader.steps_per_epoch() // 2, 0)
        batch = time.perf_counter() - begin
    name = f"{tokens / 1e6:,.0f}M_tokens"
    return {
        f"{name}_start_up_s": start_up,
        f"{name}_start_up_mib": peak / 2**20,
        f"{name}_batch_s": batch,
    }


# ---------------------------------------------------------------- tokenizing


@dataclass(frozen=True)
class TokenizeOptions:
    input: tuple[str, ...] = ()  # files, folders or globs as for fineweb.py; none: python-docs
    processes: int = 0  # cores that tokenize; 0 = all
    shard_tokens: int = 10_000_000  # tokens a shard: many, as in a long run, of a short input
    rounds: int = 3  # times that each side does it all
    json: str = ""  # also write the figures to this file


def bench_tokenize(options):
    """files to shards on disk: gigatoken beside a pool of tiktoken, and beside its parts alone"""
    names = [name for name in ("gigatoken", "tiktoken") if importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        inputs = options.input
        if not inputs:  # once, as collecting them takes longer than tokenizing them
            inputs = [f"{folder}/python_docs.jsonl"]
            lines = (json.dumps({"text": text}) + "\n" for text in reading.python_docs())
            Path(inputs[0]).write_text("".join(lines), encoding="utf-8")
        Path(folder, "little.txt").write_text("a little text " * 20_000, encoding="utf-8")
        run = functools.partial(run_fineweb, options, folder)
        parts = []
        sides = {"parts": lambda: parts.append(time_parts(inputs))}
        sides["start_up"] = functools.partial(run, names[0], [f"{folder}/little.txt"])
        sides |= {name: functools.partial(run, name, inputs) for name in reversed(names)}
        seconds, manifests = take_turns(sides, options.rounds)
    start_up = np.array(seconds["start_up"])
    seconds = {name: seconds[name] for name in names}
    parts, megabytes = [spent for spent, _ in parts], parts[0][1]
    cores = options.processes or os.cpu_count()
    whole = seconds[names[0]] - start_up
    slowest = [max(spent.values()) for spent in parts]
    shared = [sum(spent.values()) / min(cores, 3) for spent in parts]
    alone = {part: megabytes / np.median([spent[part] for spent in parts]) for part in parts[0]}
    same = len({manifests[name] for name in names}) == 1
    tokens = json.loads(manifests["tiktoken"])["tokens"]
    figures = compare(seconds, megabytes, "mb") | compare(seconds, tokens, "tokens")
    return {
        "data": " ".join(options.input) or "python-docs",
        "processes": cores,
        "mb": megabytes,  # of UTF-8, whatever the format of the files
        "tokens": tokens,
        **figures,
        "same_shards": same,
        "start_up_s": float(np.median(start_up)),  # of a whole command, in the rates above
        **{f"{part}_alone_mb_per_s": float(rate) for part, rate in alone.items()},
        "ratio_to_slowest_part": float(np.median(slowest / whole)),
        "ratio_to_parts_sharing_cores": float(np.median(shared / whole)),
    }


def run_fineweb(options, folder, tokenizer, inputs):
    """Run the whole command, its start-up too, into a new folder in `folder` -> its manifest."""
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        command = [sys.executable, fineweb.__file__, "--source=local", "--input", *inputs]
        command += [f"--out_dir={out_dir}", f"--tokenizer={tokenizer}"]
        command += [f"--{key}={getattr(options, key)}" for key in ("processes", "shard_tokens")]
        how = dict(capture_output=True, encoding="utf-8", env=os.environ | UTF8)
        done = subprocess.run(command, **how)
        if done.returncode:
            raise UserError(done.stderr.strip().removeprefix("error: "))
        return Path(out_dir, fineweb.MANIFEST).read_bytes()


def time_parts(inputs):
    """({part of the work: its seconds while nothing else runs}, megabytes of text)."""
    import pyarrow.compute

    source = fineweb.open_source(fineweb.Options(source="local", input=tuple(inputs)), None)
    blocks = fineweb.read_blocks(source, range(len(source.sizes)), place=[0, 0, 0])
    seconds, megabytes = collections.Counter(), 0

    def timed(part, function, *args):
        begin = time.perf_counter()
        result = function(*args)
        seconds[part] += time.perf_counter() - begin
        return result

    fast = fineweb.FastTokenizer()  # without the words of the last round

    def gigatoken(texts):
        return fast.encode_together(texts)

    def tiktoken(texts):
        return fineweb.encode(texts.to_pylist())

    encode = gigatoken if importlib.util.find_spec("gigatoken") else tiktoken
    encode(reading.large_strings(["what a first call sets up"]))
    while block := timed("reading", next, blocks, None):
        texts = timed("parsing", block.load)
        timed(encode.__name__, encode, texts)
        megabytes += pyarrow.compute.sum(pyarrow.compute.binary_length(texts)).as_py() / 1e6
    return seconds, megabytes


# ---------------------------------------------------------------- HellaSwag and sampling


@dataclass(frozen=True)
class ModelOptions:
    model: str = ""  # checkpoint, Hugging Face folder, gpt2, ...; "" = untrained, of this size:
    n_layer: int = 4  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    block_size: int = 1024  # longest context, in tokens
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products
    rounds: int = 3  # times that each side does it all
    json: str = ""  # also write the figures to this file


@dataclass(frozen=True)
class HellaSwagOptions(ModelOptions):
    data: str = ""  # a .jsonl file of tasks; "" = the original, fetched once (12 MB)
    examples: int = 200  # tasks, spread evenly over the file; 0 = all
    against: Literal["one_at_a_time", "none"] = "one_at_a_time"  # what takes turns with it


@dataclass(frozen=True)
class SampleOptions(ModelOptions):
    max_new_tokens: int = 256  # tokens a sample
    batch: int = 1  # samples at once
    compile_step: bool = False  # CUDA: compile the step of one token, too, before it is a graph


def open_model(options):
    """(Runtime, GPT on its device, the figures that describe them)."""
    sizes = {key: getattr(options, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    cfg = gpt.Config(**sizes, vocab_size=50304, init_from="", eval_only=False)
    gpt.validate(cfg)
    runtime = gpt.Runtime(options.device, options.dtype)
    model = gpt.load_model(options.model) if options.model else gpt.initial_model(cfg)
    untrained = f"untrained, {', '.join(f'{key} {value}' for key, value in sizes.items())}"
    figures = {"model": options.model or untrained, **described(runtime, model)}
    return runtime, model.to(runtime.device), figures


def one_at_a_time(model, tasks, device):
    """build-nanogpt's way: a task's four rows at once, each with its context, and all logits."""
    for index, task in enumerate(tasks):
        rows = [torch.tensor(task.context + ending) for ending in task.endings]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        ending = torch.zeros_like(tokens, dtype=torch.bool)
        for row, mask in zip(rows, ending, strict=True):
            mask[len(task.context) : len(row)] = True
        logits = model(tokens[:, :-1])[..., : gpt.VOCABULARY].float()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        total = (nll.view(4, -1) * ending[:, 1:]).sum(1)
        characters = torch.tensor(task.characters, device=device)
        yield index, *hellaswag.pick(total, ending.sum(1), characters)


def bench_hellaswag(options):
    """HellaSwag packed and batched, beside one task at a time, and on how many tasks they agree"""
    runtime, model, figures = open_model(options)
    tasks = hellaswag.load(options.data, options.examples)
    if any(len(t.context) + max(map(len, t.endings)) - 1 > model.cfg.block_size for t in tasks):
        raise UserError(f"block_size={model.cfg.block_size} is too short for these tasks")

    def score(predictions, tasks):
        return sorted(predictions(model, tasks, runtime.device))

    with gpt.evaluating(model, runtime):
        score(hellaswag.predictions, tasks[:8])  # what only a first pass sets up is no side's time
        sides = {"batched": hellaswag.predictions}
        if options.against != "none":
            sides[options.against] = one_at_a_time
        sides = {name: functools.partial(score, way, tasks) for name, way in sides.items()}
        seconds, picks = take_turns(sides, options.rounds)
    figures |= {"tasks": len(tasks), "seconds": float(np.median(seconds["batched"]))}
    if options.against != "none":  # below float32 rounding may turn a near tie
        agreeing = sum(a == b for a, b in zip(*picks.values(), strict=True))
        figures["tasks_that_agree"] = agreeing
    return figures | compare(seconds, len(tasks), "tasks")


@torch.no_grad()
def generate_uncached(model, idx, max_new_tokens, how, generator=None):
    """As `generate`, but the whole context is read again for each token, and no row ends."""
    for _ in range(max_new_tokens):
        logits = model.logits(model.features(idx[:, -model.cfg.block_size :])[:, -1])
        new = gpt.sample_token(logits[:, : gpt.VOCABULARY], idx, how, generator)
        yield new
        idx = torch.cat((idx, new), dim=1)


def transformers_sampler(model, runtime):
    """(idx, length) -> None: transformers' generate by a model of the same size, untrained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.cfg
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size)
    sizes["vocab_size"] = min(c.vocab_size, gpt.VOCABULARY)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes)).to(runtime.device, runtime.dtype).eval()
    theirs.generation_config.eos_token_id = None  # so that no row ends
    how = dict(do_sample=True, top_k=50, pad_token_id=gpt.END_OF_TEXT)

    def sample(idx, length):
        with hardware.without_cudnn_attention():
            theirs.generate(idx, max_new_tokens=length, **how)

    return sample


def weights_in(dtype, model):
    """Cast what is multiplied once: a compiled step would hold autocast's casts, of all weights."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.to(dtype)
    return model


def bench_sample(options):
    """generate() with its cache, beside itself without, and transformers where it is installed"""
    runtime, model, figures = open_model(options)
    model, step = by_columns(model, runtime.dtype), gpt.next_logits
    if options.compile_step:
        if runtime.device.type != "cuda":
            raise UserError("compile_step is for CUDA, where a step is a graph: leave it out")
        step = torch.compile(step, dynamic=False)
        model = weights_in(runtime.dtype, model)
    idx = torch.zeros(options.batch, 1, dtype=torch.long, device=runtime.device)

    def sample(generate, length, **how):
        generator = torch.Generator(runtime.device).manual_seed(1337)
        with gpt.evaluating(model, runtime):
            new = generate(model, idx, length, gpt.Sampling(top_k=50), generator, **how)
            return torch.cat(list(new), dim=1).tolist()  # waits for the device

    def cached(length):
        return sample(gpt.generate, length, step=best_step(runtime.device, step))

    # a trained model may end early: the same seed at the same token, so all make as many
    length = len(cached(options.max_new_tokens)[0])
    sides = {"cached": functools.partial(cached, length)}
    sides["uncached"] = functools.partial(sample, generate_uncached, length)
    if importlib.util.find_spec("transformers") and length < model.cfg.block_size:
        sides["transformers"] = functools.partial(transformers_sampler(model, runtime), idx, length)
    seconds, _ = take_turns(sides, options.rounds)
    figures |= {"batch": options.batch, "new_tokens": length}
    return figures | compare(seconds, length * options.batch, "tokens")


# ---------------------------------------------------------------- all that a GPU is needed for


@dataclass(frozen=True)
class AllOptions:
    minutes: float = 9.5  # for all parts together; the most telling come first
    parts: tuple[str, ...] = ()  # of these alone, in this order; none: all
    small: bool = False  # a rehearsal for a CPU: the tiny config instead of GPT-2 (124M)
    data: str = ""  # a hellaswag_val.jsonl at hand; "" = the original, fetched once (12 MB)
    json: str = "bench.json"  # the figures; also written after each part


LONGEST = 240  # seconds that a part may take of the others' time
TRY = "train_gpt2.py configs/tiny.toml --data_dir={folder}/docs --log_dir={folder}/log"
PARTS = {  # the most telling first
    "docs": "fineweb.py --source=python-docs --out_dir={folder}/docs",
    "plain": "bench.py train {config} --steps={steps} --against=plain --profile={trace}",
    "sample": "bench.py sample {model} --max_new_tokens={length}",
    "sample_compiled": "bench.py sample {model} --max_new_tokens={length} {compiled}",
    "hellaswag": "bench.py hellaswag {model} --examples={tasks} --rounds=1 --data={data}",
    "hellaswag_whole": "bench.py hellaswag {model} --examples={whole} --against=none --data={data}",
    "transformers": "bench.py train {config} --steps={steps} --against=transformers",
    "run": f"{TRY} --run_name=x --max_steps={{some}} --checkpoint_interval=50",
    "resume": f"{TRY} --run_name=x --max_steps={{more}} --resume=True",
    "precision": "bench.py precision configs/tiny.toml --learning_rate=5e-4 --steps={some} "
    "--data_dir={folder}/docs",
    "base": "bench.py train {config} {few} --steps={steps}",  # for the rest to compare with
    "flash": "bench.py train {config} {few} --steps={steps} --attention=flash",
    "one_chunk": "bench.py train {config} {few} --steps={steps} --loss_chunks=1",
    "saving": "bench.py train {config} {few} --steps={steps} --gradient_checkpointing=True",
    "half_batch": "bench.py train {config} {few} --steps={steps} --micro_batch_size={half}",
    "sample_64": "bench.py sample {model} --max_new_tokens={length} --batch=64",
    "memory": "bench.py memory {config}",
    "eager": "bench.py train {config} {few} --steps={steps} --compile_model=False",
    "fast_math": "TORCHINDUCTOR_USE_FAST_MATH=1 TORCHINDUCTOR_ONLINE_SOFTMAX=0 "
    "bench.py train {config} {few}",
    "xl": "bench.py train {xl} --micro_batch_size=4 --grad_accum_steps=2 --steps=3 "
    "--gradient_checkpointing=True --compile_model=False",
    "descent": "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 bench.py train {config} {few}",
    "autotune": "TORCHINDUCTOR_MAX_AUTOTUNE=1 bench.py train {config} {few}",
}
FULL = dict(
    config="configs/gpt2_124m.toml", few="--total_batch_size=131072", half=32, steps=10,
    model="--n_layer=12 --n_head=12 --n_embd=768", length=512, tasks=1000, whole=0,
    some=200, more=202, xl="configs/gpt2_xl.toml", compiled="--compile_step=True",
)  # fmt: skip
REHEARSAL = dict(
    config="configs/tiny.toml", few="--total_batch_size=1024", half=4, steps=2,
    model="--n_layer=2 --n_head=2 --n_embd=64", length=32, tasks=20, whole=40,
    some=4, more=6, xl="configs/tiny.toml", compiled="",
)  # fmt: skip


def run_part(command, seconds, path):
    """A command's figures (or last lines), and how long it took; or why there are none."""
    words, env, begin = shlex.split(command), os.environ | UTF8, time.perf_counter()
    while not words[0].endswith(".py"):
        key, _, env[key] = words.pop(0).partition("=")
    words += [f"--json={path}"] if words[0] == "bench.py" else []
    how = dict(capture_output=True, text=True, encoding="utf-8", timeout=seconds)
    how |= dict(cwd=Path(__file__).parent, env=env)
    try:
        done = subprocess.run([sys.executable, *words], **how)
    except subprocess.TimeoutExpired:
        return {"not_done": f"stopped after {seconds:.0f} s"}
    told = {"command": command, "seconds": time.perf_counter() - begin}
    if done.returncode:
        return told | {"error": " / ".join(done.stderr.strip().splitlines()[-3:])}
    if path.exists():
        return told | json.loads(path.read_text(encoding="utf-8"))
    return told | {"output": " / ".join(done.stdout.strip().splitlines()[-4:])}


def bench_all(options):
    """all that takes a GPU to find out, in ten minutes and one JSON"""
    end, figures = time.perf_counter() + 60 * options.minutes, {}
    if unknown := [name for name in options.parts if name not in PARTS]:
        raise UserError(f"parts={unknown[0]} is none of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        paths = dict(folder=folder, trace=Path(options.json).with_suffix("").absolute())
        paths["data"] = Path(options.data).absolute() if options.data else ""
        paths = {key: shlex.quote(str(path)) for key, path in paths.items()}
        values = (REHEARSAL if options.small else FULL) | paths
        for name in options.parts or PARTS:
            left, path = min(LONGEST, end - time.perf_counter()), Path(folder, f"{name}.json")
            figures[name] = {"not_done": "no time was left"}
            if left > 1:
                figures[name] = run_part(PARTS[name].format(**values), left, path)
            print(f"\n{name}", flush=True)
            show(figures[name])
            write_json(options.json, figures)
    told = {"failed": "error", "left_out": "not_done"}
    return figures | {what: [n for n in figures if key in figures[n]] for what, key in told.items()}


# ---------------------------------------------------------------- main

COMMANDS = {
    "train": (bench_train, TrainOptions),
    "memory": (bench_memory, MemoryOptions),
    "precision": (bench_precision, PrecisionOptions),
    "loader": (bench_loader, TrainOptions),
    "tokenize": (bench_tokenize, TokenizeOptions),
    "hellaswag": (bench_hellaswag, HellaSwagOptions),
    "sample": (bench_sample, SampleOptions),
    "all": (bench_all, AllOptions),
}
POSITIVE = ("steps", "tokens", "shard_tokens", "rounds", "max_new_tokens", "batch")
AT_LEAST = dict.fromkeys(POSITIVE, 1) | dict.fromkeys(("examples", "processes", "minutes"), 0)
ON_RANKS = ("train", "loader")


def main():
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13's profiler tells when it starts
    name, *argv = sys.argv[1:] or [""]
    if name not in COMMANDS:
        if name and not name.startswith("-"):
            raise UserError(f"{name} is none of {', '.join(COMMANDS)}")
        print(__doc__)
        for command, (bench, _) in COMMANDS.items():
            print(f"    {command:10} {bench.__doc__}")
        sys.exit(0 if name in ("-h", "--help") else 2)
    bench, kind = COMMANDS[name]
    if issubclass(kind, gpt.Config):
        options, _ = gpt.load_config(argv, kind, __doc__)
        if options.resume or options.check:
            raise UserError("bench.py starts from step 0: leave resume and check out")
    else:
        options = command_line(kind, __doc__, argv, prog=f"bench.py {name}")
    for key, value in asdict(options).items():
        if key in AT_LEAST and not value >= AT_LEAST[key]:
            raise UserError(f"{key}={value} must be {AT_LEAST[key]} or more")
    check_json(options.json)
    if name not in ON_RANKS:
        alone(f"bench.py {name}")
    with hardware.telling_memory(name, "halve --micro_batch_size or --batch"):
        figures = bench(options)
    if not first_rank():
        return
    show(figures if name != "all" else {key: figures[key] for key in ("failed", "left_out")})
    show(environment())
    if options.json:
        write_json(options.json, {"bench": name, **figures, **environment()})
    if figures.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
