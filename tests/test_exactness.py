"""That any run can be stopped, moved, resumed and trusted; faults.py holds what goes wrong."""

import ast
import builtins
import contextlib
import errno
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fineweb
import hardware
import runs
import train_gpt2
from common import UserError, run
from train_gpt2 import GPT, Loader, TokenShards

ROOT = Path(__file__).parents[1]
OWN_TASKS = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
EXACT = ("train", "val", "hella", "lr", "norm")  # streams of log.txt that a kill must not change
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL, torchrun libuv")


def ranks(n, *more):
    return (*TORCHRUN, f"--nproc_per_node={n}", *more)


def numbers(folder):
    """log.txt as {stream: {step: text}}; the last line of a step counts, torn lines do not."""
    streams = {}
    for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines():
        if len(words := line.split()) == 3:
            step, stream, value = words
            streams.setdefault(stream, {})[int(step)] = value
    return streams


def losses(folder):
    return {step: float(value) for step, value in numbers(folder)["train"].items()}


def newest(folder):
    return torch.load(runs.checkpoints(folder)[-1], weights_only=True)


def assert_same_bits(a, b, where=""):
    """Two trees of dicts, lists, numbers and tensors are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(folder, whole, streams=EXACT):
    """The numbers of every step, the last checkpoint and best.pt are those of a whole run."""
    told, expected = numbers(folder), numbers(whole)
    for stream in streams:
        assert told[stream] == expected[stream], stream
    for a, b in ((newest(folder), newest(whole)), *both(folder, whole, "best.pt")):
        a.pop("config"), b.pop("config")  # its run_name differs
        assert_same_bits(a, b)
    assert not list(folder.glob(".*")), "something half-written is left"


def both(folder, whole, name):
    if (whole / name).exists():
        yield tuple(torch.load(f / name, weights_only=True) for f in (folder, whole))


@pytest.fixture
def full_run(tiny_run):
    """`tiny_run` with all that log.txt can hold: validation, HellaSwag; and with checkpoints."""
    return replace(
        tiny_run, n_embd=16, vocab_size=50304, max_steps=12, total_batch_size=64,
        micro_batch_size=2, eval_interval=4, eval_tokens=64, checkpoint_interval=3,
        hellaswag_examples=4, hellaswag_path=str(OWN_TASKS),
    )  # fmt: skip


# ---------------------------------------------------------------- exact resume

INSTANTS = [  # in a run of 12 steps, with checkpoints at 3, 6, 9, 12 and evaluations at 4, 8, 12
    ["config", 1], ["half a line", 1], ["evaluation", 2], ["backward", 4],
    ["half a checkpoint", 1], ["rename", 1], ["renamed", 1],  # step 3's
    ["updated", 2], ["update", 3], ["evaluation", 3], ["evaluation", 5],  # the last: HellaSwag
    ["half a checkpoint", 1], ["rename", 1],  # best.pt
    ["half a checkpoint", 2], ["rename", 2], ["renamed", 2],  # step 6's
    ["half a line", 4], ["renamed", 2], ["half a line", 2],  # step 9's checkpoint
    ["renamed", 1], ["half a line", 1], ["evaluation", 5],  # step 12's: all is done but the end
]  # fmt: skip


@posix
@pytest.mark.parametrize("dropout", [0.2, pytest.param(0.0, marks=pytest.mark.slow)])
def test_run_killed_at_every_kind_of_instant_equals_one_never_stopped(
    full_run, train, run_faulty, write_toml, dropout
):
    cfg = replace(full_run, dropout=dropout)
    whole, _ = train(replace(cfg, run_name="whole"))
    lives = [[["kill", *instant]] for instant in INSTANTS] + [[]]
    done = run_faulty(lives, write_toml(cfg), "--resume=True")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ended with -9\n") == len(INSTANTS), done.stdout
    assert_same_run(Path(cfg.log_dir) / "run", whole)
    print(f"dropout {dropout}: survived {len(INSTANTS)} kills")


def random_life(draw, log):
    """A way to be killed: by itself at a place, or from outside, anywhere from its start on."""
    places = ["backward", "update", "updated", "half a checkpoint", "rename", "renamed"]
    places += ["evaluation", "half a line"]
    if draw.random() < 0.5:
        return [["kill", draw.choice(places), draw.randint(1, 12)]]
    return [["outside", str(log), draw.choice([0, *range(1, 1200)]), draw.uniform(0, 0.05)]]


@posix
@pytest.mark.parametrize(
    "kills, dropout, seed",
    [
        (4, 0.0, 1),
        pytest.param(40, 0.2, 2, marks=pytest.mark.slow),
        pytest.param(40, 0.0, 3, marks=pytest.mark.slow),
    ],
)
def test_run_killed_at_random_instants_equals_one_never_stopped(
    full_run, train, run_faulty, write_toml, kills, dropout, seed
):
    cfg = replace(
        full_run, dropout=dropout, max_steps=8 * kills, checkpoint_interval=2, eval_interval=5,
        total_batch_size=32,
    )  # fmt: skip
    whole, _ = train(replace(cfg, run_name="whole"))
    folder, draw = Path(cfg.log_dir) / "run", random.Random(seed)
    lives = [random_life(draw, folder / "log.txt") for _ in range(kills)] + [[]]
    print(f"seed {seed}: {json.dumps(lives)}")
    done = run_faulty(lives, write_toml(cfg), "--resume=True")
    assert done.returncode == 0, done.stderr
    survived = done.stdout.count("ended with -9\n")
    print(f"survived {survived} kills in {kills} lives")
    assert survived >= 0.75 * kills  # those drawn after the run's end cannot come
    assert_same_run(folder, whole)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_killed_one_or_all_equal_a_group_never_stopped(
    full_run, run_faulty, write_toml, world, dropout
):
    cfg = replace(full_run, dropout=dropout, total_batch_size=128)
    log = Path(cfg.log_dir)
    whole = run_faulty(
        [[]], write_toml(replace(cfg, run_name="whole"), "whole.toml"), launcher=ranks(world)
    )
    assert whole.returncode == 0, whole.stderr
    name, kills = write_toml(cfg), 0
    for life in (
        [["kill", "updated", 5, 1]],  # rank 1 alone, in the middle of a step
        [["kill", "half a checkpoint", 1, 0]],
        [["kill", "update", 3]],  # the whole group
        [["kill", "rename", 1, 0], ["kill", "evaluation", 5, 1]],
        [],
    ):
        done = run_faulty([life], name, "--resume=True", launcher=ranks(world))
        assert (done.returncode == 0) == (not life), done.stderr
        kills += done.stdout.count("killed on rank")
    assert kills >= 4
    assert_same_run(log / "run", log / "whole")
    print(f"{world} ranks, dropout {dropout}: survived {kills} kills")


# ---------------------------------------------------------------- any number of ranks


def rank_of(rank=0, world=1):
    """As much of a Runtime as the loader reads."""
    return SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))


class Table:
    """Shards of N tokens that are nowhere: window i is its own number and place."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return self.tokens

    def windows(self, starts, cfg):
        return torch.from_numpy(np.asarray(starts, dtype=np.int64)[:, None])


def starts_of(step, world, B, G, tokens, cfg):
    """First tokens of a step's sequences, as the ranks read them: micro-step after micro-step."""
    loaders = [Loader(Table(tokens), cfg, rank_of(rank, world), B, G) for rank in range(world)]
    parts = [r.batch(step, micro) for micro in range(G // (B * world)) for r in loaders]
    return torch.cat(parts).flatten().tolist()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(9, 10**13), step=st.integers(0, 10**7), seed=st.integers(0, 2**64 - 1),
    log_G=st.integers(2, 6),
)  # fmt: skip
def test_windows_of_a_step_are_the_same_in_the_same_order_on_any_ranks(tokens, step, seed, log_G):
    cfg, G = train_gpt2.Config(block_size=8, seed=seed), 2**log_G
    expected = starts_of(step, 1, G, G, tokens, cfg)
    assert len(expected) == G
    for world in (1, 2, 4):
        for B in {1, 2, G // world} - {0}:
            if G % (B * world) == 0:
                assert starts_of(step, world, B, G, tokens, cfg) == expected, f"{world=} {B=}"


def assert_close_losses(folder, expected):
    actual = losses(folder)
    assert actual.keys() == expected.keys()
    furthest = max(abs(actual[step] - expected[step]) for step in expected)
    print(f"losses of {len(expected)} steps differ by at most {furthest:.1e}")
    assert furthest <= 1e-5


@posix
@pytest.mark.parametrize(
    "world, B",
    [(2, 2), *(pytest.param(n, B, marks=pytest.mark.slow) for n in (2, 4) for B in (1,))],
)
def test_losses_of_fifty_steps_are_the_same_on_any_ranks(
    tiny_run, train, run_faulty, write_toml, world, B
):
    cfg = replace(tiny_run, max_steps=50, learning_rate=3e-3)
    whole, _ = train(replace(cfg, run_name="whole", micro_batch_size=8))
    name = write_toml(replace(cfg, micro_batch_size=B))
    done = run_faulty([[]], name, launcher=ranks(world))
    assert done.returncode == 0, done.stderr
    assert_close_losses(Path(cfg.log_dir) / "run", losses(whole))


@posix
def test_run_begun_on_one_rank_resumes_on_two(tiny_run, train, run_faulty, write_toml):
    cfg = replace(tiny_run, max_steps=30, learning_rate=3e-3, checkpoint_interval=10)
    whole, _ = train(replace(cfg, run_name="whole", keep_checkpoints=3))
    folder = Path(cfg.log_dir) / "run"
    shutil.copytree(whole, folder)
    for late in ("step_000020.pt", "step_000030.pt"):
        (folder / late).unlink()
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    begun = [line for line in lines if int(line.split()[0]) < 13]  # killed soon after step 10
    (folder / "log.txt").write_text("".join(begun))
    done = run_faulty([[]], write_toml(cfg), "--resume=True", launcher=ranks(2))
    assert done.returncode == 0 and "step_000010.pt: step 10" in done.stdout, done.stderr
    assert_close_losses(folder, losses(whole))


# ---------------------------------------------------------------- the loader, at any size

PRIMES = [5, 7, 11, 13, 97, 251, 509, 1021, 7919, 65_537, 99_991]
AROUND = [2**k + d for k in (2, 3, 4, 5, 8, 10, 12, 16) for d in (-1, 0, 1)]


def epoch(n, e, seed=1337, spare=2, T=4):
    """First tokens of the windows of epoch e, in their order."""
    cfg = train_gpt2.Config(block_size=T, seed=seed)
    return Loader(Table(n * T + 1 + spare), cfg, rank_of(), 1, 1).starts(e * n, n)


def assert_each_once(starts, n, spare=2, T=4):
    offset = starts.min()
    assert 0 <= offset <= spare
    assert np.array_equal(np.sort(starts), offset + T * np.arange(n))


@pytest.mark.parametrize("n", sorted({1, 2, 3, *PRIMES, *AROUND}))
def test_each_window_comes_once_an_epoch_for_awkward_counts(n):
    for e in (0, 1, 10_000):
        assert_each_once(epoch(n, e), n)


@settings(deadline=None)
@given(n=st.integers(1, 20_000), e=st.integers(0, 10**6), seed=st.integers(0, 2**64 - 1))
def test_each_window_comes_once_an_epoch_for_any_count(n, e, seed):
    assert_each_once(epoch(n, e, seed), n)


def correlation(a, b):
    return abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1])


@pytest.mark.parametrize("n", [99_991, 100_000, 2**17 - 1])
@pytest.mark.parametrize("seed", [1337, 1])
def test_order_shows_no_correlation(n, seed):
    order, bound = epoch(n, 0, seed), 5 / math.sqrt(n)  # 5 standard errors
    for distance in (1, 2, 3, 8, 512):
        assert correlation(order[distance:], order[:-distance]) < bound, distance
    for other in (np.arange(n), epoch(n, 1, seed), epoch(n, 2, seed), epoch(n, 0, seed + 1)):
        assert correlation(order, other) < bound
        assert np.mean(order == other) < 20 / n  # by chance 1 / n
    tenths = np.bincount(order[: n // 10] * 10 // (order.max() + 1), minlength=10)
    assert tenths.max() - tenths.min() < 0.2 * n / 100  # 6 standard errors


def test_fifteen_trillion_tokens_start_and_give_a_batch_in_bounded_time_and_memory():
    cost = {}
    Loader(Table(10**6), train_gpt2.Config(), rank_of(), 64, 512).batch(0, 0)  # numpy imports more
    for tokens in (10**6, 15 * 10**12):
        tracemalloc.start()
        begun = time.perf_counter()
        loader = Loader(Table(tokens), train_gpt2.Config(), rank_of(), 64, 512)
        for step in (0, 10**6, loader.steps_per_epoch()):
            starts = loader.batch(step, 0)
            assert starts.shape == (64, 1) and starts.min() >= 0
            assert starts.max() + loader.T + 1 <= tokens
        cost[tokens] = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    for seconds, peak in cost.values():
        assert seconds < 1 and peak < 200_000
    print(
        {f"{n:.0e}": f"{s * 1000:.1f} ms, {peak / 1024:.0f} KiB" for n, (s, peak) in cost.items()}
    )


@pytest.mark.skipif(sys.platform == "win32", reason="files there are not sparse unasked")
def test_terabytes_of_shards_are_read_at_their_far_end(tmp_path):
    """Sparse files, of 5 TB on a disk that has the room of none."""
    (tmp_path / "big").mkdir()
    header = {"descr": "<u2", "fortran_order": False, "shape": (2_500_000_000_000,)}
    marks = [(0, 11), (1, 12), (-2, 13), (-1, 14)]
    try:
        for i in range(2):
            with open(tmp_path / "big" / f"edufineweb_train_{i:06d}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                begin = file.tell()
                file.truncate(begin + 2 * header["shape"][0])
                for place, token in marks:
                    file.seek(begin + 2 * (place % header["shape"][0]))
                    file.write((token + 100 * i).to_bytes(2, "little"))
    except OSError as error:
        pytest.skip(f"no sparse files of this size here: {error}")
    tracemalloc.start()
    begun = time.perf_counter()
    shards = TokenShards(str(tmp_path / "big"), "train")
    assert len(shards) == 2 * header["shape"][0]
    assert shards.read(len(shards) - 3, 3).tolist() == [0, 113, 114]
    assert shards.read(header["shape"][0] - 3, 6).tolist() == [0, 13, 14, 111, 112, 0]
    cfg = train_gpt2.Config(shuffle=False)
    loader = Loader(shards, cfg, rank_of(), 4, 4)
    last = loader.batch(loader.n // 4 - 1, 0)
    assert last.shape == (4, 1025)
    assert loader.starts(loader.n - 1, 1)[0] == (loader.n - 1) * 1024 <= len(shards) - 1025
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - begun < 5 and peak < 1_000_000


def test_more_shards_than_stay_mapped_are_read_right(tmp_path, write_shards):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    shards = TokenShards(write_shards(tmp_path / "many", tokens, sizes=[7] * 130), "train")
    assert len(shards.paths) == 131
    for start in [*range(0, 980, 13), *range(980, 0, -17)]:
        assert shards.read(start, 20).tolist() == tokens[start : start + 20].tolist()
    assert shards.read(0, 1000).tolist() == tokens.tolist()
    assert shards.open.cache_info().currsize == 64


# ---------------------------------------------------------------- checkpoints


FOREIGN = {
    "empty": lambda path, whole: path.touch(),
    "torn": lambda path, whole: path.write_bytes(whole.read_bytes()[:-1000]),
    "text": lambda path, whole: path.write_text("not a checkpoint"),
    "another's tensors": lambda path, whole: torch.save({"model": {}, "epoch": 3}, path),
    "a list": lambda path, whole: torch.save([1, 2], path),
    "best.pt": lambda path, whole: shutil.copy(whole.parent / "best.pt", path),
    "a folder": lambda path, whole: path.mkdir(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_that_is_no_whole_checkpoint_is_skipped_and_said(tiny_run, train, capsys, kind):
    cfg = replace(tiny_run, checkpoint_interval=3, eval_interval=4)
    whole, _ = train(replace(cfg, run_name="whole"))
    folder, _ = train(cfg)
    bad = folder / "step_000999.pt"
    FOREIGN[kind](bad, folder / "step_000006.pt")
    (folder / "step_000008.pt").unlink()
    capsys.readouterr()
    train(replace(cfg, resume=True))
    told = capsys.readouterr().out
    assert (
        len(re.findall(rf"^{re.escape(str(bad))} .*going back to the one before$", told, re.M)) == 1
    )
    assert f"continuing {folder / 'step_000006.pt'}: step 6\n" in told
    assert_same_bits(
        *(torch.load(f / "step_000008.pt", weights_only=True)["model"] for f in (folder, whole))
    )


def test_checkpoint_just_written_is_never_the_one_that_goes(tiny_run, train):
    """A torn file of a later step does not count among those that stay."""
    cfg = replace(tiny_run, max_steps=4, checkpoint_interval=1, keep_checkpoints=1)
    folder, _ = train(cfg)
    (folder / "step_000999.pt").touch()
    train(replace(cfg, resume=True, max_steps=6))
    assert (folder / "step_000006.pt").exists()


def without(name, *keys):
    """Change a checkpoint's content: leave out what `keys` lead to."""

    def change(checkpoint):
        inner = checkpoint[name]
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return change


def other_layout(checkpoint):
    moments = checkpoint["optimizer"]["state"]
    checkpoint["optimizer"]["state"] = {key + 1: value for key, value in moments.items()}


def other_groups(checkpoint):
    first, second = checkpoint["optimizer"]["param_groups"]
    second["params"].insert(0, first["params"].pop())


CHANGED = {
    "a key of the model is missing": (without("model", "transformer.wpe.weight"), "wpe.weight"),
    "a key of the model is new": (
        lambda checkpoint: checkpoint["model"].update({"transformer.gate": torch.ones(1)}),
        r"transformer\.gate",
    ),
    "a tensor has another shape": (
        lambda checkpoint: checkpoint["model"].update({"transformer.ln_f.bias": torch.ones(3)}),
        r"ln_f\.bias",
    ),
    "a shape differs beside many keys": (
        lambda checkpoint: checkpoint["model"].update(
            {f"transformer.h.0.attn.{i}_gain.weight": torch.ones(1) for i in range(6)}
            | {"transformer.wpe.weight": torch.ones(3, 3)}
        ),
        r"5_gain.*transformer\.wpe\.weight",
    ),
    "the optimizer is of another kind": (
        lambda checkpoint: checkpoint["optimizer"]["state"].update({0: {"momentum_buffer": 1}}),
        "does not fit .KeyError",
    ),
    "the optimizer has another layout": (other_layout, "optimizer has parameters of other shapes"),
    "the optimizer has other groups": (other_groups, "optimizer has parameters of other"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_checkpoint_of_another_layout_is_one_error_that_lists_what_differs(
    tiny_run, train, runtime, kind
):
    folder, _ = train(tiny_run)
    change, named = CHANGED[kind]
    checkpoint = newest(folder)
    change(checkpoint)
    torch.save(checkpoint, folder / "step_000008.pt")
    shards = TokenShards(tiny_run.data_dir, "train")
    with pytest.raises(UserError, match=named):
        train_gpt2.set_up(replace(tiny_run, resume=True), runtime, shards)


@pytest.mark.parametrize("edit", ["another optimizer", "a parameter without a gradient"])
def test_run_of_an_edited_file_resumes_its_moments(tiny_run, train, monkeypatch, edit):
    def sgd(model, cfg):
        return torch.optim.SGD(model.parameters(), lr=cfg.learning_rate, momentum=0.9)

    def with_expert(cfg, begun):
        torch.manual_seed(cfg.seed)
        model = GPT(cfg)
        model.transformer.expert = torch.nn.Linear(8, 8)
        return model

    if edit == "another optimizer":
        monkeypatch.setattr(train_gpt2, "make_optimizer", sgd)
    else:
        monkeypatch.setattr(train_gpt2, "initial_model", with_expert)
    cfg = replace(tiny_run, warmup_steps=0, min_lr_ratio=1.0)  # one rate, whatever max_steps
    whole, _ = train(replace(cfg, run_name="whole"))
    train(replace(cfg, max_steps=4))
    resumed, _ = train(replace(cfg, resume=True))
    torch.testing.assert_close(newest(resumed)["model"], newest(whole)["model"], rtol=0, atol=0)


def test_without_room_a_line_says_so_before_writing_and_training_goes_on(
    tiny_run, train, read_log, monkeypatch, capsys
):
    cfg = replace(tiny_run, checkpoint_interval=2, eval_interval=2, max_steps=7)
    whole, _ = train(replace(cfg, run_name="whole"))
    saves, real_save, usage = [], torch.save, shutil.disk_usage

    def save(content, file):
        saves.append(content["step"])
        return real_save(content, file)

    def disk_usage(folder):  # full once steps 2 and its best.pt are there
        return SimpleNamespace(free=1000) if saves.count(2) == 2 else usage(folder)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    capsys.readouterr()
    folder = Path(cfg.log_dir) / "run"
    rest = "as told above: --resume=True goes on from .*step_000002.pt"
    with pytest.raises(UserError, match=f"step_000007.pt could not be saved, {rest}"):
        train(cfg)
    log, told = read_log(folder), capsys.readouterr().out
    assert saves == [2, 2]
    for name in ("step_000004.pt", "step_000006.pt", "step_000007.pt", "best.pt"):
        assert re.search(rf"^{name} is not saved: .* needs .*are free: free some", told, re.M), name
    assert numbers(folder)["train"] == numbers(whole)["train"] and len(log["train"]) == 7
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best.pt", "config.toml", "log.txt", "step_000002.pt"]
    assert newest(folder)["step"] == 2


class FullDisk(io.FileIO):
    """A file on a disk that is full after `room` bytes."""

    room = 0

    def write(self, data):
        if (left := self.room - self.tell()) <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(bytes(data)[:left])


@pytest.mark.parametrize("room", [0, 100, 10_000, 100_000, 200_000])
def test_disk_that_fills_up_amid_a_checkpoint_leaves_the_one_before(
    tiny_run, train, read_log, monkeypatch, capsys, room
):
    """What other programs wrote meanwhile no look at the disk beforehand can know."""
    cfg = replace(tiny_run, checkpoint_interval=2, max_steps=7)
    folder = Path(cfg.log_dir) / "run"

    def full_open(path, mode="r", *args, **kwargs):
        if "b" in mode and "w" in mode and (folder / "step_000002.pt").exists():
            return io.BufferedWriter(FullDisk(path, mode))
        return builtins.open(path, mode, *args, **kwargs)

    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(train_gpt2, "open", full_open, raising=False)
    with pytest.raises(UserError, match=r"step_000007\.pt could not be saved"):
        train(cfg)
    log, told = read_log(folder), capsys.readouterr().out
    assert len(log["train"]) == 7
    for name in ("step_000004.pt", "step_000006.pt", "step_000007.pt"):
        assert re.search(rf"^{name} is not saved: .*[Nn]o space left", told, re.MULTILINE), told
    assert sorted(p.name for p in folder.iterdir()) == ["config.toml", "log.txt", "step_000002.pt"]
    assert newest(folder)["step"] == 2


def test_run_without_room_for_a_checkpoint_is_refused_before_its_first_step(
    tiny_run, train, monkeypatch
):
    free = [hardware.checkpoint_bytes(GPT(tiny_run)) - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[0]))
    with pytest.raises(UserError, match=r"run needs .* more, .* are free: free some"):
        train(tiny_run)
    assert not Path(tiny_run.log_dir).exists()
    free[0] += 1
    train(tiny_run)
    free[0] -= 1
    train(replace(tiny_run, resume=True))  # which has nothing to save any more
    with pytest.raises(UserError, match=r"run needs .* more"):
        train(replace(tiny_run, resume=True, max_steps=9))


def test_stop_whose_checkpoint_finds_no_room_says_what_is_lost(tiny_run, train, monkeypatch):
    free = iter([hardware.checkpoint_bytes(GPT(tiny_run)), 1000])  # at the start, and at the stop
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    monkeypatch.setattr(runs, "stop_on_signal", lambda *_: contextlib.nullcontext(lambda: True))
    with pytest.raises(UserError, match=r"step_000001\.pt could not .* finds nothing to go on"):
        train(tiny_run)


def test_log_of_a_resumed_run_has_one_history(tiny_run, train):
    cfg = replace(tiny_run, max_steps=20, eval_interval=5, checkpoint_interval=5)
    folder, _ = train(replace(cfg, keep_checkpoints=9))
    for step in (15, 20):
        (folder / f"step_{step:06d}.pt").unlink()
    _, log = train(replace(cfg, resume=True, max_steps=13, eval_interval=4))
    assert list(log["train"]) == list(range(13))
    assert sorted(log["val"]) == [0, 5, 10, 12, 13]
    (folder / "step_000013.pt").unlink()
    _, log = train(replace(cfg, resume=True, max_steps=10, eval_interval=0))
    assert list(log["train"]) == list(range(10)) and sorted(log["val"]) == [0, 5, 10]


def test_frozen_weights_are_resumed_with(tiny_run, train, monkeypatch):
    class Frozen(GPT):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.transformer.wpe.weight.requires_grad_(False)

    monkeypatch.setattr(train_gpt2, "GPT", Frozen)
    cfg = replace(tiny_run, warmup_steps=99)
    whole, _ = train(replace(cfg, run_name="whole"))
    train(replace(cfg, max_steps=4))
    folder, _ = train(replace(cfg, resume=True))
    torch.testing.assert_close(newest(folder)["model"], newest(whole)["model"], rtol=0, atol=0)


def test_config_changed_on_resume_is_shown_as_a_diff_and_used(tiny_run, train, capsys):
    train(tiny_run)
    assert "\nchanged: " not in capsys.readouterr().out
    keys = dict(max_steps=12, learning_rate=1e-4, total_batch_size=64, micro_batch_size=2)
    folder, log = train(replace(tiny_run, resume=True, **keys))
    (line,) = re.findall(r"^changed: (.*)$", capsys.readouterr().out, re.MULTILINE)
    was = {key: getattr(tiny_run, key) for key in keys}
    assert sorted(line.split("; ")) == sorted(f"{k}={was[k]}, now {keys[k]}" for k in keys)
    assert len(log["train"]) == 12 and max(log["lr"][step] for step in range(8, 12)) <= 1e-4
    assert newest(folder)["config"] | {"resume": False} == vars(replace(tiny_run, **keys))
    train(replace(tiny_run, resume=True, **keys))
    assert "\nchanged: " not in capsys.readouterr().out


def test_change_of_the_architecture_on_resume_is_refused_with_all_that_differs(tiny_run, train):
    folder, _ = train(tiny_run)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    keys = dict(n_embd=64, n_layer=3, norm="rmsnorm", bias=False, qk_norm=True)
    with pytest.raises(UserError) as error:
        train(replace(tiny_run, resume=True, max_steps=99, **keys))
    for key, value in keys.items():
        assert f"{key}={getattr(tiny_run, key)}, now {value}" in str(error.value)
    assert "max_steps" not in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---------------------------------------------------------------- groups that break


@posix
@pytest.mark.slow
@pytest.mark.parametrize("exactly", [False, True])
def test_killed_rank_brings_the_group_back_and_it_ends_as_if_it_never_was(
    tiny_run, train, run_faulty, write_toml, exactly
):
    """Close to one process's run, and exactly that of two ranks never stopped."""
    cfg = replace(tiny_run, max_steps=12, checkpoint_interval=3, eval_interval=4)
    cfg = replace(cfg, dropout=0.2 if exactly else 0.0)
    fault = ["kill", "updated", 8, 1]
    group = ranks(2, "--max-restarts=2")
    done = run_faulty([[fault]], write_toml(cfg), "--rank_timeout=30", launcher=group)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed on rank 1") == 1
    assert "step_000006.pt: step 6\n" in done.stdout
    folder, whole = (Path(cfg.log_dir) / name for name in ("run", "whole"))
    cfg = replace(cfg, run_name="whole")
    if exactly:
        assert run_faulty([[]], write_toml(cfg), launcher=ranks(2)).returncode == 0
        assert_same_run(folder, whole, ("train", "val", "lr", "norm"))
    else:
        train(cfg)
        assert_close_losses(folder, losses(whole))


def test_restarts_without_a_name_are_refused(tiny_run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="--max-restarts needs a --run_name"):
        runs.choose_run_name(replace(tiny_run, run_name=""), "gpt2")


@posix
@pytest.mark.slow
def test_restarts_without_a_name_are_one_clear_error_a_start(tiny_run, run_cli, write_toml):
    name = write_toml(replace(tiny_run, run_name=""))
    group = ranks(2, "--max-restarts=1")
    done = run_cli("train_gpt2.py", name, "--rank_timeout=30", launcher=group)
    assert done.returncode != 0 and not Path(tiny_run.log_dir).exists()
    assert 1 <= done.stderr.count("error: --max-restarts needs a --run_name") <= 2
    assert 'train_gpt2.py", line' not in done.stderr, "a traceback"


@posix
@pytest.mark.slow
def test_restart_does_not_continue_a_run_that_was_refused(tiny_run, run_cli, write_toml):
    """Without --resume a taken name is refused; what torchrun starts again is to be refused too."""
    name, folder = write_toml(tiny_run), Path(tiny_run.log_dir) / "run"
    assert run_cli("train_gpt2.py", name, "--max_steps=2").returncode == 0
    before = (folder / "log.txt").read_bytes()
    group = ranks(2, "--max-restarts=1")
    done = run_cli("train_gpt2.py", name, "--rank_timeout=30", launcher=group)
    assert "holds a run" in done.stderr and done.returncode != 0
    assert (folder / "log.txt").read_bytes() == before


@pytest.mark.parametrize("trained", [False, True])
def test_refused_run_takes_back_what_a_restart_would_find_but_for_a_run_that_goes_on(
    tiny_run, monkeypatch, trained
):
    """torchrun's run id is "none" where no --rdzv-id is given: that of a run before this, too."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    folder = Path(tiny_run.log_dir) / "run"
    log = runs.open_log(folder, tiny_run)
    if not trained:
        log.close()
    with monkeypatch.context() as check:
        check.delenv("TORCHELASTIC_MAX_RESTARTS")  # what torchrun did not start, it starts no more
        with pytest.raises(UserError, match="holds a run"):
            runs.choose_run_name(replace(tiny_run, run_name="run"), "")
    assert (folder / runs.RESTARTS).exists()
    with pytest.raises(UserError, match="holds a run"):
        runs.choose_run_name(replace(tiny_run, run_name="run"), "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert runs.restarted(folder) == trained
    log.close()


@posix
def test_rank_that_hangs_ends_the_run_with_an_error_after_the_set_time(
    tiny_run, write_toml, tmp_path, free_port
):
    """Two ranks by hand: torchrun would give the hanging one 30 s more to end by itself."""
    lives = json.dumps([[["sleep", "backward", 6, 1]]])
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), lives, write_toml(tiny_run)]
    group = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port)
    processes = [
        subprocess.Popen(
            [*command, "--rank_timeout=5", "--log_interval=1"], cwd=tmp_path, text=True,
            env=group | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert any("asleep on rank 1" in line for line in processes[1].stdout)
        begun = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
        waited = time.monotonic() - begun
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert processes[0].returncode > 0 and "imed out" in err, err
    assert waited < 5 + 20  # processes of a busy machine take their time to end
    print(f"--rank_timeout=5: ended {waited:.1f} s after the other rank fell asleep")


@posix
@pytest.mark.slow
def test_stopped_rank_ends_the_group_with_an_error(tiny_run, run_faulty, write_toml):
    begun = time.monotonic()
    life = [["stop", "backward", 6, 1]]
    done = run_faulty([life], write_toml(tiny_run), "--rank_timeout=5", launcher=ranks(2))
    seconds = time.monotonic() - begun
    assert done.returncode != 0 and "imed out" in done.stderr
    assert seconds < 60  # 5, and the 30 after which torchrun kills a rank that ignores SIGTERM
    print(f"ended after {seconds:.0f} s")


# ---------------------------------------------------------------- numbers that go wrong


@posix
def test_number_that_is_not_finite_on_one_rank_is_skipped_on_all_and_ten_end_the_run(
    tiny_run, run_faulty, write_toml
):
    cfg = replace(tiny_run, max_steps=40, checkpoint_interval=4, warmup_steps=99)
    faults = [
        ["loss*nan", "step", 3, 1], ["loss*inf", "step", 5, 0], ["gradient*nan", "step", 6, 0],
        ["gradient*inf", "step", 8, 1], ["loss*1e4", "step", 9, 1], ["gradient*1e4", "step", 11, 0],
        ["digest", "step", 15], *(["loss*nan", "step", n, 1] for n in range(16, 26)),
    ]  # fmt: skip
    done = run_faulty([faults], write_toml(cfg), launcher=ranks(2))
    folder = Path(cfg.log_dir) / "run"
    log = numbers(folder)
    skipped = {
        step
        for step, loss in log["train"].items()
        if not math.isfinite(float(loss) + float(log["norm"][step]))
    }
    assert skipped == {2, 4, 5, 7, *range(15, 25)} and max(log["train"]) == 24
    assert float(log["train"][8]) > 1e3 and float(log["norm"][10]) > 20  # finite: clipped, used
    said = re.findall(r"step +(\d+) \| not finite: update skipped, (\d+) in a row", done.stdout)
    in_a_row = [(2, 1), (4, 1), (5, 2), (7, 1), *((14 + n, n) for n in range(1, 11))]
    assert [(int(step), int(n)) for step, n in said] == in_a_row
    digests = dict(re.findall(r"digest (\w+) rank (\d) step 14", done.stdout))
    assert len(re.findall("^digest", done.stdout, re.MULTILINE)) == 2 and len(digests) == 1
    assert done.returncode != 0 and "10 steps in a row had a non-finite" in done.stderr
    assert "lower learning_rate" in done.stderr and "holds step 15" in done.stderr.replace(
        "\n", " "
    )
    kept = newest(folder)
    assert kept["step"] == 15
    assert all(torch.isfinite(weight).all() for weight in kept["model"].values())


def test_spike_of_the_loss_moves_the_weights_no_more_than_any_step(tiny_run, train, monkeypatch):
    """One loss times 10,000: its gradient is clipped, and the run learns on."""
    whole, _ = train(replace(tiny_run, run_name="whole", max_steps=30))
    original = train_gpt2.train_step

    def train_step(model, state, *args):
        spike = state.step == 10
        hook = state.model.register_forward_hook(lambda *a: a[-1] * 1e4 if spike else a[-1])
        before = [p.detach().clone() for p in state.model.parameters()]
        told = original(model, state, *args)
        hook.remove()
        moves = [(p - q).abs().max() for p, q in zip(state.model.parameters(), before, strict=True)]
        moved.append(max(moves).item())
        return told

    moved = []
    monkeypatch.setattr(train_gpt2, "train_step", train_step)
    _, log = train(replace(tiny_run, max_steps=30))
    spiked, calm = log["train"], losses(whole)
    assert spiked[10] == pytest.approx(1e4 * calm[10], rel=1e-5)
    assert 0 < moved[10] < 2 * max(moved[:10])
    assert spiked[29] == pytest.approx(calm[29], abs=0.2)


# ---------------------------------------------------------------- memory


@posix
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_lack_of_memory_later_says_what_to_set(tiny_run, run_faulty, write_toml, world):
    fault = ["out of memory", "backward", 5, world - 1]
    launcher = ranks(world) if world > 1 else ()
    done = run_faulty([[fault]], write_toml(tiny_run), launcher=launcher)
    told = f"error: rank {world - 1} is out of memory: halve --micro_batch_size"
    assert done.returncode != 0 and done.stderr.count(told) == 1
    if world == 1:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, "a traceback, or more than one message"


# ---------------------------------------------------------------- --check


def test_check_says_what_a_run_would_use_and_leaves_nothing(
    tiny_run, run_cli, write_toml, tmp_path
):
    name = write_toml(replace(tiny_run, run_name="", micro_batch_size=0))
    before = sorted(tmp_path.rglob("*"))
    done = run_cli("train_gpt2.py", name, "--check")
    assert done.returncode == 0, done.stderr
    for told in (
        f"Python {sys.version.split()[0]}", f"torch {torch.__version__}", f"numpy {np.__version__}",
        "on cpu, torch.float32, ranks: 1", "flash attention", f"{tiny_run.data_dir}/, 2,077 tokens",
        "128 tokens a step = 4 sequences x 16 tokens x 2 micro-steps x 1 ranks", "disk   has room",
    ):  # fmt: skip
        assert told in done.stdout, told
    assert done.stdout.splitlines()[-1] == "ready to train"
    assert sorted(tmp_path.rglob("*")) == before


def no_data(cfg, monkeypatch):
    return replace(cfg, data_dir="nowhere")


def name_taken(cfg, monkeypatch):
    folder = Path(cfg.log_dir) / cfg.run_name
    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    return cfg


def no_room(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    return cfg


def no_batch(cfg, monkeypatch):
    return replace(cfg, total_batch_size=100)


@pytest.mark.parametrize(
    "obstacle, told",
    [
        (no_data, "no train shards in nowhere/"),
        (name_taken, "run/ holds a run: add --resume=True"),
        (no_room, "are free: free some"),
        (no_batch, "total_batch_size=100 is not a multiple"),
    ],
)
def test_check_ends_with_one_clear_error_where_training_could_not_start(
    tiny_run, write_toml, tmp_path, monkeypatch, capsys, obstacle, told
):
    monkeypatch.chdir(tmp_path)
    name = write_toml(obstacle(tiny_run, monkeypatch))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", name, "--check"])
    with pytest.raises(SystemExit) as end:
        run(train_gpt2.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and told in err
    assert len(err.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- security


class Touch:
    """Unpickled, it runs code: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_shard_with_code_in_it_is_refused_and_not_run(tmp_path):
    (tmp_path / "a").mkdir()
    hacked, path = tmp_path / "hacked", tmp_path / "a" / "edufineweb_train_000001.npy"
    np.save(path, np.array([Touch(hacked)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(str(path))):
        TokenShards(str(tmp_path / "a"), "train")
    assert not hacked.exists()


def test_checkpoint_with_code_in_it_is_skipped_on_resume_and_not_run(tiny_run, train, capsys):
    folder, _ = train(replace(tiny_run, checkpoint_interval=4))
    hacked = folder / "hacked"
    torch.save(newest(folder) | {"best": Touch(hacked)}, folder / "step_000009.pt")
    train(replace(tiny_run, resume=True, max_steps=10))
    assert "step_000009.pt is not a readable checkpoint" in capsys.readouterr().out
    assert not hacked.exists()


@pytest.mark.parametrize("name", ["../x.npy", "../edufineweb_train_000001.npy", "/etc/x", "a/../b"])
def test_manifest_cannot_lead_out_of_its_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("one two three " * 1000, encoding="utf-8")
    argv = ["fineweb.py", "--source=local", "--input", "x.txt", "--out_dir=out", "--val_tokens=64"]
    monkeypatch.setattr(sys, "argv", argv)
    fineweb.main()
    manifest = json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))
    manifest["shards"][1]["file"] = name
    Path("out/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.copy("out/edufineweb_train_000001.npy", "edufineweb_train_000001.npy")
    with pytest.raises(UserError, match=r"no whole manifest\.json"):
        fineweb.read_manifest(Path("out/manifest.json"))
    with pytest.raises(UserError):
        fineweb.main()
    with pytest.raises(UserError):
        fineweb.verify(Path("out"))


RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"}
RUNS_CODE |= {"pickle.loads", "pickle.Unpickler", "runpy.run_path", "marshal.loads", "yaml.load"}
UNSAFE = {("shell", True), ("allow_pickle", True), ("weights_only", False)}


def dangers(source):
    """(line, what) of every call in Python text that runs what it reads, or could."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keys = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in RUNS_CODE:
            yield node.lineno, name
        for key, value in UNSAFE & set(keys.items()):
            yield node.lineno, f"{key}={value}"
        if name == "torch.load" and keys.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True"


OWN = sorted([*ROOT.glob("*.py"), *ROOT.glob("plots/*.py")])


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_code_is_run_from_what_is_read(path):
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


def test_look_for_dangers_finds_each():
    for line in (
        "exec(open('x').read())", "eval('1')", "subprocess.run('ls', shell=True)", "torch.load(x)",
        "pickle.load(x)", "np.load(x, allow_pickle=True)", "torch.load(x, weights_only=False)",
        "os.system('ls')",
    ):  # fmt: skip
        assert list(dangers(line)), line
    assert not list(dangers("model.eval(); torch.load(x, weights_only=True); torch.compile(m)"))
