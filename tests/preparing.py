"""What the tests of fineweb.py and hub.py share: texts, folders of shards, runs that are killed."""

import contextlib
import copy
import itertools
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch.distributed

import fineweb
from fineweb import END_OF_TEXT, Options, open_shard

ROOT = Path(fineweb.__file__).parent
with_sigkill = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
TEXTS = [f"Document {i}: the cat's {'very ' * i}long tail, été {i * i}.\n" for i in range(40)]


def reference(texts):
    encode = fineweb.tokenizer().encode_ordinary
    return [token for text in texts if text for token in [END_OF_TEXT, *encode(text)]]


def shard_paths(folder):
    return sorted(Path(folder).glob("edufineweb_*"), key=lambda path: path.name[-10:])


def stream(folder):
    return np.concatenate([open_shard(path) for path in shard_paths(folder)]).tolist()


def manifest_of(folder):
    return json.loads(Path(folder, "manifest.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_parquet(path, texts, **options):
    texts = texts if isinstance(texts, pyarrow.Array) else pyarrow.array(texts, pyarrow.string())
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, **options)
    return path


@contextlib.contextmanager
def patched(*changes):
    """Set (object, attribute, value) for a while: for hypothesis, which shares no fixture."""
    with pytest.MonkeyPatch.context() as patch:
        for change in changes:
            patch.setattr(*change)
        yield


def flags(options):
    """The command line of Options."""
    default = Options()
    named = {key: getattr(options, key) for key in Options.__dataclass_fields__}
    changed = {key: value for key, value in named.items() if value != getattr(default, key)}
    inputs = changed.pop("input", ())
    line = [f"--{key}={value}" for key, value in changed.items()]
    return [*line, "--input", *inputs] if inputs else line


class Killed(Exception):
    """Stands for the end of a process."""


def owner_of(path, world):
    """The rank that writes this file of an output folder."""
    if (number := fineweb.shard_number(Path(path).name)) >= 0:
        return number // (1_000_000 // world)
    match = re.fullmatch(r"manifest\.partial\.(\d+)\.json", Path(path).name)
    return int(match[1]) if match else 0


@contextlib.contextmanager
def killed_at(step, after, rank=0, world=1):
    """End a rank at its `step`-th change of the folder, before or after it.

    A change is the renaming of a shard or manifest to its name, and the deletion of a manifest.
    """
    steps, replace, unlink = itertools.count(1), os.replace, Path.unlink

    def change(owner, act, *args, **keys):
        now = next(steps) if owner == rank else 0
        if now > step or (now == step and not after):  # the dead change nothing
            raise Killed
        act(*args, **keys)
        if now == step:
            raise Killed

    def replacing(temporary, path):
        change(owner_of(path, world), replace, temporary, path)

    def unlinking(path, missing_ok=False):
        deleter = 0 if path.name.startswith("manifest") else None
        change(deleter, unlink, path, missing_ok=missing_ok)

    with patched((os, "replace", replacing), (Path, "unlink", unlinking)):
        yield


def interrupted(options, step, after):
    """Whether a run with these options was killed at a step, before it could end."""
    try:
        with killed_at(step, after):
            fineweb.prepare(options)
    except Killed:
        return True
    return False


def make_ranks(world):
    """fineweb.Ranks for each rank of a torchrun of this many, in threads instead of processes."""
    meeting, values = threading.Barrier(world), [None] * world

    class Rank(fineweb.Ranks):
        def gather(self, value=None):
            values[self.rank] = copy.deepcopy(value)
            meeting.wait(20)
            gathered = list(values)
            meeting.wait(20)
            return gathered

        abort = meeting.abort

    def make(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(world))
            patch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
            return Rank()

    return [make(rank) for rank in range(world)]


def prepare_in_ranks(world, options):
    """fineweb.prepare, as torchrun would run it; where one rank fails, the others end too."""
    own, errors, alone = threading.local(), [], []

    def work(ranks):
        own.ranks = ranks
        try:
            fineweb.prepare(options)
        except threading.BrokenBarrierError:
            alone.append(ranks.rank)
        except Exception as error:
            errors.append(error)
            ranks.abort()

    members = make_ranks(world)
    with patched((fineweb, "Ranks", lambda: own.ranks)), ThreadPoolExecutor(world) as pool:
        list(pool.map(work, members))
    if errors:
        raise errors[0]
    assert not alone, f"ranks {alone} waited in vain for the others, which have not failed"


def bin_bytes(tokens, promised=None, magic=20240520, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()
