"""Files and documents to Blocks of texts, from any place in them on: the input of fineweb.py.

Parsing is left to `Block.load`, which is called by the thread or process that tokenizes.
"""

import ast
import collections
import contextlib
import functools
import glob
import io
import itertools
import json
import os
import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError

BLOCK_BYTES = 1 << 23  # of text: large enough to hide what a Block costs, small beside any memory


class Block(NamedTuple):
    """Some texts of one file, not yet parsed: that is done by whoever tokenizes them."""

    load: Callable  # () -> pyarrow array of large_string
    start: int  # what the file holds before them: lines, rows, documents, bytes of a .txt
    share: float  # of the file that is read by their end, 0 to 1
    size: int = 0  # of what is held, in bytes
    goes_on: bool = False  # the first text goes on with the document of the Block before
    file: int = 0  # its number in the source


# ---------------------------------------------------------------- the documents that Python carries


def read_documents(skip):
    """python-docs in Blocks."""
    documents = list(python_docs())
    for start in range(skip, len(documents), 100):
        texts = documents[start : start + 100]
        share = (start + len(texts)) / len(documents)
        size = sum(map(len, texts))
        yield Block(functools.partial(large_strings, texts), start, share, size)


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


# ---------------------------------------------------------------- files


def local_files(inputs, tell=lambda left_out: None):
    """The files to read under files, folders and globs: in the inputs' order, then by name.

    `tell` is called with those of other kinds that lie among them, if there are any.
    """
    found, left_out = {}, set()
    for given in inputs:
        if not given:
            raise UserError("one --input is empty: expected a file, a folder or a glob")
        path = os.path.expanduser(given)
        hits = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
        if not hits:
            raise UserError(f"--input={given}: there is no such file or folder")
        files = set()
        for hit in map(Path, hits):
            files.update(below(hit) if hit.is_dir() else [hit])
        if gone := sorted(filter(is_missed, files)):
            raise UserError(f"{gone[0]} is a link to what is not there: restore that or remove it")
        files = {file for file in files if file.is_file()}
        readable = sorted((file for file in files if file_kind(file)), key=Path.as_posix)
        if not readable:
            kinds = f"{', '.join(READERS)} (but for the last also with .gz or .zst)"
            raise UserError(f"--input={given}: none of the {len(files):,} files there ends {kinds}")
        left_out |= files - set(readable)
        for file in readable:
            found.setdefault(os.path.realpath(file), file)
    if left_out:
        tell(left_out)
    return list(found.values())


def is_missed(file):
    """Whether it is a link to nothing that would be read: a text or, by its name, a folder."""
    try:
        file.stat()
    except FileNotFoundError:
        return bool(file_kind(file)) or not file.suffix
    except OSError:  # a link that leads to itself
        pass
    return False


def below(folder):
    """Yield what lies in a folder, in those in it and those that it links to, each once.

    What is hidden is left out, as a glob leaves it out. OSError if a folder cannot be read.
    """

    def refuse(error):
        raise error

    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort()  # of two ways to a folder the same is taken everywhere
        if (place := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(place)
        yield from (Path(root, file) for file in files if not file.startswith("."))


def file_kind(path):
    """The key of READERS that a file's name ends in, before .gz or .zst if any; "" for none."""
    suffixes = ["", *(suffix.lower() for suffix in Path(path).suffixes)]
    packed = suffixes[-1] in COMPRESSED
    kind = suffixes[-2 if packed else -1]
    return kind if kind in READERS and not (packed and kind == ".parquet") else ""


def read_file(path, column, skip):
    """Yield a file's Blocks from `skip` on: a .txt or .md, a line, or a row is one document."""
    try:
        yield from READERS[file_kind(path)](path, column, skip)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error}): replace it or leave it out") from None


# Where a text may be cut: before a space that follows another character. GPT-2's pattern looks at
# nothing behind a match, and no match of it runs from a character into a space, so that it finds
# the same on both sides. Characters beyond ASCII count, but for spaces and the byte order mark.
CUT = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])"
    rb"(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?<!\xef\xbb\xbf)[ \t\r\n]"
)
STRETCH_BYTES = 1 << 14  # of a text: what has to be given to tiktoken for one disputed letter
LONG_BYTES = 1 << 18  # a text above it is cut to stretches


def read_text(path, _, skip):
    """One document, in Blocks that end where a text may be cut."""
    with open_bytes(path) as (file, share):
        start, line, held = 0, 1, file.read(BLOCK_BYTES)
        while held:
            more = file.read(BLOCK_BYTES)
            end = last_cut(held) if more else len(held)
            if start >= skip and end:
                load = functools.partial(parse_text, held[:end], path, start, line)
                yield Block(load, start, share(), end, goes_on=start > 0)
            start, line, held = start + end, line + held.count(b"\n", 0, end), held[end:] + more


def last_cut(data):
    # what lies further back was searched when it came
    for begin in (max(0, len(data) - n) for n in (STRETCH_BYTES, BLOCK_BYTES + 1)):
        if cuts := [match.start() for match in CUT.finditer(data, begin)]:
            return cuts[-1]
    return 0


def parse_text(data, path, start, line):
    import pyarrow

    text = data if start else data.removeprefix(b"\xef\xbb\xbf")  # the mark of some editors
    try:
        return one_string(text)
    except pyarrow.ArrowInvalid:
        pass
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = f"byte {start + error.start + 1:,} of the file"
        raise not_utf8(f"{path}, line {line:,}, {byte}", error) from None


def bounds(texts):
    """Where each text of a large_string array begins in its buffer of bytes, and the last ends."""
    return np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]


def stretches(texts, goes_on):
    """Cut texts above LONG_BYTES, copying nothing; yield (about BLOCK_BYTES of them, begins).

    begins (texts,) is True for those that begin a document.
    """
    import pyarrow

    ends, data, cuts = bounds(texts), texts.buffers()[2], []
    for row in np.flatnonzero(np.diff(ends) > LONG_BYTES):
        at, end = map(int, ends[row : row + 2])
        while match := CUT.search(data, at + STRETCH_BYTES, end):
            cuts.append(at := match.start())
    rows = np.searchsorted(ends, cuts)
    begins = np.insert(np.ones(len(texts), bool), rows, False)
    begins[:1] &= not goes_on
    ends = np.insert(ends, rows, cuts)
    texts = pyarrow.LargeStringArray.from_buffers(len(begins), pyarrow.py_buffer(ends), data)
    parts = int(ends[-1] - ends[0]) // BLOCK_BYTES
    rows = np.searchsorted(ends, ends[0] + BLOCK_BYTES * np.arange(1, parts))
    for a, b in itertools.pairwise([0, *rows, len(texts)]):
        yield texts[a:b], begins[a:b]


def read_lines(path, column, skip):
    with open_bytes(path) as (file, share):
        start = 0
        for data in whole_lines(file):
            ends = count(np.frombuffer(data, np.uint8), ord("\n"))
            lines = ends + (not data.endswith(b"\n"))
            if start >= skip:
                load = functools.partial(parse_lines, data, lines, column, path, start)
                yield Block(load, start, share(), len(data))
            start += lines


def whole_lines(file):
    """Yield what the file holds in stretches of about BLOCK_BYTES that end with a line."""
    held = b""  # the beginning of a line
    while True:
        more = max(BLOCK_BYTES, len(held))  # of a long line twice as much each time
        data = bytearray(len(held) + more)  # which is read into, not copied
        with memoryview(data) as view:
            view[: len(held)] = held
            size = file.readinto(view[len(held) :])
        if not size:
            break
        end = data.rfind(b"\n", 0, len(held) + size) + 1
        held = bytes(data[end : len(held) + size])
        del data[end:]
        if data:
            yield data
    if held:
        yield held


PIECE = 1 << 16  # of a large array: what is made of one stays in the processor's cache


def count(array, value):
    pieces = (array[i : i + PIECE] for i in range(0, len(array), PIECE))
    return sum(int(np.count_nonzero(piece == value)) for piece in pieces)


def parse_lines(data, lines, column, path, start):
    """The texts of .jsonl lines: by Arrow's parser where it takes every line, else by Python's.

    Python's is slower, but takes lone surrogates and can say what is wrong with which line.
    """
    import pyarrow.json

    read = pyarrow.json.ReadOptions(use_threads=False, block_size=min(len(data), 2**31 - 1))
    only = pyarrow.schema([(column, pyarrow.large_string())])
    parse = pyarrow.json.ParseOptions(explicit_schema=only, unexpected_field_behavior="ignore")
    try:
        if not re.match(rb"(\xef\xbb\xbf)?\s*{", data):
            raise pyarrow.ArrowInvalid("its parser crashes where the first line is null")
        one_string(data)  # is all of it UTF-8?
        table = pyarrow.json.read_json(pyarrow.BufferReader(data), read, parse)
        if table.num_rows == lines and not table[column].null_count:
            return table[column].combine_chunks()
    except pyarrow.ArrowInvalid:
        pass
    texts = []
    for number, line in enumerate(io.BytesIO(data), start + 1):
        if not line.isspace():
            texts.append(parse_line(line, column, f"{path}, line {number:,}"))
    return large_strings(texts)


def parse_line(line, column, where):
    """The text of one line of JSON; null stands for an empty one."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(f"{where}, byte {error.start + 1:,}", error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): fix it or take it out") from None
    if not isinstance(record, dict) or column not in record:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        found = found or "no field"
        raise UserError(f"{where} has no {column!r} but {found}: see --text_column")
    text = record[column]
    if not isinstance(text, str | None):
        found = type(text).__name__
        raise UserError(f"{where}: expected text, found {found}: see --text_column")
    return text or ""


def read_rows(path, column, skip):
    import pyarrow
    import pyarrow.parquet

    try:
        how = dict(pre_buffer=False, buffer_size=1 << 20)
        with (
            pyarrow.OSFile(os.fsencode(path)) as opened,  # whatever bytes its name has
            pyarrow.parquet.ParquetFile(opened, **how) as file,
        ):
            if (there := file.schema_arrow.names.count(column)) != 1:
                found = ", ".join(file.schema_arrow.names)
                columns = f"{there} columns {column!r}" if there else f"no {column!r}"
                raise UserError(f"{path} has {columns} but {found}: see --text_column")
            kind = file.schema_arrow.field(column).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise UserError(f"{path}: expected text, found {kind}: see --text_column")
            yield from read_row_groups(file, path, column, skip)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a whole .parquet file ({error}); fetch it again") from None


ROWS = 16  # to read of a .parquet at a time: nothing tells before how long they will be


def read_row_groups(file, path, column, skip):
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    ends = [0, *itertools.accumulate(group.num_rows for group in groups)]
    leaf = [file.schema.column(i).path for i in range(len(file.schema))].index(column)
    sizes = [max(1, group.column(leaf).total_uncompressed_size) for group in groups]
    shares = np.cumsum([0, *sizes]) / max(1, sum(sizes))  # of its text that ends with a group
    first = sum(end <= skip for end in ends[1:])
    done, held, size = ends[first], [], 0
    rest = dict(row_groups=range(first, len(groups)), columns=[column])
    for batch in file.iter_batches(ROWS, **rest, use_threads=False):  # of one column they cost 20%
        texts, done = batch.column(0)[max(0, skip - done) :], done + len(batch)
        if done <= skip:  # an empty slice has the size of its dictionary
            continue
        held, size = [*held, texts], size + texts.nbytes
        if size >= BLOCK_BYTES or done == ends[-1]:
            start = done - sum(map(len, held))
            load = functools.partial(checked_strings, held, path, start)
            yield Block(load, start, np.interp(done, ends, shares), size)
            held, size = [], 0


def checked_strings(arrays, path, start):
    """Parts of a column as large strings; null stands for an empty one."""
    import pyarrow

    try:
        arrays = [array.cast(pyarrow.large_string()) for array in arrays]
        texts = pyarrow.concat_arrays(arrays).fill_null("")
        texts.validate(full=True)  # UTF-8
        return texts
    except pyarrow.ArrowInvalid as error:
        rows = f"rows {start + 1:,} to {start + sum(map(len, arrays)):,}"
        raise UserError(f"{path}, {rows}: {error}; convert or remove it") from None


def one_string(data):
    """Bytes as an Arrow array of one string, nothing copied; ArrowInvalid unless they are UTF-8."""
    import pyarrow

    held = [None, pyarrow.py_buffer(np.array([0, len(data)])), pyarrow.py_buffer(data)]
    string = pyarrow.Array.from_buffers(pyarrow.large_string(), 1, held)
    string.validate(full=True)
    return string


def large_strings(texts):
    """Python's strings as Arrow's; lone surrogates become U+FFFD, as in tiktoken."""
    import pyarrow

    try:
        return pyarrow.array(texts, pyarrow.large_string())
    except UnicodeEncodeError:
        utf16 = (text.encode("utf-16", "surrogatepass") for text in texts)
        texts = [text.decode("utf-16", "replace") for text in utf16]
        return pyarrow.array(texts, pyarrow.large_string())


READERS = {".txt": read_text, ".md": read_text, ".jsonl": read_lines, ".parquet": read_rows}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@contextlib.contextmanager
def open_bytes(path):
    """(a file to read what is inside, a function that tells which share of it was read)"""
    import pyarrow  # reads .gz and .zst, and tells when the end is missing: zstandard does not

    size, codec = os.path.getsize(path), COMPRESSED.get(Path(path).suffix.lower())
    if codec and not size:
        raise OSError(f"cut off: it has no byte of {codec}")
    with pyarrow.OSFile(os.fsencode(path)) as packed:
        file = pyarrow.CompressedInputStream(packed, codec) if codec else packed
        yield file, lambda: packed.tell() / max(1, size)


def not_utf8(where, error):
    return UserError(f"{where}: not UTF-8 ({error.reason}); convert or remove it")
