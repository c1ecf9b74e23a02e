"""Text to token shards, and the one place that makes the tokenizer.

    python fineweb.py                                   # FineWeb-Edu, 10B tokens -> edu_fineweb10B/
    python fineweb.py --source=pretokenized --max_shards=2     # some of it, tokenized by others
    python fineweb.py --source=local --input my_texts/  # your own .txt, .md, .jsonl, .parquet
    python fineweb.py --source=python-docs              # 0.7M tokens, no download: for a try
    torchrun --nproc_per_node=8 fineweb.py              # each process takes its part of the files
    python fineweb.py --verify edu_fineweb10B           # is every byte as it was made?

A shard is a flat array of uint16 GPT-2 tokens in which every document starts with <|endoftext|>.
Shard 0 is the validation split. manifest.json beside the shards says what they hold. However a run
was stopped, started again it goes on from the last shard and ends with the same bytes.

files -> blocks of texts (Arrow strings) -> tokens (uint16) -> shards -> manifest.json
"""

import array
import base64
import collections
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import mmap
import multiprocessing
import os
import platform
import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

import hub
import reading
from common import (
    PROJECT,
    UserError,
    check_disk,
    command,
    command_line,
    first_rank,
    lock,
    move,
    replacing,
    run,
)
from reading import PIECE, bounds, count, large_strings, local_files

TABLE = Path(__file__).parent / "assets" / "gpt2.tiktoken"  # `<token in base64> <id>` a line
MARK = "<|endoftext|>"
END_OF_TEXT = 50256  # also the last id of the GPT-2 vocabulary: ids above it only pad matrices
BIN_HEADER = 256  # int32 values before the tokens of a .bin shard (llm.c, modded-nanogpt)
BIN_MAGIC, BIN_VERSION = 20240520, 1
# numpy's parser is Python's own, which in 3.11 fails at times when two threads call it
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<u2', 'fortran_order': \w+, 'shape': \(([1-9]\d*),\), \} *\n",
    re.S,
)
MANIFEST = "manifest.json"
VERSION = 1  # of this tool, for the manifest: raised when the same text would give other shards
GPT2_BATCH = 524_288  # tokens an optimizer step of GPT-2 (124M), about the paper's 0.5M


@functools.cache
def tokenizer():
    """tiktoken's GPT-2 encoding, from the table in assets/, so that no run needs the network."""
    lines = (line.split() for line in TABLE.read_bytes().splitlines())
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks={base64.b64decode(token): int(number) for token, number in lines},
        special_tokens={MARK: END_OF_TEXT},
        explicit_n_vocab=END_OF_TEXT + 1,
    )


# ---------------------------------------------------------------- reading shards, for every command


def shard_paths(folder, split):
    """The shards of "train" or "val" in a folder, in order; a UserError while it is being made."""
    check_finished(Path(folder))
    paths = sorted(Path(folder).glob(f"*_{split}[_.]*"))  # llm.c has ..._train.bin, too
    return [path for path in paths if path.suffix in (".npy", ".bin")]


def find_shards(folder, split):
    """shard_paths; where there are none, a UserError with two commands that make some."""
    if paths := shard_paths(folder, split):
        return paths
    raise UserError(
        f"no {split} shards in {Path(folder)}/, such as x_{split}_000001.npy or .bin (is another "
        "--data_dir meant?). FineWeb-Edu (20 GB): python fineweb.py\n"
        "       two minutes, no download: python fineweb.py --source=python-docs && "
        "python train_gpt2.py configs/tiny.toml"
    )


def open_shard(path, scattered=False):
    """Memory-map one shard, .npy (build-nanogpt's) or .bin (llm.c's): a flat uint16 array.

    UserError, with what was expected and found, for a file that is missing, cut short or foreign.
    `scattered`: it will be read here and there, so the system had better not read ahead.
    """
    path = Path(path)
    try:
        tokens = _open_bin(path) if path.suffix == ".bin" else _open_npy(path)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from None
    if scattered and hasattr(mmap, "MADV_RANDOM"):  # not on Windows
        tokens._mmap.madvise(mmap.MADV_RANDOM)
    return tokens


def _open_npy(path):
    with open(path, "rb") as file:
        head, size = file.read(256), path.stat().st_size
    if not (header := NPY_HEADER.match(head)):
        expected = "np.save's header of one row of uint16, a {'descr': '<u2', ...}"
        found = repr(head[:90].rstrip().decode(errors="replace"))
        raise UserError(f"{path} is not a token shard: expected {expected}, found {found}")
    expected = header.end() + 2 * int(header[1])
    if size != expected:
        lengths = f"its header promises {expected:,} bytes, found {size:,}"
        raise UserError(f"{path} is not whole: {lengths}; delete its folder and make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.end())


def _open_bin(path):
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER)
    size = path.stat().st_size
    if len(header) < BIN_HEADER or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        expected = f"a header of {BIN_HEADER} int32 that begins {BIN_MAGIC}, {BIN_VERSION}"
        found = f"{header[:2].tolist()} in {size:,} bytes"
        raise UserError(f"{path} is not a token shard: expected {expected}, found {found}")
    expected = header.nbytes + 2 * int(header[2])
    if size != expected or header[2] < 1:
        lengths = f"its header promises {expected:,} bytes, found {size:,}"
        raise UserError(f"{path} is not whole: {lengths}; delete it and fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=header.nbytes)


# ---------------------------------------------------------------- options


@dataclass(frozen=True)
class Options:
    # where the text comes from
    source: Literal["fineweb-edu", "pretokenized", "local", "python-docs"] = "fineweb-edu"
    input: tuple[str, ...] = ()  # local: files, folders, globs: .txt .md .jsonl (.gz .zst) .parquet
    text_column: str = "text"  # the field of .jsonl lines and .parquet rows that holds the text
    dataset: str = ""  # "" = HuggingFaceFW/fineweb-edu; pretokenized: kjj0/finewebedu10B-gpt2
    subset: str = ""  # a folder of it, or a prefix of paths; "" = all; of FineWeb: sample/10BT
    revision: str = "main"  # of the dataset: a branch, tag or commit
    out_dir: str = ""  # "" = edu_fineweb10B, local_text, python_docs, or another dataset's name
    shard_tokens: int = 100_000_000  # tokens a shard, 2 bytes each
    val_tokens: int = 0  # validation: the input's first; 0 = a shard of fineweb-edu, else 32,768
    max_shards: int = 0  # most training shards, over all ranks, not counting validation; 0 = all
    processes: int = 0  # tiktoken's processes, or gigatoken's threads, at most 4; 0 = as many cores
    tokenizer: Literal["auto", "gigatoken", "tiktoken"] = "auto"  # same tokens; auto: gigatoken
    verify: str | None = None  # a folder of shards to check against its manifest, nothing else


HUB = ("dataset", "revision")
SIZES = ("shard_tokens", "val_tokens")
TEXT = ("text_column", *SIZES)
SOURCES = {  # default out_dir, default dataset, the options that decide what the shards hold
    "fineweb-edu": ("edu_fineweb10B", "HuggingFaceFW/fineweb-edu", (*HUB, "subset", *TEXT)),
    "pretokenized": ("edu_fineweb10B", "kjj0/finewebedu10B-gpt2", HUB),
    "local": ("local_text", "", ("input", *TEXT)),
    "python-docs": ("python_docs", "", SIZES),
}
FINEWEB = "HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb"
MOST = 1_000_000_000  # of any of the sizes and counts: more is a slip
ANY_SOURCE = ("source", "out_dir", "max_shards", "processes", "tokenizer")


def resolve(options):
    """Check the options and put in what "", 0 and auto stand for."""
    source = options.source
    out_dir, dataset, deciding = SOURCES[source]
    for field in fields(options):
        value, least = getattr(options, field.name), int(field.name == "shard_tokens")
        if value != field.default and field.name not in deciding + ANY_SOURCE:
            remedy = "add --source=local" if field.name == "input" else "leave it out"
            raise UserError(f"--{field.name} has no meaning with --source={source}: {remedy}")
        if field.type is int and not least <= value <= MOST:
            expected = f"expected {least} to {MOST:,}"
            raise UserError(f"--{field.name}={value} is not possible: {expected}")
    if source == "local" and not options.input:
        raise UserError("--source=local needs --input=PATH: files, folders or globs of text")
    gigatoken = importlib.util.find_spec("gigatoken")
    if options.tokenizer == "gigatoken" and not gigatoken:
        raise UserError("gigatoken is missing: pip install gigatoken, or --tokenizer=tiktoken")
    if options.dataset not in ("", dataset):
        dataset = options.dataset
        out_dir = dataset.rpartition("/")[2]
    own = "sample/10BT" if dataset in FINEWEB else ""
    val_tokens = options.shard_tokens if source == "fineweb-edu" else 32_768
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1
    return replace(
        options,
        dataset=dataset,
        subset=options.subset or own,
        out_dir=options.out_dir or out_dir,
        val_tokens=options.val_tokens or val_tokens,
        processes=min(options.processes or cores, 61),  # Windows waits for no more
        tokenizer="gigatoken" if gigatoken and options.tokenizer != "tiktoken" else "tiktoken",
    )


class Ranks:
    """The processes that torchrun started for one job; alone, a group of one."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.key = str(self.rank)  # in a manifest
        self.numbers = 1_000_000 // self.world  # of shards, for each rank; 0 is validation
        self.first_shard = self.rank * self.numbers
        if self.world > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo")

    def gather(self, value=None):
        """Every rank's value, in the order of ranks, when all have come here."""
        if self.world == 1:
            return [value]
        import torch.distributed

        values, patience = [None] * self.world, datetime.timedelta(days=30)  # for the slowest rank
        try:
            torch.distributed.monitored_barrier(timeout=patience)
            torch.distributed.all_gather_object(values, value)
        except RuntimeError:
            message = "another process of this run has failed: fix what it says, run it again"
            raise UserError(message) from None
        return values

    def close(self):
        if self.world > 1:
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def print(self, *args, **kwargs):
        if self.rank == 0:
            print(*args, **kwargs, flush=True)

    def files(self, sizes):
        """The indices of this rank's files: consecutive, with about its share of the bytes."""
        total, before, own = sum(sizes), 0, []
        for i, size in enumerate(sizes):
            if before * self.world // total == self.rank:
                own.append(i)
            before += size
        return own

    def shard_sizes(self, options):
        """The most tokens of each shard that this rank is to make."""
        count = self.numbers - (self.rank == 0)
        if options.max_shards:
            count = (options.max_shards + self.world - 1 - self.rank) // self.world
        return [options.val_tokens] * (self.rank == 0) + [options.shard_tokens] * count

    def owns(self, shard):
        return shard_number(shard["file"]) // self.numbers == self.rank

    def partial(self, out_dir):
        return Path(out_dir, PARTIAL.format(self.rank))


# ---------------------------------------------------------------- sources of text


class Source(NamedTuple):
    revision: str
    sizes: list  # of its files, in bytes
    read: Callable  # (number of a file, `start` of a Block) -> its Blocks from there on
    fetch: Callable | None = None  # (number of a file), to be called while another one is read
    missing: Callable = lambda: 0  # bytes of them that are yet to be fetched


def open_source(options, revision):
    """The Source of text that the options name; `revision` is the one to go on with, if any."""
    column = options.text_column
    if options.source == "python-docs":
        return Source(platform.python_version(), [1], lambda _, skip: reading.read_documents(skip))
    if options.source == "local":
        paths = local_files(options.input, tell_left_out)
        sizes = [max(1, path.stat().st_size) for path in paths]
        return Source("", sizes, lambda i, skip: reading.read_file(paths[i], column, skip))
    dataset = hub.Dataset(options.dataset, revision or options.revision)
    files = in_subset(options.subset, dataset.files)
    if not files:
        there = f"{options.dataset}/{options.subset}".rstrip("/")
        raise UserError(f"no .parquet file in {there}: see --dataset, --subset")
    sizes = [file.size or 1 for file in files]

    def fetch(i):
        return dataset.download(files[i])

    def read(i, skip):
        return reading.read_file(fetch(i), column, skip)

    if options.max_shards:  # nothing tells how many files they need
        return Source(dataset.commit, sizes, read)
    hub.check_room(hub.cache(), dataset.missing(files))
    return Source(dataset.commit, sizes, read, fetch, lambda: dataset.missing(files))


def tell_left_out(files):
    """Say how many files below --input are no text that is read here, and how their names end."""
    endings = sorted({path.suffix or "no ending" for path in files})
    more = ", ..." if len(endings) > 5 else ""
    if first_rank():
        print(f"left out: {len(files):,} files of other kinds ({', '.join(endings[:5])}{more})")


HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def in_subset(subset, files):
    """The .parquet files in a folder or FineWeb configuration `subset`, or whose paths begin so.

    Those named test or validation are left out unless there are no others.
    """
    files = [file for file in files if file.rfilename.endswith(".parquet")]
    subset = subset.strip("/")
    names = (subset, subset.replace("-", "/"), f"data/{subset}")
    for start in [*(f"{name}/" for name in names), subset]:
        if inside := [file for file in files if file.rfilename.startswith(start)]:
            return [file for file in inside if not HELD_OUT.search(file.rfilename)] or inside
    return []


def fingerprint(paths):
    """What tells this input from another, wherever it lies: the files' names, sizes and ends."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(os.fsencode(f"{path.name} {size}\n"))
        with open(path, "rb") as file:
            digest.update(file.read(65_536))
            file.seek(max(0, size - 65_536))
            digest.update(file.read())
    return f"{len(paths)} files; sha256 of their names, sizes and ends: {digest.hexdigest()[:16]}"


# ---------------------------------------------------------------- texts to tokens


AHEAD = 8  # Blocks that may wait for the tokenizers, and as many for the disk


def tokenize(blocks, options):
    """Yield (block, its tokens, uint16) in order; parsing and tokenizing run beside the reading."""
    workers, others = options.processes, set(multiprocessing.active_children())
    fast = FastTokenizer() if options.tokenizer == "gigatoken" else None
    if fast or workers == 1:
        workers = min(workers, 4)  # one feeds gigatoken, the others parse
        pool = ThreadPoolExecutor(workers)
    else:
        spawn = multiprocessing.get_context("spawn")  # the one way that works on every system
        pool = ProcessPoolExecutor(workers, spawn, initializer=follow_parent)
    in_flight, held, most = collections.deque(), 0, (workers + AHEAD) * reading.BLOCK_BYTES
    try:
        for block in blocks:
            in_flight.append((block, pool.submit(encode_block, block, fast)))
            held += block.size
            while (held > most and len(in_flight) > 1) or len(in_flight) > workers + AHEAD:
                block, tokens = in_flight.popleft()
                held -= block.size
                yield block, tokens.result()
        for block, tokens in in_flight:
            yield block, tokens.result()
    except BrokenProcessPool:
        message = "a tokenizing process died, for lack of memory perhaps"
        raise UserError(f"{message}: try --processes={workers // 2}") from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # else Ctrl-C would wait for their Blocks, and a second one hang
        pool.shutdown(cancel_futures=True)


def follow_parent():
    """In a worker: leave Ctrl-C to the main process, and end when that has ended, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_block(block, fast):
    """The tokens of a Block as one uint16 array, each document of it led by <|endoftext|>.

    Called by several processes or threads, in any order, and again after a stop: of the Block alone
    it must depend. A long text comes in several Blocks. By the marks the documents are counted.
    """
    parts = []
    for texts, begins in reading.stretches(block.load(), block.goes_on):
        tokens = fast.encode(texts) if fast else encode(texts.to_pylist())
        if not begins.all():
            marks = np.flatnonzero(tokens == END_OF_TEXT)  # one a text, but for empty texts
            tokens = np.delete(tokens, marks[~begins[np.diff(bounds(texts)) > 0]])
        parts.append(tokens)
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


# White space that tiktoken's pattern takes as one piece; a million of it overflows its stack
ENDLESS = 10_000
SPACES = re.compile(
    f"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{ENDLESS},}}"
)


def encode(texts):
    """The tokens of texts as one uint16 array, each led by <|endoftext|>; an empty one has none."""
    tokens = array.array("H")
    for text in filter(None, texts):
        tokens.append(END_OF_TEXT)
        start = 0
        # a run of ENDLESS holds four of these letters in a row; to search all takes 7% more time
        endless = re.search(r"\s{4}", text[:: ENDLESS // 4])
        for spaces in SPACES.finditer(text) if endless else ():
            begin, end = spaces.span()
            end -= end < len(text)  # the last goes with what follows
            tokens.extend(tokenizer().encode_ordinary(text[start:begin]))
            tokens.extend(tokenizer()._encode_single_piece(text[begin:end]))
            start = end
        tokens.extend(tokenizer().encode_ordinary(text[start:]))
    return np.array(tokens, dtype=np.uint16)


# Where gigatoken 0.10 splits text differently from tiktoken 0.14, the reference: at 4,657 of the
# letters that Unicode 16 and 17 added. Texts with one of them go to tiktoken.
DISPUTED = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89\u1c8a\ua7cb-\ua7f1\U00010000-\U0001d3ff"
    "\U0001d800-\U0001efff\U0001fb00-\U0001ffff\U0002a6de-\U0003ffff]"
)
DISPUTED_BYTES = 0xE0A2, 0xE0B1, 0xE0B3, 0xE1B2, 0xEA9F  # how they begin in UTF-8, or from F0 on


def disputed(texts):
    """The numbers of the texts that hold a DISPUTED letter."""
    ends = bounds(texts)
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    # of a character's three or four bytes the first
    at = [np.flatnonzero(data[i : i + PIECE] >= 0xE0) + i for i in range(0, len(data), PIECE)]
    at = np.concatenate([*at, np.empty(0, np.int64)])
    begin = data[at].astype(np.uint16) << 8 | data[at + 1]
    at = at[(begin >= 0xF000) | np.isin(begin, DISPUTED_BYTES)]
    first = (bytes(data[i : i + 4]).decode(errors="ignore")[0] for i in at)
    at = [i for i, letter in zip(at, first, strict=True) if DISPUTED.match(letter)]
    return np.unique(np.searchsorted(ends - ends[0], at, side="right") - 1).tolist()


SMALL = 10_000  # bytes that cost tiktoken less than a call costs gigatoken


class FastTokenizer:
    """The same tokens as `encode`, by gigatoken, which works on one Block at a time.

    It keeps every word it meets (0.10: 7 GB after 0.5 GB of random ones) and has no way to forget
    them, so it is made anew after RENEWAL seconds of work: a word that is new to it takes 0.5 us.
    """

    RENEWAL = 5.0

    def __init__(self):
        self.lock, self.gigatoken, self.worked = threading.Lock(), None, 0.0

    def encode(self, texts):
        """The tokens of a pyarrow array of large_string, as `encode` gives them."""
        import pyarrow.compute as pc

        if texts.nbytes < SMALL:
            return encode(texts.to_pylist())
        if not self.gigatoken:
            self.check()
        if pc.min(lengths := pc.binary_length(texts)).as_py() == 0:
            texts = texts.filter(pc.greater(lengths, 0))
        apart = disputed(texts)
        tokens = self.encode_but(apart, texts)
        if count(tokens, END_OF_TEXT) > len(texts):  # a text spells the mark
            apart += np.flatnonzero(pc.match_substring(texts, MARK)).tolist()
            tokens = self.encode_but(sorted(set(apart)), texts)
        return tokens

    def check(self):
        """A UserError if an edit of tokenizer() has left gigatoken behind: both would be mixed."""
        probe = ["It's 12345678 of\n\n  na\u00efve \u65e5\u672c; x=[1],\tdon't"]
        if not np.array_equal(self.encode_together(large_strings(probe)), encode(probe)):
            raise UserError("tokenizer() is no longer gigatoken's GPT-2: use --tokenizer=tiktoken")

    def encode_but(self, apart, texts):
        """The tokens of texts, with those whose numbers are in `apart` by tiktoken."""
        parts, start = [], 0
        for row in apart:
            parts += [self.encode_together(texts[start:row]), encode([texts[row].as_py()])]
            start = row + 1
        parts.append(self.encode_together(texts[start:]))
        return np.concatenate(parts) if apart else parts[0]

    def encode_together(self, texts):
        import gigatoken
        import pyarrow.compute as pc

        if not len(texts):
            return np.empty(0, dtype=np.uint16)
        mark, glue = large_strings([MARK, ""])
        marked = pc.binary_join_element_wise(mark, texts, glue).buffers()[2].to_pybytes()
        with self.lock:
            if not self.gigatoken or self.worked > self.RENEWAL:
                known = dict(pretokenizer="gpt2", special_tokens={MARK: END_OF_TEXT})
                self.gigatoken = gigatoken.Tokenizer.from_tiktoken(TABLE, **known)
                self.worked = 0.0
            begin = time.thread_time()
            # of its methods this one releases the GIL and returns one array
            rows, _ = self.gigatoken.encode_batch_padded([marked], 0, parallel=False)
            self.worked += time.thread_time() - begin
        return rows[0].astype(np.uint16)


# ---------------------------------------------------------------- tokens to shards


def write_shards(options, ranks, manifest):
    """Make this rank's shards of a source of text; `manifest`, its part of it, grows with them."""
    source = open_source(options, manifest["revision"])
    if manifest["revision"] not in (None, source.revision):
        held = f"shards of revision {manifest['revision']}, not {source.revision}"
        raise UserError(f"{options.out_dir} holds {held}: {ANEW}")
    manifest["revision"] = source.revision
    files = ranks.files(source.sizes)
    place = manifest["next"].setdefault(ranks.key, [files[0], 0, 0] if files else None)
    made = [shard["tokens"] for shard in manifest["shards"] if ranks.owns(shard)]
    sizes = ranks.shard_sizes(options)
    if not place or len(made) >= len(sizes):
        return

    begun = f", going on after {len(made)} shards" if made else ""
    of = f", {len(source.sizes):,} files" if len(source.sizes) > 1 else ""
    made_by = f"tokenized by {options.tokenizer}{begun}"
    ranks.print(f"{options.source}{of} -> {options.out_dir}, {made_by}")
    blocks = tokenize(read_blocks(source, files, place), options)
    stream = counted(blocks, options, ranks, source, sum(made) - place[2], sum(sizes))

    def save(items):
        save_shards(TokenStream(items, place[2]), sizes, len(made), options, ranks, manifest)

    # shards are written beside the making of the next tokens; threads end here, whatever happens
    with contextlib.closing(blocks), beside(save) as hand_over:
        for block, tokens in stream:
            hand_over((block._replace(load=None), tokens))  # without its text, for memory


@contextlib.contextmanager
def beside(consume):
    """Run consume(items) in a thread; yield a function that hands an item over to it.

    It waits while AHEAD items are there. Where one side fails, the other ends.
    """
    waiting, failed = queue.Queue(AHEAD), threading.Event()

    def items():
        while (item := waiting.get()) is not None and not failed.is_set():
            yield item
        if failed.is_set():
            raise CancelledError  # for what is half-written: what failed is told by the other side

    def hand_over(item):
        while not done.done():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0.1)
        done.result()

    with ThreadPoolExecutor(1) as thread:
        try:
            done = thread.submit(consume, items())
            yield hand_over
            hand_over(None)
            done.result()
        except BaseException:
            failed.set()
            with contextlib.suppress(queue.Full):  # no wait here: there may be a second Ctrl-C
                waiting.put_nowait(None)
            raise


def save_shards(tokens, sizes, made, options, ranks, manifest):
    """Make the shards of these sizes after the first `made`; `manifest` grows with them."""
    partial = ranks.partial(options.out_dir)
    for number, size in enumerate(sizes[made:], ranks.first_shard + made):
        if number and not tokens.place():
            break
        path = Path(options.out_dir, f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy")
        with replacing(path) as temporary:
            held = write_shard(temporary, tokens.take(size))
            place = tokens.place()
            if number == 0 and not place:
                needed = f"--val_tokens={options.val_tokens} and some to train on"
                part = "the first process's part of the input" if ranks.world > 1 else "the input"
                remedy = f"add text, or try --val_tokens={held // 10}" if held > 9 else "add text"
                raise UserError(f"{part} gives {held:,} tokens, too few for {needed}: {remedy}")
            if not partial.exists():  # so that a shard without a manifest is never this tool's
                write_manifest(partial, manifest)
        manifest["shards"].append(describe(path))
        manifest["next"][ranks.key] = place
        write_manifest(partial, manifest)
    manifest["next"][ranks.key] = tokens.place()  # also where this rank's files hold no text
    if tokens.place() and not options.max_shards:
        raise UserError(f"more than {len(sizes):,} shards: set --shard_tokens to more, and {ANEW}")


def read_blocks(source, files, place):
    """Yield the Blocks of these files from a place on; `share` is of all the files."""
    total, before, ahead = sum(source.sizes[i] for i in files), 0, None
    for i, following in itertools.zip_longest(files, files[1:]):
        if i >= place[0]:
            skip = place[1] if i == place[0] else 0
            while ahead and ahead.is_alive():
                ahead.join(1)  # Windows hears no Ctrl-C in a longer wait
            blocks = source.read(i, skip)
            first = next(blocks, None)
            if skip and (not first or first.start != skip):
                raise UserError(f"the text is not read as when its shards were begun: {ANEW}")
            if source.fetch and following:
                ahead = start_fetching(source, following)
            for block in itertools.chain([first] if first else [], blocks):
                share = (before + block.share * source.sizes[i]) / total
                yield block._replace(file=i, share=share)
        before += source.sizes[i]


def start_fetching(source, i):
    """Fetch a file in a thread that ends with the program: what it has of the file stays."""

    def fetch():
        with contextlib.suppress(UserError, OSError):  # who needs the file will be told
            source.fetch(i)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    return thread


def counted(stream, options, ranks, source, done, most):
    """Pass a stream on: first say what is to come, then show a progress bar, in tokens.

    `done` were made before, `most` are wanted; how many there are is foreseen from what was read.
    """
    from tqdm import tqdm

    hidden = ranks.rank > 0 or None
    with tqdm(initial=done, unit=" tokens", unit_scale=True, disable=hidden) as bar:
        for block, tokens in stream:
            done += len(tokens)
            expected = int(min(done / block.share, most))
            enough = done > 1_000_000 or block.share > 0.01  # to guess the rest from
            if enough and not bar.total:
                foresee(options, ranks, source, 2 * (expected - done + len(tokens)))
            bar.total = expected if enough else None
            bar.update(len(tokens))
            yield block, tokens
            if done > most:  # the token after the last has come: the place to go on from
                break


def foresee(options, ranks, source, size):
    """Say how much is to come, and that the disk has room for it; a UserError if not.

    `size` bytes are this rank's; the others make about as many for each byte of their files.
    """
    from tqdm import tqdm

    own = sum(source.sizes[i] for i in ranks.files(source.sizes))
    size = int(size * min(ranks.world, sum(source.sizes) / own))
    if options.max_shards:
        size = min(size, 2 * (options.val_tokens + options.max_shards * options.shard_tokens))
    fetched = source.missing()
    if fetched and os.stat(options.out_dir).st_dev != os.stat(hub.cache()).st_dev:
        fetched = 0  # to another disk
    try:
        free = check_disk(options.out_dir, size + fetched)
    except UserError as error:
        guess = "guessed from the first texts; --max_shards=N sets a limit"
        raise UserError(f"{error} ({guess})") from None
    tokens, size, free = map(tqdm.format_sizeof, (size // 2, size, free))
    if ranks.rank == 0:  # the bar is on the screen
        tqdm.write(f"to come: about {tokens} tokens, {size}B of shards; {free}B are free")


class TokenStream:
    """The tokens of a stream of (Block, its tokens), without the first `skip`, piece by piece."""

    def __init__(self, stream, skip=0):
        self.stream, self.block, self.tokens, self.used = iter(stream), None, (), skip

    def place(self):
        """Wait for the next token: it is at [file, start of a Block, tokens of it]; else None.

        There a run that was stopped goes on.
        """
        while self.used >= len(self.tokens):
            self.used -= len(self.tokens)
            self.block, self.tokens = next(self.stream, (None, ()))
            if not self.block:
                return None
        return [self.block.file, self.block.start, self.used]

    def take(self, size):
        """Yield the next `size` tokens in pieces, or what there is of them."""
        while size and self.place():
            piece = self.tokens[self.used : self.used + size]
            self.used, size = self.used + len(piece), size - len(piece)
            yield piece


def write_shard(path, pieces):
    """Write pieces of tokens as np.save would write all of them; return how many there were."""
    with open(path, "wb") as file:
        write_header(file, 0)
        size = 0
        for piece in pieces:
            file.write(piece)
            size += len(piece)
        file.seek(0)
        write_header(file, size)  # as long as before
    return size


def write_header(file, size):
    header = dict(descr="<u2", fortran_order=False, shape=(size,))
    np.lib.format.write_array_header_1_0(file, header)


def describe(path):
    """A shard's entry in the manifest, from what is on disk."""
    tokens = open_shard(path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    documents = count(tokens, END_OF_TEXT)
    return dict(file=path.name, documents=documents, tokens=len(tokens), sha256=sha256)


# ---------------------------------------------------------------- shards that others made


def fetch_shards(options, ranks, manifest):
    """Download this rank's part of ready .bin shards; `manifest` grows with them."""
    from tqdm import tqdm

    dataset = hub.Dataset(options.dataset, manifest["revision"] or options.revision)
    manifest["revision"] = dataset.commit
    splits = {"val": [], "train": []}
    for file in dataset.files:
        if match := re.search(r"_(val|train)_(\d{6})\.bin$", file.rfilename):
            splits[match[1]].append((file, f"edufineweb_{match[0][1:]}"))
    if not all(splits.values()):
        raise UserError(f"{options.dataset} holds no .._val_000000.bin and .._train_000001.bin")
    paths = {}
    for file, name in splits["val"] + splits["train"]:
        if (other := paths.setdefault(name, file.rfilename)) != file.rfilename:
            twice = f"{other} and {file.rfilename}"
            raise UserError(f"{options.dataset} holds {twice}, which would have one name here")
    wanted = splits["val"] + splits["train"][: options.max_shards or None]
    whole = len(wanted) == sum(map(len, splits.values()))
    manifest["next"][ranks.key] = None if whole else [len(wanted), 0, 0]
    there = {shard["file"] for shard in manifest["shards"]}
    mine = [wanted[i] for i in ranks.files([1] * len(wanted))]
    missing = [(file, name) for file, name in wanted if name not in there]
    folders = Path(options.out_dir), Path(options.out_dir, INCOMING)
    held = sum(hub.held(f.size, *(folder / name for folder in folders)) for f, name in missing)
    hub.check_room(options.out_dir, sum(file.size for file, _ in missing) - held)
    write_manifest(ranks.partial(options.out_dir), manifest)
    tokens = {name: (file.size - 4 * BIN_HEADER) // 2 for file, name in mine}
    done = sum(tokens[name] for name in tokens if name in there)
    hidden, total = ranks.rank > 0 or None, sum(tokens.values())
    with tqdm(initial=done, total=total, unit=" tokens", unit_scale=True, disable=hidden) as bar:
        for file, name in mine:
            if name not in there:
                manifest["shards"].append(fetch_shard(options, dataset, file, name))
                write_manifest(ranks.partial(options.out_dir), manifest)
                bar.update(tokens[name])


def fetch_shard(options, dataset, file, name):
    """Download one shard, give it its name when it is whole, and return its entry."""
    final, path = Path(options.out_dir, name), Path(options.out_dir, INCOMING, name)
    path.parent.mkdir(exist_ok=True)
    for there in (final, path):  # whole, but a kill came before it was noted
        if there.exists():
            move(there, hub.incomplete(path))
    dataset.fetch(file, path)
    entry = describe(path)
    move(path, final)
    return entry


# ---------------------------------------------------------------- the folder of shards

PARTIAL = "manifest.partial.{}.json"  # a rank's part, while it grows; manifest.json ends the work
INCOMING = ".incoming"
ANEW = "delete the folder or choose another --out_dir"


def begin(options, ranks):
    """(the manifest to go on from, whether all that is asked is there); refuse another's folder."""
    folder, asked = Path(options.out_dir), settings(options)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out_dir")
    parts = sorted(folder.glob(PARTIAL.format("*")))
    try:
        manifests = [read_manifest(path) for path in [*folder.glob(MANIFEST), *parts]]
    except FileNotFoundError:  # another run has just ended: look again
        return begin(options, ranks)
    if not manifests:
        if found := shard_files(folder):
            raise UserError(f"{folder} holds {len(found)} shards and no {MANIFEST}: {ANEW}")
        empty = dict(ranks=ranks.world, next={}, documents=0, tokens=0, shards=[])
        return {**asked, "revision": None, **empty}, False
    for manifest, (key, value) in itertools.product(manifests, asked.items()):
        if manifest.get(key) != value:
            made = f"{key}={manifest.get(key)}, not {value}"
            raise UserError(f"{folder} holds shards made with {made}: {ANEW}")
    if len(revisions := {manifest.get("revision") for manifest in manifests} - {None}) > 1:
        raise UserError(
            f"{folder} holds shards of revisions {', '.join(sorted(revisions))}: {ANEW}"
        )
    manifest = merged(manifests)
    check_shards(folder, manifest, more=bool(parts))
    whole = not any(manifest["next"].values())
    if not parts and (whole or 0 < options.max_shards < len(manifest["shards"])):
        return manifest, True
    if manifest["ranks"] != ranks.world:
        begun = f"was begun by {manifest['ranks']} processes, not {ranks.world}"
        raise UserError(f"{folder} {begun}: go on with as many, {ANEW}")
    own = {key: place for key, place in manifest["next"].items() if key == ranks.key}
    return manifest | {"next": own}, False


@contextlib.contextmanager
def locked(folder, ranks, new):
    """Keep other runs out of a folder; the system lets go when this one ends, even killed.

    A `new` folder goes with the lock if it is still empty.
    """
    path = folder / f".lock.{ranks.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            if not (lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                raise FileNotFoundError("it was deleted just before it was locked")
        except OSError:
            message = f"another run is making {folder} now: let it end, or choose another"
            raise UserError(f"{message} --out_dir") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                path.unlink()
                if new:
                    folder.rmdir()


def settings(options):
    """The manifest's record of what decides the shards' content."""
    asked = {name: getattr(options, name) for name in SOURCES[options.source][2]}
    if options.dataset:
        asked["dataset"] += f"@{asked.pop('revision')}"
    if options.source == "local":
        asked["input"] = fingerprint(local_files(options.input))
    return {"version": VERSION, "source": options.source, "encoding": tokenizer().name, **asked}


def finish(folder, ranks, manifest):
    """When every rank is done, put their parts together; return the whole manifest."""
    manifests = ranks.gather(manifest)
    manifest = merged(manifests)
    if len({part["revision"] for part in manifests}) > 1:
        raise UserError(f"the dataset has just changed: {ANEW}, and name a commit by --revision")
    if ranks.rank == 0:
        numbers = {shard_number(shard["file"]) for shard in manifest["shards"]}
        for name in shard_files(folder):  # one that was made, but not noted when a kill came
            number = shard_number(name)
            first = number > 0 and number % ranks.numbers == 0  # of a rank
            if number not in numbers and (first or number - 1 in numbers):
                (folder / name).unlink()
        check_shards(folder, manifest)
        write_manifest(folder / MANIFEST, manifest)
        for part in folder.glob(PARTIAL.format("*")):
            part.unlink()
        shutil.rmtree(folder / INCOMING, ignore_errors=True)
    ranks.gather()
    return manifest


def remove_leftovers(folder):
    """Remove what a run that was killed had not finished: it would take up room."""
    for pattern in (".edufineweb_*.tmp", ".manifest*.tmp"):
        for leftover in folder.glob(pattern):
            leftover.unlink()


def merged(manifests):
    """One manifest of those of all ranks, with their shards in order."""
    shards = {shard["file"]: shard for manifest in manifests for shard in manifest["shards"]}
    shards = sorted(shards.values(), key=lambda shard: shard_number(shard["file"]))
    places = {key: place for manifest in manifests for key, place in manifest["next"].items()}
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
    return manifests[0] | {"next": places, **totals, "shards": shards}


def write_manifest(path, manifest):
    with replacing(path) as temporary:
        temporary.write_bytes(json.dumps(merged([manifest]), indent=1).encode() + b"\n")


def read_manifest(path):
    """A manifest; a UserError unless it is whole and names nothing but shards beside it."""
    try:
        manifest = json.loads(path.read_bytes())
        shards, places = manifest["shards"], manifest["next"].values()
        kinds = {"file": str, "documents": int, "tokens": int, "sha256": str}
        whole = all({k: type(v) for k, v in shard.items()} == kinds for shard in shards)
        whole = whole and all(shard_number(shard["file"]) >= 0 for shard in shards)
        whole = whole and len({shard["file"] for shard in shards}) == len(shards)
        whole = whole and all(place is None or len(place) == 3 for place in places)
        whole = whole and manifest["ranks"] > 0
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        held = f"{len(shard_files(path.parent))} shards and no whole {path.name}"
        raise UserError(f"{path.parent} holds {held}: {ANEW}")
    return merged([manifest])  # whose totals are counted here


def shard_number(name):
    match = re.fullmatch(r"edufineweb_(?:val|train)_(\d{6})\.(?:npy|bin)", name)
    return int(match[1]) if match else -1


def shard_files(folder):
    return {path.name for path in Path(folder).glob("*") if path.suffix in (".npy", ".bin")}


def check_shards(folder, manifest, more=False):
    """A UserError unless a folder holds its manifest's shards and, unless more may be, no other."""
    listed, found = {s["file"]: s["tokens"] for s in manifest["shards"]}, shard_files(folder)
    lacking, strange = listed.keys() - found, found - listed.keys()
    if lacking or (strange and not more):
        state = "lacks shards that" if lacking else "holds other shards than"
        named = ", ".join(sorted(lacking or strange)[:5])
        raise UserError(f"{folder} {state} its {MANIFEST} lists ({named}): {ANEW}")
    for name, tokens in listed.items():
        if (size := len(open_shard(folder / name))) != tokens:
            lengths = f"{MANIFEST} says {tokens:,} tokens, found {size:,}"
            raise UserError(f"{folder / name}: {lengths}: {ANEW}")


def check_finished(folder):
    if any(folder.glob(PARTIAL.format("*"))):
        unfinished = f"the shards in {folder}/ are not all there yet"
        again = "run the same python fineweb.py command again, it goes on"
        raise UserError(f"{unfinished}: let it end, or, if none is running, {again}")


def verify(folder):
    """Check every byte of a folder's shards against its manifest."""
    from tqdm import tqdm

    check_finished(folder)
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} holds no {MANIFEST}: nothing says what its shards should be")
    manifest = read_manifest(folder / MANIFEST)
    check_shards(folder, manifest)
    for shard in tqdm(manifest["shards"], f"verifying {folder}", delay=5, disable=None):
        found = describe(folder / shard["file"])
        if differ := [f"{k}={found[k]}, not {shard[k]}" for k in shard if found[k] != shard[k]]:
            raise UserError(f"{folder / shard['file']} was changed: {differ[-1]}: {ANEW}")
    size = f"{len(manifest['shards'])} shards, {manifest['tokens']:,} tokens"
    print(f"{folder}: {size}, all as {MANIFEST} says")


# ---------------------------------------------------------------- the command


def prepare(options):
    """Make the shards and the manifest that `options` ask for, unless they are there; say so."""
    options = resolve(options)
    folder = Path(options.out_dir)
    ranks = Ranks()
    manifest, there = begin(options, ranks)  # of a finished folder nothing is touched
    if there:
        ranks.print("already there: ", end="")
    else:
        new = not any(ranks.gather(folder.exists()))
        with locked(folder, ranks, new):
            manifest, _ = begin(options, ranks)  # another run may have changed it until now
            if ranks.rank == 0:
                remove_leftovers(folder)
            ranks.gather()  # all have looked before any writes
            make = fetch_shards if options.source == "pretokenized" else write_shards
            make(options, ranks, manifest)
            manifest = finish(folder, ranks, manifest)
    if ranks.rank == 0:
        report(folder, manifest)
    ranks.close()


def report(folder, manifest):
    train = [shard["tokens"] for shard in manifest["shards"] if "_train_" in shard["file"]]
    split = f"{len(train)} train + {len(manifest['shards']) - len(train)} val shards"
    steps = -(-sum(train) // GPT2_BATCH)
    epoch = f", {steps:,} steps an epoch at {GPT2_BATCH:,} tokens a step" if steps > 100 else ""
    print(f"{folder}: {split}, {manifest['tokens']:,} tokens{epoch}")
    config = [PROJECT / "configs/tiny.toml"] if sum(train) < 10_000_000 else []
    print("train on it:", command("train_gpt2.py", *config, f"--data_dir={folder}"))


def main():
    options = command_line(Options, __doc__)
    if options.verify is not None:
        verify(Path(options.verify))
    else:
        prepare(options)


if __name__ == "__main__":
    run(main)
