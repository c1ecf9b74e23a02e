import contextlib
import threading
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from fineweb import open_shard
from train_gpt2 import Loader, TokenShards, random_words, shuffled

AWKWARD = [1, 2, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 31, 63, 64, 65, 97, 255, 256, 257, 1023, 4097]


def rank_of(rank=0, world=1):
    """As much of a Runtime as the loader reads."""
    return SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))


@pytest.fixture
def make_loader(tmp_path, write_shards, tiny):
    """A loader of n windows of T tokens and a few to spare; every token is its own position."""

    def make(n, B=1, G=1, T=4, spare=2, runtime=None, **keys):
        length = n * T + 1 + spare
        folder = tmp_path / f"{n}-{T}-{spare}"
        if not folder.exists():
            write_shards(folder, np.arange(length), sizes=(length // 3, 1, length // 5))
        cfg = replace(tiny, block_size=T, vocab_size=65536, data_dir=str(folder), **keys)
        return Loader(TokenShards(cfg.data_dir, "train"), cfg, runtime or rank_of(), B, G)

    return make


def sequences(loader, steps):
    """Every sequence of the given steps in their global order (steps * G, T + 1)."""
    parts = []
    for step in steps:
        for micro in range(loader.G // loader.B):
            parts.append(loader.batch(step, micro))
    return torch.cat(parts)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("n", AWKWARD)
def test_shuffled_is_a_permutation(n):
    for seed in range(5):
        keys = random_words(seed, n=6)
        assert np.sort(shuffled(np.arange(n), n, keys)).tolist() == list(range(n))


def test_permutation_of_any_index_needs_no_other():
    keys = random_words(1, n=6)
    whole = shuffled(np.arange(1000), 1000, keys)
    assert [int(shuffled(np.array([i]), 1000, keys)[0]) for i in range(0, 1000, 83)] == [
        int(x) for x in whole[::83]
    ]
    huge = 10**12 + 39
    some = shuffled(np.arange(huge - 1000, huge), huge, keys)
    assert len(np.unique(some)) == 1000 and some.max() < huge


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_uncorrelated(seed):
    n = 10_007
    order = shuffled(np.arange(n), n, random_words(seed, n=6)).astype(float)
    for other in (np.roll(order, 1), np.roll(order, 2), np.roll(order, 64), np.arange(n)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.04  # 4 standard errors
    assert np.mean(np.abs(np.diff(order)) < 10) < 0.006  # by chance 19 / n = 0.002


@pytest.mark.parametrize("n", AWKWARD[:-2])
def test_each_window_comes_exactly_once_an_epoch(make_loader, n):
    loader = make_loader(n, G=3)
    starts = sequences(loader, range(n))[:, 0]  # 3 epochs in n steps, borders amid steps
    for epoch in starts.view(3, n).tolist():
        offset = min(epoch)
        assert 0 <= offset <= 2
        assert sorted(epoch) == [offset + 4 * i for i in range(n)]


def test_epochs_and_seeds_differ_and_the_same_seed_does_not(make_loader):
    loader = make_loader(97, G=97)
    first, second = sequences(loader, [0]), sequences(loader, [1])
    other = sequences(make_loader(97, G=97, seed=1), [0])
    for order in (second, other):
        assert (first == order).all(dim=1).sum() < 10
    assert torch.equal(sequences(make_loader(97, G=97), [0]), first)


def test_offsets_reach_every_token(make_loader):
    loader = make_loader(2, G=2, spare=3)
    offsets = {int(sequences(loader, [epoch])[:, 0].min()) for epoch in range(100)}
    assert offsets == {0, 1, 2, 3}


def test_without_shuffle_the_order_is_sequential(make_loader):
    loader = make_loader(7, G=2, shuffle=False)
    starts = sequences(loader, range(7))[:, 0]
    assert starts.tolist() == [4 * (i % 7) for i in range(14)]


def test_steps_of_an_epoch_are_rounded_up(make_loader):
    assert [make_loader(n, G=8).steps_per_epoch() for n in (1, 8, 9, 16, 17)] == [1, 1, 2, 2, 3]


# ---------------------------------------------------------------- batches


def test_global_batch_is_the_same_for_any_world_and_micro_batch(make_loader):
    expected = sequences(make_loader(21, B=8, G=8), range(6))  # crosses epochs amid steps
    for world, B in [(1, 1), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)]:
        ranks = [make_loader(21, B=B, G=8, runtime=rank_of(r, world)) for r in range(world)]
        parts = [
            loader.batch(step, micro)
            for step in range(6)
            for micro in range(8 // B // world)
            for loader in ranks
        ]
        assert torch.equal(torch.cat(parts), expected), f"world={world} B={B}"


def test_targets_are_inputs_shifted_by_one(make_loader):
    with contextlib.closing(make_loader(21, B=2, G=4).stream(0, 2)) as stream:
        for inputs, targets in islice(stream, 30):
            assert inputs.shape == targets.shape == (2, 4)
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(targets, inputs + 1)


def test_stream_from_a_step_equals_the_whole_stream_skipped_to_it(make_loader):
    loader = make_loader(21, B=2, G=4)
    with contextlib.closing(loader.stream(0, 2)) as stream:
        whole = [inputs for inputs, _ in islice(stream, 40)]
    for step in (1, 5, 6, 17):
        with contextlib.closing(loader.stream(step, 2)) as stream:
            for expected in whole[2 * step :]:
                assert torch.equal(next(stream)[0], expected)


def test_closed_stream_leaves_no_thread(make_loader):
    before = threading.active_count()
    stream = make_loader(21).stream(0, 1)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_error_of_the_reading_thread_reaches_the_training(make_loader):
    loader = make_loader(21)
    loader.cfg = replace(loader.cfg, vocab_size=3)
    with pytest.raises(UserError, match="token id"), contextlib.closing(loader.stream(0, 1)) as s:
        next(s)


@pytest.mark.parametrize("device, pinned", [("cuda", True), ("mps", False), ("cpu", False)])
def test_batches_are_pinned_for_cuda_alone(make_loader, monkeypatch, device, pinned):
    """On a Mac pinned memory has ended programs with a segmentation fault."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tokens: asked.append(1) or tokens)
    loader = make_loader(21)
    loader.runtime.device = torch.device(device)
    loader.batch(0, 0)
    assert bool(asked) == pinned


def test_only_a_copy_of_pinned_memory_may_go_on_beside_the_program(make_loader, monkeypatch):
    """The memory of another may have been given away before it is read."""
    copies, to = [], torch.Tensor.to

    def copy(tokens, *args, non_blocking=False, **keys):
        copies.append((tokens.is_pinned(), non_blocking))
        return to(tokens, *args, non_blocking=non_blocking, **keys)

    monkeypatch.setattr(torch.Tensor, "to", copy)
    with contextlib.closing(make_loader(21).stream(0, 1)) as stream:
        next(stream)
    assert copies == [(False, False)]


# ---------------------------------------------------------------- shards


def test_windows_go_on_across_shard_borders(tmp_path, write_shards):
    tokens = np.random.default_rng(0).integers(0, 50257, 60)
    shards = TokenShards(write_shards(tmp_path / "a", tokens, sizes=(5, 1, 1, 23, 2)), "train")
    assert len(shards) == 60
    for start in range(60):
        for length in range(1, 61 - start):
            assert shards.read(start, length).tolist() == tokens[start : start + length].tolist()


def test_splits_are_apart(shards):
    assert len(TokenShards(shards, "train")) == 2077
    assert len(TokenShards(shards, "val")) == 600


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_bin_shards_read_the_same_as_npy(tmp_path, write_shards):
    tokens = np.random.default_rng(0).integers(0, 65536, 60)
    as_npy = TokenShards(write_shards(tmp_path / "npy", tokens, sizes=(20,)), "train")
    (tmp_path / "bin").mkdir()
    write_bin(tmp_path / "bin" / "fineweb_train_000001.bin", tokens[:20])
    write_bin(tmp_path / "bin" / "fineweb_train_000002.bin", tokens[20:])
    as_bin = TokenShards(str(tmp_path / "bin"), "train")
    assert as_bin.read(0, 60).tolist() == as_npy.read(0, 60).tolist() == tokens.tolist()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


SPOILT = {
    "text.npy": lambda path: path.write_text("not an array"),
    "empty.npy": lambda path: path.touch(),
    "cut.npy": lambda path: (np.save(path, np.zeros(99, np.uint16)), cut(path, 200)),
    "cut_header.npy": lambda path: (np.save(path, np.zeros(99, np.uint16)), cut(path, 60)),
    "floats.npy": lambda path: np.save(path, np.zeros(99, np.float32)),
    "matrix.npy": lambda path: np.save(path, np.zeros((9, 9), np.uint16)),
    "nothing.npy": lambda path: np.save(path, np.zeros(0, np.uint16)),
    "objects.npy": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "text.bin": lambda path: path.write_text("not tokens"),
    "empty.bin": lambda path: path.touch(),
    "magic.bin": lambda path: write_bin(path, [1, 2, 3], magic=20240521),
    "version.bin": lambda path: write_bin(path, [1, 2, 3], version=2),
    "cut.bin": lambda path: write_bin(path, [1, 2, 3], count=4),
    "long.bin": lambda path: write_bin(path, [1, 2, 3], count=2),
    "negative.bin": lambda path: write_bin(path, [], count=-1),
    "nothing.bin": lambda path: write_bin(path, []),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_or_foreign_shard_is_one_clear_error(tmp_path, name):
    path = tmp_path / f"a_train_{name}"
    SPOILT[name](path)
    with pytest.raises(UserError) as error:
        TokenShards(str(tmp_path), "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_shards_of_llm_c_are_found_by_its_names(tmp_path):
    for split, tokens in (("train", [1, 2, 3]), ("val", [4, 5])):
        write_bin(tmp_path / f"TinyStories_{split}.bin", tokens)
        assert TokenShards(str(tmp_path), split).paths == [tmp_path / f"TinyStories_{split}.bin"]


def test_missing_shard_is_named(tmp_path):
    for name in ("a.npy", "a.bin"):
        with pytest.raises(UserError, match=f"{name}: No such file"):
            open_shard(tmp_path / name)


def test_token_outside_the_vocabulary_names_folder_id_and_vocabulary(tmp_path, write_shards, tiny):
    tokens = np.arange(100)
    tokens[50] = 512
    cfg = replace(tiny, data_dir=write_shards(tmp_path / "a", tokens))
    shards = TokenShards(cfg.data_dir, "train")
    assert shards.windows([0, 30], cfg).shape == (2, 17)
    with pytest.raises(UserError, match=r"a/ holds token id 512, vocab_size=512"):
        shards.windows([0, 40], cfg)


def test_too_few_tokens_for_one_window_is_an_error(tmp_path, write_shards, tiny):
    for length, enough in ((16, False), (17, True)):
        cfg = replace(tiny, data_dir=write_shards(tmp_path / str(length), np.zeros(length)))
        with contextlib.nullcontext() if enough else pytest.raises(UserError, match="16 tokens"):
            assert Loader(TokenShards(cfg.data_dir, "train"), cfg, rank_of(), 1, 1).n == 1
