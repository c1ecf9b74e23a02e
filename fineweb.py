"""Text to token shards, and the one place that makes the tokenizer.

    python fineweb.py                                   # FineWeb-Edu, 10B tokens -> edu_fineweb10B/
    python fineweb.py --source=pretokenized --max_shards=2     # some of it, tokenized by others
    python fineweb.py --source=local --input my_texts/  # your own .txt, .md, .jsonl, .parquet
    python fineweb.py --source=python-docs              # 0.7M tokens, no download: for a try

A shard is a flat array of uint16 GPT-2 tokens in which every document starts with <|endoftext|>.
Shard 0 is the validation split. manifest.json beside the shards says what they hold.

documents (str) -> batches (list of str) -> tokens (uint16) -> shards -> manifest.json
"""

import ast
import base64
import collections
import contextlib
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import tyro

END_OF_TEXT = 50256  # also the last id of the GPT-2 vocabulary: ids above it only pad matrices
BIN_HEADER = 256  # int32 values before the tokens of a .bin shard (llm.c, modded-nanogpt)
BIN_MAGIC, BIN_VERSION = 20240520, 1
MANIFEST = "manifest.json"
VERSION = 1  # of this tool, for the manifest: raised when the same text would give other shards
GPT2_BATCH = 524_288  # tokens an optimizer step of GPT-2 (124M), about the paper's 0.5M


# ---------------------------------------------------------------- what every command here shares


class UserError(Exception):
    """A mistake the user can mend: one or two lines that say what, where and what to do."""


def run(main):
    """Call a command's main; a UserError ends it with its message and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character that a text has
    try:
        main()
    except (UserError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        if os.environ.get("RANK", "0") != "0":
            # a mistake of all ranks ends rank 0, and with it this one before it repeats it
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def command_line(options, description, args=None, prog=None):
    """Parse `--key=value` (or `--key value`) into a dataclass; its comments are the help."""
    return tyro.cli(
        options,
        prog=prog,
        args=args,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def toml_flags(path, options):
    """The TOML file's `key = value` lines as --key=value flags."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    if nested := [key for key, value in values.items() if isinstance(value, dict | list)]:
        raise UserError(f"config {path}: {nested[0]} is no plain value; write key = value")
    args = [f"--{key}={value}" for key, value in values.items()]
    try:
        command_line(options, "", args)
    except SystemExit:
        raise UserError(f"that is in {path}") from None
    return args


def to_toml(options):
    """A dataclass of plain values as TOML; `resume` is a command, not a setting."""
    values = {key: value for key, value in asdict(options).items() if key != "resume"}
    # JSON writes strings, numbers and booleans as TOML does, but for one character
    lines = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")


@functools.cache
def tokenizer():
    """tiktoken's GPT-2 encoding, from the tables in assets/ so that no run needs the network."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(__file__).parent / "assets" / "tiktoken"))
    return tiktoken.get_encoding("gpt2")


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; fsync and rename it there if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write a command's figures, and say where."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


# ---------------------------------------------------------------- reading shards, for every command


def open_shard(path):
    """Memory-map one shard, .npy (build-nanogpt's) or .bin (llm.c's): a flat uint16 array.

    UserError, with what was expected and found, for a file that is missing, cut short or foreign.
    """
    path = Path(path)
    try:
        return _open_bin(path) if path.suffix == ".bin" else _open_npy(path)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from None


def _open_npy(path):
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        message = f"{path} is no whole .npy shard ({error}); delete it and prepare it again"
        raise UserError(message) from None
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or not tokens.size:
        found = f"{tokens.dtype} of shape {tokens.shape}"
        raise UserError(f"{path} is no token shard: expected one row of uint16, found {found}")
    return tokens


def _open_bin(path):
    header = np.fromfile(path, dtype="<i4", count=BIN_HEADER)
    size = path.stat().st_size
    if len(header) < BIN_HEADER or header[0] != BIN_MAGIC or header[1] != BIN_VERSION:
        expected = f"a header of {BIN_HEADER} int32 that begins {BIN_MAGIC}, {BIN_VERSION}"
        found = f"{header[:2].tolist()} in {size:,} bytes"
        raise UserError(f"{path} is no token shard: expected {expected}, found {found}")
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
    dataset: str = ""  # on Hugging Face; "" = HuggingFaceFW/fineweb-edu, kjj0/finewebedu10B-gpt2
    subset: str = "sample/10BT"  # fineweb-edu: the folder of the dataset to read; "" = all
    revision: str = "main"  # of the dataset: a branch, tag or commit
    out_dir: str = ""  # "" = edu_fineweb10B, local_text or python_docs, by source
    shard_tokens: int = 100_000_000  # tokens a shard, 2 bytes each
    val_tokens: int = 0  # the first tokens of the input; 0 = fineweb-edu: one shard, else 32,768
    max_shards: int = 0  # training shards to make, beside the validation shard; 0 = all
    processes: int = 0  # cores that tokenize; 0 = all
    tokenizer: Literal["auto", "gigatoken", "tiktoken"] = "auto"  # same tokens; auto = the faster


HUB = ("dataset", "revision")
CUT = ("shard_tokens", "val_tokens", "max_shards")
TEXT = ("text_column", *CUT)
SOURCES = {  # default out_dir, default dataset, the options that decide what the shards hold
    "fineweb-edu": ("edu_fineweb10B", "HuggingFaceFW/fineweb-edu", (*HUB, "subset", *TEXT)),
    "pretokenized": ("edu_fineweb10B", "kjj0/finewebedu10B-gpt2", (*HUB, "max_shards")),
    "local": ("local_text", "", ("input", *TEXT)),
    "python-docs": ("python_docs", "", CUT),
}
ANY_SOURCE = ("source", "out_dir", "processes", "tokenizer")


def resolve(options):
    """Check the options and put in what "", 0 and auto stand for."""
    source = options.source
    out_dir, dataset, deciding = SOURCES[source]
    for field in fields(options):
        value, least = getattr(options, field.name), int(field.name == "shard_tokens")
        if value != field.default and field.name not in deciding + ANY_SOURCE:
            raise UserError(f"--{field.name} has no meaning with --source={source}: leave it out")
        if field.type is int and value < least:
            raise UserError(f"--{field.name}={value} is too small: expected {least} or more")
    if source == "local" and not options.input:
        raise UserError("--source=local needs --input=PATH: files, folders or globs of text")
    gigatoken = importlib.util.find_spec("gigatoken")
    if options.tokenizer == "gigatoken" and not gigatoken:
        raise UserError("gigatoken is missing: pip install gigatoken, or --tokenizer=tiktoken")
    val_tokens = options.shard_tokens if source == "fineweb-edu" else 32_768
    return replace(
        options,
        dataset=options.dataset or dataset,
        out_dir=options.out_dir or out_dir,
        val_tokens=options.val_tokens or val_tokens,
        processes=min(options.processes or os.cpu_count(), 61),  # Windows waits for no more
        tokenizer="gigatoken" if gigatoken and options.tokenizer != "tiktoken" else "tiktoken",
    )


# ---------------------------------------------------------------- documents


def open_source(options):
    """A source of text: (the revision of it that is read, an iterator of its documents)."""
    if options.source == "python-docs":
        return platform.python_version(), python_docs()
    if options.source == "local":
        return "", read_files(local_files(options.input), options.text_column)
    folder = f"{options.subset.strip('/')}/" if options.subset else ""
    commit, names = list_dataset(options)
    names = [name for name in names if name.startswith(folder) and name.endswith(".parquet")]
    if not names:
        raise UserError(f"no .parquet file in {options.dataset}/{folder}: see --dataset, --subset")
    paths = (download(options, name, commit) for name in names)
    return commit, read_files(paths, options.text_column)


SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs():
    """Yield the language reference and the standard library's docstrings, which every Python has.

    A topic of the reference is a document; so are a module's docstrings, in reading order under
    their names, each text once. Source is parsed, never run. Shuffled, the same way every time,
    so that the validation split is of the same kind as the rest.
    """
    from pydoc_data.topics import topics

    first = {}  # docstring -> the module and the name where it stands first
    for module, path in library_modules():
        for name, text in docstrings(ast.parse(path.read_bytes()), module):
            first.setdefault(text, (module, name))
    modules = collections.defaultdict(list)
    for text, (module, name) in first.items():
        modules[module].append(f"{name}\n\n{text}\n")
    documents = sorted(set(topics.values())) + ["\n\n".join(texts) for texts in modules.values()]
    random.Random(1337).shuffle(documents)
    yield from documents


def library_modules():
    """Yield (dotted name, path) of the standard library's modules, without tests and programs."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)
        for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
            name = ".".join(path.relative_to(library).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def docstrings(node, name):
    """Yield (dotted name, docstring) of a parsed module and of all it defines, in reading order."""
    if isinstance(node, DOCUMENTED):
        name = f"{name}.{node.name}" if hasattr(node, "name") else name
        if text := ast.get_docstring(node):
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from docstrings(child, name)


def local_files(inputs):
    """The files to read under files, folders and globs: in the inputs' order, then by name."""
    found = {}
    for given in inputs:
        path = Path(given).expanduser()
        inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(given, recursive=True))
        files = {file for file in [path, *inside] if file.is_file()}
        readable = sorted((file for file in files if file_kind(file)), key=Path.as_posix)
        if not readable:
            state = f"none of the {len(files):,} files there ends" if files else "no file that ends"
            kinds = f"{', '.join(READERS)} (also with .gz or .zst)"
            raise UserError(f"--input={given}: {state} {kinds}")
        found.update(dict.fromkeys(readable))
    return list(found)


def file_kind(path):
    """The key of READERS that a file's name ends in, before .gz or .zst if any; "" for none."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


def read_files(paths, text_column):
    """Yield the documents of files: a .txt or .md is one, a .jsonl line or .parquet row is one."""
    for path in paths:
        try:
            yield from READERS[file_kind(path)](path, text_column)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}): replace it or leave it out") from None


def read_text(path, _):
    with open_bytes(path) as file:
        yield decode(file.read(), path)


def read_jsonl(path, text_column):
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            where = f"{path}, line {number:,}"
            try:
                record = json.loads(decode(line, path, number))
            except ValueError as error:
                raise UserError(f"{where} is no JSON ({error}): mend it or take it out") from None
            if not isinstance(record, dict) or text_column not in record:
                found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where} has no {text_column!r} but {found}: see --text_column")
            yield checked(record[text_column], where)


def read_parquet(path, text_column):
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no {text_column!r} but {found}: see --text_column")
            for rows in file.iter_batches(batch_size=1024, columns=[text_column]):
                for text in rows.column(0).to_pylist():
                    yield checked(text, path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no whole .parquet file ({error}); fetch it again") from None


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}
COMPRESSED = (".gz", ".zst")


def open_bytes(path):
    """Open a file to read bytes: what is inside, for .gz and .zst."""
    if not str(path).lower().endswith(COMPRESSED):
        return open(path, "rb")
    import pyarrow  # reads both, and tells when the end is missing, which zstandard does not

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


def decode(data, path, first_line=1):
    """Text of UTF-8 bytes, without the mark that some editors put at the start of a file."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        where = f"{path}, line {line:,}, byte {byte:,}"
        raise UserError(f"{where}: not UTF-8 ({error.reason}); convert or remove it") from None


def checked(text, where):
    """A document that was read; null stands for an empty one."""
    if not isinstance(text, str | None):
        raise UserError(f"{where}: expected text, found {type(text).__name__}: see --text_column")
    return text or ""


# ---------------------------------------------------------------- documents to tokens

BATCH_CHARACTERS = 1_000_000  # makes a hand-over between processes cheap, and memory no matter


def batches(documents):
    """Yield lists of documents, about BATCH_CHARACTERS each; empty documents are left out."""
    batch, characters = [], 0
    for text in filter(None, documents):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(text_batches, options):
    """An iterator over the tokens of each batch of documents, in order, as uint16 arrays."""
    if options.tokenizer == "gigatoken":
        os.environ["RAYON_NUM_THREADS"] = str(options.processes)  # it has threads of its own
        return map(encode_fast, text_batches)
    if options.processes == 1:
        return map(encode, text_batches)
    return encode_in_processes(text_batches, options.processes)


def encode_in_processes(text_batches, processes):
    """`map(encode, text_batches)` by several processes; a bounded number of batches in flight."""
    spawn = multiprocessing.get_context("spawn")  # the one way that works on every system
    in_flight = collections.deque()
    with ProcessPoolExecutor(processes, spawn, initializer=follow_parent) as pool:
        try:
            for batch in text_batches:
                in_flight.append(pool.submit(encode, batch))
                if len(in_flight) == 2 * processes:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            message = "a tokenizing process died, for lack of memory perhaps"
            raise UserError(f"{message}: try --processes={processes // 2}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def follow_parent():
    """In a worker: leave Ctrl-C to the main process, and end when that has ended, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(batch):
    """The tokens of documents as one uint16 array, each document led by <|endoftext|>."""
    tokens = []
    for text in batch:
        tokens.append(END_OF_TEXT)
        tokens.extend(tokenizer().encode_ordinary(text))
    return np.array(tokens, dtype=np.uint16)


# What gigatoken 0.10 takes otherwise than tiktoken 0.14: surrogates, and 4,657 of the letters that
# Unicode 16 and 17 added, which split the text around them. The reference decides.
DISPUTED = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89\u1c8a\ua7cb-\ua7f1\ud800-\udfff\U00010000-\U0001d3ff"
    "\U0001d800-\U0001efff\U0001fb00-\U0001ffff\U0002a6de-\U0003ffff]"
)


def encode_fast(batch):
    """The same tokens as `encode`, by gigatoken."""
    import awkward  # gigatoken's array of arrays

    if any(not text.isascii() and DISPUTED.search(text) for text in batch):
        return encode(batch)
    tokens = fast_tokenizer().encode_batch([text.encode() for text in batch])
    lengths = awkward.to_numpy(awkward.num(tokens))
    flat = awkward.to_numpy(awkward.flatten(tokens)).astype(np.uint16)
    return np.insert(flat, np.cumsum(lengths) - lengths, END_OF_TEXT)


@functools.cache
def fast_tokenizer():
    """gigatoken with tiktoken's GPT-2 table, and no special token: their text is ordinary."""
    import gigatoken

    table = map(tokenizer().decode_single_token_bytes, range(END_OF_TEXT))
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(table)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt2.tiktoken")
        path.write_bytes(b"".join(lines))
        return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2")


# ---------------------------------------------------------------- tokens to shards


def write_shards(options):
    """Turn a source's text into shards in out_dir: (its revision, the manifest's entries)."""
    revision, documents = open_source(options)
    print(f"{options.source} -> {options.out_dir}, tokenized by {options.tokenizer}", flush=True)
    tokens = counted(tokenize(batches(documents), options), options.out_dir)
    shards = cut(tokens, options.val_tokens, options.shard_tokens)
    if options.max_shards:
        shards = itertools.islice(shards, 1 + options.max_shards)
    return revision, [write_shard(options.out_dir, *shard) for shard in enumerate(shards)]


def counted(arrays, name):
    """Pass arrays of tokens on, with a progress bar in tokens."""
    from tqdm import tqdm

    with tqdm(desc=name, unit=" tokens", unit_scale=True, disable=None) as bar:
        for tokens in arrays:
            yield tokens
            bar.update(len(tokens))


def cut(arrays, val_tokens, shard_tokens):
    """Cut a stream of tokens, in arrays of any length, to one of val_tokens, then of shard_tokens.

    The last may be short. A shard is yielded only when a token follows it, so that an input too
    short for a training shard, a UserError, leaves no file behind.
    """
    shard, held, first = np.empty(val_tokens, dtype=np.uint16), 0, True
    for tokens in arrays:
        while len(tokens):
            if held == len(shard):
                yield shard
                shard, held, first = np.empty(shard_tokens, dtype=np.uint16), 0, False
            piece = tokens[: len(shard) - held]
            shard[held : held + len(piece)] = piece
            held += len(piece)
            tokens = tokens[len(piece) :]
    if first:
        needed = f"--val_tokens={val_tokens} and some to train on"
        raise UserError(f"the input gives {held:,} tokens, too few for {needed}")
    yield shard[:held]


def write_shard(out_dir, index, tokens):
    """Write one shard and return its entry in the manifest."""
    path = Path(out_dir, f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, tokens)
    return describe(path)


def describe(path):
    """A shard's entry in the manifest, from what is on disk."""
    tokens = open_shard(path)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    documents = int(np.count_nonzero(tokens == END_OF_TEXT))
    return dict(file=path.name, documents=documents, tokens=len(tokens), sha256=sha256)


# ---------------------------------------------------------------- downloads


@contextlib.contextmanager
def fetching(what):
    """Make a UserError of whatever the network does inside."""
    try:
        yield
    except Exception as error:  # its types differ between the versions of huggingface_hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "check the name and the network and run the same command again"
        raise UserError(f"cannot fetch {what} ({reason}): {remedy}") from None


def list_dataset(options):
    """(commit, sorted names of the files) of the Hugging Face dataset at its revision."""
    from huggingface_hub import HfApi

    with fetching(f"the list of files of {options.dataset} at {options.revision}"):
        info = HfApi().dataset_info(options.dataset, revision=options.revision)
    return info.sha, sorted(file.rfilename for file in info.siblings)


def download(options, name, commit, folder=None):
    """Fetch a file of the dataset, into huggingface_hub's cache or `folder`; return its path."""
    from huggingface_hub import hf_hub_download

    where = dict(repo_type="dataset", revision=commit, local_dir=folder)
    with fetching(f"{name} of {options.dataset}"):
        return hf_hub_download(options.dataset, name, **where)


def fetch_shards(options):
    """Download ready .bin shards into out_dir: (their revision, the manifest's entries)."""
    commit, names = list_dataset(options)
    splits = {"val": [], "train": []}
    for name in names:
        if match := re.search(r"_(val|train)_(\d{6})\.bin$", name):
            splits[match[1]].append((name, f"edufineweb_{match[0][1:]}"))
    if not all(splits.values()):
        raise UserError(f"{options.dataset} holds no .._val_000000.bin and .._train_000001.bin")
    wanted = splits["val"] + splits["train"][: options.max_shards or None]
    incoming = Path(options.out_dir, ".incoming")  # where an interrupted download goes on
    paths = [Path(download(options, name, commit, incoming)) for name, _ in wanted]
    for path in paths:
        open_shard(path)  # every one is whole before any gets its final name
    shards = []
    for path, (_, name) in zip(paths, wanted, strict=True):
        with replacing(Path(options.out_dir, name)) as temporary:
            os.replace(path, temporary)
        shards.append(describe(Path(options.out_dir, name)))
    shutil.rmtree(incoming)
    return commit, shards


# ---------------------------------------------------------------- the command


def prepare(options):
    """Make the shards and the manifest that `options` ask for, unless they are there; say so."""
    options = resolve(options)
    asked = settings(options)
    manifest = already_there(Path(options.out_dir), asked)
    if manifest:
        print("already there: ", end="")
    else:
        make = fetch_shards if options.source == "pretokenized" else write_shards
        revision, shards = make(options)
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
        manifest = {"version": VERSION, "revision": revision, **asked, **totals, "shards": shards}
        with replacing(Path(options.out_dir, MANIFEST)) as temporary:
            temporary.write_bytes(json.dumps(manifest, indent=1).encode() + b"\n")
    report(options.out_dir, manifest)


def settings(options):
    """The manifest's record of what decides the shards' content."""
    asked = {name: getattr(options, name) for name in SOURCES[options.source][2]}
    if options.dataset:
        asked["dataset"] += f"@{asked.pop('revision')}"
    if options.source == "local":  # not the paths: an input that moved is the same input
        files = [f"{path.name} {path.stat().st_size}" for path in local_files(options.input)]
        digest = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
        asked["input"] = f"{len(files)} files; sha256 of their names and sizes: {digest}"
    return {"source": options.source, "encoding": "gpt2", **asked}


def already_there(folder, asked):
    """The manifest of a folder that holds what is asked; None for one without shards."""
    remedy = "delete the folder or choose another --out_dir"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --out_dir")
    found = {path.name for path in folder.glob("*") if path.suffix in (".npy", ".bin")}
    if not found and not (folder / MANIFEST).exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        listed = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        state = f"{len(found)} shards and no whole {MANIFEST}, as a run that was cut short leaves"
        raise UserError(f"{folder} holds {state}: {remedy}") from None
    for key, value in asked.items():
        if manifest.get(key) != value:
            made = f"{key}={manifest.get(key)}, not {value}"
            raise UserError(f"{folder} holds shards made with {made}: {remedy}")
    if found != set(listed) or any(len(open_shard(folder / f)) != n for f, n in listed.items()):
        raise UserError(f"{folder} holds other shards than its {MANIFEST} lists: {remedy}")
    return manifest


def report(folder, manifest):
    train = [shard["tokens"] for shard in manifest["shards"] if "_train_" in shard["file"]]
    split = f"{len(train)} train + {len(manifest['shards']) - len(train)} val shards"
    steps = -(-sum(train) // GPT2_BATCH)
    epoch = f", {steps:,} steps an epoch at {GPT2_BATCH:,} tokens a step" if steps > 100 else ""
    print(f"{folder}: {split}, {manifest['tokens']:,} tokens{epoch}")
    config = "configs/tiny.toml " if sum(train) < 10_000_000 else ""
    print(f"train on it: python train_gpt2.py {config}--data_dir={folder}")


def main():
    prepare(command_line(Options, __doc__))


if __name__ == "__main__":
    run(main)
