"""Time the real code: training steps, data loading, tokenizing, HellaSwag and sampling.

    python bench.py train configs/tiny.toml --steps=50     # takes every option of train_gpt2.py
    python bench.py loader --data_dir=edu_fineweb10B       # and so does this
    python bench.py tokenize --input my_texts/
    python bench.py hellaswag --model=gpt2 --examples=500
    python bench.py sample --model=gpt2 --batch=64 --json=sample.json

What is compared takes turns in one run, and a ratio is the median over the turns: what else the
machine does slows both sides. Above 1, the side named first is the faster.
"""

import collections
import contextlib
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import fineweb
import hardware
import hellaswag
import train_gpt2 as gpt
from fineweb import UserError
from sample import best_step

NEEDED = 600_000  # tokens/s of training on one fast GPU, which the loader has to feed
SIZES = 10**6, 10**9, 10**12, 15 * 10**12  # tokens of the loader's holes


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


def report(figures, path):
    """Print the figures, and what they were taken with, as a table; write the same as JSON."""
    figures |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    figures |= {"machine": platform.machine(), "python": platform.python_version()}
    figures |= hardware.versions()
    for key, value in figures.items():
        if type(value) in (int, float):
            value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        print(f"{key:26} {'unknown' if value is None else value}")
    if path:
        fineweb.write_json(path, figures)


# ---------------------------------------------------------------- training and its data


@dataclass(frozen=True)
class TrainOptions(gpt.Config):
    steps: int = 20  # to time after the first: optimizer steps, or the loader's batches
    tokens: int = 10_000_000  # random ones to read where data_dir holds no shards
    json: str = ""  # also write the figures to this file


@contextlib.contextmanager
def training_data(cfg):
    """Yield (cfg, what its data is): data_dir's shards, or else random tokens, for the time being.

    They come from the seed, so every rank can have its own copy.
    """
    if any(Path(cfg.data_dir).glob("*_train_*")):
        yield cfg, cfg.data_dir
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        draw = np.random.default_rng(cfg.seed).integers
        ids = min(cfg.vocab_size, gpt.VOCABULARY)
        fineweb.write_shard(folder, 1, draw(ids, size=cfg.tokens, dtype=np.uint16))
        yield replace(cfg, data_dir=folder), f"random tokens: {cfg.data_dir}/ holds no shards"


def timed(iterator, waits):
    """Pass items on; append to `waits` the seconds that each took to come."""
    while True:
        begin = time.perf_counter()
        item = next(iterator)
        waits.append(time.perf_counter() - begin)
        yield item


def bench_train(options):
    """optimizer steps: compiling, step time, tokens/s, MFU, memory, waiting for data"""
    runtime = gpt.Runtime(options.device, options.dtype)
    with contextlib.closing(runtime), training_data(options) as (cfg, data):
        begin = time.perf_counter()
        state, fast, loader, micro_steps = gpt.set_up(
            cfg, runtime, gpt.TokenShards(cfg.data_dir, "train")
        )
        model, cfg, B, G = state.model, state.model.cfg, loader.B, loader.G
        max_steps, waits = cfg.max_steps or loader.steps_per_epoch(), []
        with contextlib.closing(loader.stream(0, micro_steps)) as stream:
            batches = timed(stream, waits)

            def step():
                lr = gpt.lr_at(state.step, cfg, max_steps)
                loss, _, _ = gpt.train_step(fast, state, batches, micro_steps, lr, runtime)
                runtime.synchronize()  # train_step leaves the optimizer running
                return loss

            step()
            first_step = time.perf_counter() - begin
            seconds, losses = take_turns({"step": step}, cfg.steps)
        median, p10, p90 = np.percentile(seconds["step"], [50, 10, 90]).tolist()
        rate = G * cfg.block_size / median
        peak = hardware.peak_flops(runtime.device, runtime.dtype) * runtime.world
        return {
            **described(runtime, model),
            "data": data,
            "compiled": cfg.compile_model and not hardware.compile_obstacle(runtime.device),
            "batch": f"{B} x {cfg.block_size} x {micro_steps} micro-steps",
            "tokens_per_step": G * cfg.block_size,
            "first_step_s": first_step,  # from making the model on, with compiling
            "step_s_median": median,
            "step_s_p10": p10,
            "step_s_p90": p90,
            "tokens_per_s": rate,
            "mfu": model.flops_per_token() * rate / peak if peak else None,
            "peak_memory_gib": runtime.peak_memory() / 2**30 or None,
            "data_wait_s_per_step": sum(waits[micro_steps:]) / cfg.steps,
            "last_loss": losses["step"],
        }


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

    with tempfile.TemporaryDirectory() as folder:
        each = 10**12  # tokens a file: file systems end at 16 TB
        for number, start in enumerate(range(0, tokens, each), 1):
            size = min(each, tokens - start)
            path = Path(folder, f"edufineweb_train_{number:06d}.npy")
            with open(path, "wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (size,)}
                np.lib.format.write_array_header_1_0(file, header)
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
            lines = (json.dumps({"text": text}) + "\n" for text in fineweb.python_docs())
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
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
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
    encode(fineweb.large_strings(["what a first call sets up"]))
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


@dataclass(frozen=True)
class SampleOptions(ModelOptions):
    max_new_tokens: int = 256  # tokens a sample
    batch: int = 1  # samples at once


def open_model(options):
    """(Runtime, GPT on its device, the figures that describe them)."""
    sizes = {key: getattr(options, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    cfg = gpt.Config(**sizes)
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
        sides = {"batched": hellaswag.predictions, "one_at_a_time": one_at_a_time}
        sides = {name: functools.partial(score, way, tasks) for name, way in sides.items()}
        seconds, picks = take_turns(sides, options.rounds)
    agreeing = sum(a == b for a, b in zip(*picks.values(), strict=True))
    # below float32 rounding may turn a near tie
    figures |= {"tasks": len(tasks), "tasks_that_agree": agreeing}
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
    theirs = GPT2LMHeadModel(GPT2Config(**sizes)).to(runtime.device, runtime.dtype).eval()
    how = dict(do_sample=True, top_k=50, pad_token_id=gpt.END_OF_TEXT)

    def sample(idx, length):
        theirs.generate(idx, min_new_tokens=length, max_new_tokens=length, **how)

    return sample


def bench_sample(options):
    """generate() with its cache, beside itself without, and transformers where it is installed"""
    runtime, model, figures = open_model(options)
    idx = torch.zeros(options.batch, 1, dtype=torch.long, device=runtime.device)

    def sample(generate, length, **how):
        generator = torch.Generator(runtime.device).manual_seed(1337)
        with gpt.evaluating(model, runtime):
            new = generate(model, idx, length, gpt.Sampling(top_k=50), generator, **how)
            return torch.cat(list(new), dim=1).tolist()  # waits for the device

    def cached(length):
        return sample(gpt.generate, length, step=best_step(runtime.device))

    # a trained model may end early: the same seed at the same token, so all make as many
    length = len(cached(options.max_new_tokens)[0])
    sides = {"cached": functools.partial(cached, length)}
    sides["uncached"] = functools.partial(sample, generate_uncached, length)
    if importlib.util.find_spec("transformers") and length < model.cfg.block_size:
        sides["transformers"] = functools.partial(transformers_sampler(model, runtime), idx, length)
    seconds, _ = take_turns(sides, options.rounds)
    figures |= {"batch": options.batch, "new_tokens": length}
    return figures | compare(seconds, length * options.batch, "tokens")


# ---------------------------------------------------------------- main

COMMANDS = {
    "train": (bench_train, TrainOptions),
    "loader": (bench_loader, TrainOptions),
    "tokenize": (bench_tokenize, TokenizeOptions),
    "hellaswag": (bench_hellaswag, HellaSwagOptions),
    "sample": (bench_sample, SampleOptions),
}
AT_LEAST_ONE = ("steps", "tokens", "rounds", "max_new_tokens", "batch")


def main():
    name, *argv = sys.argv[1:] or [""]
    if name not in COMMANDS:
        print(__doc__)
        for command, (bench, _) in COMMANDS.items():
            print(f"    {command:10} {bench.__doc__}")
        sys.exit(0 if name in ("-h", "--help") else 2)
    bench, kind = COMMANDS[name]
    if kind is TrainOptions:
        options, _ = gpt.load_config(argv, kind, __doc__)
    else:
        options = fineweb.command_line(kind, __doc__, argv, prog=f"bench.py {name}")
    for key, value in asdict(options).items():
        if key in AT_LEAST_ONE and value < 1:
            raise UserError(f"{key}={value} must be 1 or more")
    figures = bench(options)
    if os.environ.get("RANK", "0") == "0":
        report({"bench": name, **figures}, options.json)


if __name__ == "__main__":
    fineweb.run(main)
