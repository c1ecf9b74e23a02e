"""fineweb.py: every token of every document once, in order, in shards that are whole or absent."""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preparing import (
    ROOT,
    TEXTS,
    Killed,
    bin_bytes,
    contents,
    flags,
    interrupted,
    killed_at,
    make_ranks,
    manifest_of,
    patched,
    prepare_in_ranks,
    reference,
    shard_paths,
    stream,
    with_sigkill,
    write_parquet,
)

import common
import fineweb
import reading
import train_gpt2
from common import UserError, command_line, replacing, run
from fineweb import END_OF_TEXT, Options, open_shard

TOKENIZERS = ["tiktoken", *["gigatoken"] * bool(importlib.util.find_spec("gigatoken"))]
with_gigatoken = pytest.mark.skipif(len(TOKENIZERS) < 2, reason="needs gigatoken")

# surrogates, unassigned, NUL and all; and the pieces at which a text might be cut wrongly
any_text = st.text(st.characters(exclude_categories=()))
PIECES = ["a", "'s", "é", "1", " ", "  ", "\t", "\n", "\r\n", "\0", "😀", "\ufeff", "<|endoftext|>"]
PIECES += [
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "\u200b",
    "語",
    " the",
    "\u088f",
    "\U00010940",
]
tricky_text = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
utf8_text = st.one_of(tricky_text, st.text(st.characters(exclude_categories=["Cs"])))


def zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


def jsonl(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_jsonl(path, texts):
    path.write_bytes(jsonl(texts))
    return path


WRITERS = {  # a file of each kind that holds these documents
    "txt": lambda path, texts: path.write_bytes("".join(texts).encode()),
    "md": lambda path, texts: path.write_bytes("".join(texts).encode()),
    "txt.gz": lambda path, texts: path.write_bytes(gzip.compress("".join(texts).encode())),
    "jsonl": write_jsonl,
    "jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(jsonl(texts))),
    "jsonl.zst": lambda path, texts: path.write_bytes(zstd(jsonl(texts))),
    "parquet": lambda path, texts: write_parquet(path, texts, row_group_size=3),
}


def is_one_document(kind):
    return kind.startswith(("txt", "md"))


def local(path, out_dir, **options):
    options = {"processes": 1, "val_tokens": 16, "shard_tokens": 64} | options
    return Options(source="local", input=(str(path),), out_dir=str(out_dir), **options)


def prepare_local(path, out_dir, **options):
    fineweb.prepare(local(path, out_dir, **options))
    return stream(out_dir)


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with files of most kinds, and its documents."""
    folder, texts = tmp_path_factory.mktemp("mixed"), []
    for i, kind in enumerate(["jsonl", "txt", "parquet", "md", "jsonl.zst", "txt.gz"]):
        part = TEXTS[6 * i : 6 * i + 6]
        WRITERS[kind](folder / f"{i}.{kind}", part)
        texts += ["".join(part)] if is_one_document(kind) else part
    return folder, texts


@pytest.fixture(scope="module", autouse=True)
def gigatoken_for_small_texts_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "SMALL", 0)
        yield


@contextlib.contextmanager
def quick_folder():
    """A new folder, and no waiting for the disk."""
    with tempfile.TemporaryDirectory() as folder, patched((os, "fsync", lambda file: None)):
        yield Path(folder)


def in_blocks_of(block_bytes, stretch_bytes):
    sizes = {"BLOCK_BYTES": block_bytes, "STRETCH_BYTES": stretch_bytes}
    sizes["LONG_BYTES"] = stretch_bytes
    return patched(*((reading, name, size) for name, size in sizes.items()))


small_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def command(*args, **env):
    line = [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | env)


@pytest.fixture
def end_of_command(monkeypatch, capsys):
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def end(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
        code = 0
        try:
            run(fineweb.main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return end


# ---------------------------------------------------------------- tokens


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(any_text, max_size=8),
    val_tokens=st.integers(1, 20),
    shard_tokens=st.integers(1, 40),
    tokenizer=st.sampled_from(TOKENIZERS),
)
def test_shards_concatenate_to_the_reference_encoding(
    documents, val_tokens, shard_tokens, tokenizer
):
    expected = reference(documents)
    with quick_folder() as folder:
        path, out_dir = write_jsonl(folder / "x.jsonl", documents), folder / "out"
        options = dict(val_tokens=val_tokens, shard_tokens=shard_tokens, tokenizer=tokenizer)
        if len(expected) <= val_tokens:
            with pytest.raises(UserError, match=f"gives {len(expected)} tokens, too few"):
                prepare_local(path, out_dir, **options)
            assert not out_dir.exists()
            return
        assert prepare_local(path, out_dir, **options) == expected
        sizes = [len(open_shard(path)) for path in shard_paths(out_dir)]
        assert sizes[0] == val_tokens
        assert set(sizes[1:-1]) <= {shard_tokens} and 0 < sizes[-1] <= shard_tokens


@settings(deadline=None, max_examples=80)
@given(
    files=st.lists(
        st.tuples(st.sampled_from(list(WRITERS)), st.lists(utf8_text, min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
    ),
    sizes=st.one_of(small_sizes, small_sizes.map(lambda sizes: tuple(20 * n for n in sizes))),
    tokenizer=st.sampled_from(TOKENIZERS),
)
def test_files_of_any_kind_in_blocks_of_any_size_give_the_reference_encoding(
    files, sizes, tokenizer
):
    documents = ["the first"]
    with quick_folder() as folder, in_blocks_of(*sizes):
        texts = folder / "texts"
        texts.mkdir()
        (texts / "0.txt").write_text(documents[0])
        for i, (kind, part) in enumerate(files, 1):
            WRITERS[kind](texts / f"{i}.{kind}", part)
            whole = ["".join(part).removeprefix("\ufeff")]
            documents += whole if is_one_document(kind) else part
        options = dict(val_tokens=1, shard_tokens=20, tokenizer=tokenizer)
        assert prepare_local(texts, folder / "out", **options) == reference(documents)


def tokens_of_text(path, skip=0):
    """The tokens of a .txt file from a byte on, as the pipeline makes them."""
    blocks = reading.read_file(path, "text", skip)
    return np.concatenate([[], *(fineweb.encode_block(block, None) for block in blocks)]).tolist()


@settings(deadline=None, max_examples=200)
@given(
    text=st.one_of(tricky_text, utf8_text),
    sizes=small_sizes,
    end=st.sampled_from(["txt", "txt.gz"]),
)
@example(text="no" * 40, sizes=(7, 3), end="txt")
@example(text=" " * 40 + "x", sizes=(7, 1), end="txt")
@example(text="a \r\n\r\n \t b" * 9, sizes=(3, 3), end="txt")
@example(
    text="a  b\u2009 c\u3000 d\xa0 e\x85 f\u2029 g\u202f h\u1680 i\u205f j", sizes=(1, 1), end="txt"
)
@example(text="a \xa0 \xa0\xa0b", sizes=(1, 1), end="txt")
@example(text="\ufeff", sizes=(1, 1), end="txt")
@example(text="\ufeff a b", sizes=(4, 1), end="txt")
@example(text="\ufeff\ufeff x", sizes=(2, 1), end="txt")
@example(text="語\u3000語\xa0é\x85😀\x1c \x1c a" * 9, sizes=(2, 2), end="txt")
def test_text_read_in_stretches_gives_the_tokens_of_the_uncut_text(text, sizes, end):
    expected = reference([text.removeprefix("\ufeff")])
    with tempfile.TemporaryDirectory() as folder, in_blocks_of(*sizes):
        path = Path(folder, f"x.{end}")
        WRITERS[end](path, [text])
        assert tokens_of_text(path) == expected
        for block in reading.read_file(path, "text", 0):  # a run may go on at each
            before = text.encode()[: block.start].decode().removeprefix("\ufeff")
            assert reference([before]) + tokens_of_text(path, block.start) == expected


def test_long_text_comes_in_many_stretches(tmp_path, small_blocks):
    path = tmp_path / "long.txt"
    path.write_text("one two three four\n" * 100)
    blocks = list(reading.read_file(path, "text", 0))
    assert len(blocks) > 15 and max(len(block.load()[0].as_py()) for block in blocks) <= 200
    parts = [part for block in blocks for part in reading.stretches(block.load(), block.goes_on)]
    assert max(len(text.as_py()) for texts, _ in parts for text in texts) <= 50
    parts = list(reading.stretches(reading.large_strings(["one two " * 100]), False))
    assert max(len("".join(texts.to_pylist())) for texts, _ in parts) <= 250
    shares = [block.share for block in blocks]
    assert shares == sorted(shares) and shares[0] < 0.2 and shares[-1] == 1.0


def test_share_of_a_parquet_file_goes_by_its_text_not_its_rows(tmp_path, small_blocks):
    texts = ["one long text " * 1000, *["short"] * 1000]
    path = write_parquet(tmp_path / "x.parquet", texts, row_group_size=50, use_dictionary=False)
    shares = [block.share for block in reading.read_file(path, "text", 0)]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert shares[24] > 0.5  # after 50 rows


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
)
def test_shards_keep_every_token_in_order_and_a_run_can_go_on_after_each(lengths, sizes):
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    parts = np.split(tokens, np.cumsum(lengths, dtype=int)[:-1]) if lengths else []
    blocks = [
        (reading.Block(None, start, 1.0, file=start % 3), part) for start, part in enumerate(parts)
    ]

    def cut(stream, sizes, skip=0):
        stream = fineweb.TokenStream(stream, skip)
        return [(np.concatenate([[], *stream.take(n)]).tolist(), stream.place()) for n in sizes]

    made, borders = cut(blocks, sizes), np.minimum(np.cumsum([0, *sizes]), len(tokens))
    for number, (shard, place) in enumerate(made, 1):
        assert shard == tokens[slice(*borders[number - 1 : number + 1])].tolist()
        assert (place is None) == (borders[number] == len(tokens))
        if place:
            file, start, used = place
            assert file == start % 3
            assert cut(blocks[start:], sizes[number:], skip=used) == made[number:]


def test_document_may_span_shards_and_be_longer_than_one(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("one two three four " * 100)
    assert prepare_local(path, tmp_path / "out", shard_tokens=7) == reference([path.read_text()])
    shards = manifest_of(tmp_path / "out")["shards"]
    assert len(shards) > 50
    assert [shard["documents"] for shard in shards] == [1] + [0] * (len(shards) - 1)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_document_is_led_by_one_end_of_text(corpus, tmp_path, tokenizer):
    tokens = prepare_local(corpus, tmp_path / "out", tokenizer=tokenizer)
    assert tokens[0] == END_OF_TEXT
    assert tokens.count(END_OF_TEXT) == len(TEXTS) == manifest_of(tmp_path / "out")["documents"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_special_token_text_is_ordinary_text(tmp_path, tokenizer):
    text = "a <|endoftext|> b <|endoftext|>" * 9
    path = write_jsonl(tmp_path / "x.jsonl", [text])
    tokens = prepare_local(path, tmp_path / "out", tokenizer=tokenizer)
    assert tokens[0] == END_OF_TEXT and END_OF_TEXT not in tokens[1:]
    assert fineweb.tokenizer().decode(tokens[1:]) == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_nul_and_surrogates_are_encoded(tmp_path, tokenizer):
    texts = ["a\0b\0", "lone \ud800 and \udfff, pair \ud83d\ude00", "a bit more of ordinary text"]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    assert prepare_local(path, tmp_path / "out", tokenizer=tokenizer) == reference(texts)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_line_of_ten_megabytes_is_encoded(tmp_path, name, tokenizer):
    text = "word, " * 1_700_000
    path = tmp_path / name
    WRITERS[path.suffix[1:]](path, [text])
    assert path.stat().st_size > 10**7 > reading.BLOCK_BYTES
    expected = np.array(reference([text]), np.uint16)
    options = local(path, tmp_path / "out", tokenizer=tokenizer, shard_tokens=2_000_000)
    fineweb.prepare(options)
    made = np.concatenate([open_shard(path) for path in shard_paths(tmp_path / "out")])
    assert np.array_equal(made, expected)


@settings(deadline=None, max_examples=200)
@given(
    documents=st.lists(st.one_of(tricky_text, utf8_text), max_size=6),
    start=st.integers(0, 2),
    sizes=small_sizes,
)
@example(documents=["", "a b " * 9, "", "<|endoftext|> \u088f" * 9, ""], start=0, sizes=(9, 3))
def test_long_documents_are_cut_where_their_tokens_are_and_begin_once(documents, start, sizes):
    texts = reading.large_strings(documents)[start:]  # shares memory with those before
    expected = reference(texts.to_pylist())
    with in_blocks_of(*sizes):
        parts = list(reading.stretches(texts, False))
        block = reading.Block(lambda: texts, 0, 1.0)
        assert fineweb.encode_block(block, None).tolist() == expected
        assert fineweb.encode_block(block, fast_tokenizer()).tolist() == expected
    made = [text for part, _ in parts for text in part.to_pylist()]
    assert "".join(made) == "".join(texts.to_pylist())
    assert sum(begins.sum() for _, begins in parts) == len(texts)


@with_gigatoken
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_long_line_with_a_disputed_letter_takes_no_more_memory_for_it(tmp_path):
    """As tiktoken's lists of Python's numbers, the whole line took ten times its size."""
    peaks = []
    for odd in ("", "\u088f <|endoftext|>"):
        path = write_jsonl(tmp_path / "x.jsonl", ["a few words " * 3_000_000 + odd + " and more"])
        options = flags(local(path, tmp_path / f"out{len(peaks)}", shard_tokens=10**7))
        code = f"import fineweb, sys; sys.argv[1:] = {options}; fineweb.main()"
        code += "; print(open('/proc/self/status').read())"  # ru_maxrss begins with the parent's
        made = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", made)[1]) // 1024)  # MiB
    assert peaks[1] < peaks[0] + 120  # not 250


def random_letters(size):
    return np.random.default_rng(0).integers(97, 123, size, np.uint8).tobytes().decode()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_document_of_megabytes_without_a_space_is_encoded(tokenizer):
    size = 10_000_000 if tokenizer == "gigatoken" else 1_000_000  # tiktoken takes 7 s for ten
    text = random_letters(size)
    block = reading.Block(lambda: reading.large_strings([text]), 0, 1.0)
    tokens = fineweb.encode_block(block, fast_tokenizer() if tokenizer == "gigatoken" else None)
    assert tokens[0] == END_OF_TEXT
    assert fineweb.tokenizer().decode_bytes(tokens[1:].tolist()) == text.encode()


@pytest.mark.parametrize("spaces", [" ", "\n", "\u3000", "\r\n\t \xa0", "\x1c "])
@pytest.mark.parametrize("end", ["", "b", " \u088f c", "\x1cd"])
def test_endless_white_space_is_encoded_as_the_pattern_has_it(monkeypatch, spaces, end):
    texts = ["a" + spaces * 40 + end, spaces * 9 + end, f"{spaces * 7}'s{spaces * 8} d"]
    expected = reference(texts)
    monkeypatch.setattr(fineweb, "SPACES", re.compile(fineweb.SPACES.pattern.replace("10000", "5")))
    monkeypatch.setattr(fineweb, "ENDLESS", 5)
    assert fineweb.encode(texts).tolist() == expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_two_million_spaces_are_encoded(tokenizer):
    block = reading.Block(lambda: reading.large_strings(["x" + " " * 2_000_000 + "y"]), 0, 1.0)
    tokens = fineweb.encode_block(block, fast_tokenizer() if tokenizer == "gigatoken" else None)
    assert tokens.tolist() == [END_OF_TEXT, 87, *[220] * 1_999_999, 331]


def test_empty_documents_are_left_out(tmp_path):
    lines = ['{"text": ""}', '{"text": null}', "", '{"text": ""}']
    lines[3:3] = ['{"text": "the cat sat"}'] * 20
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    tokens = prepare_local(tmp_path / "x.jsonl", tmp_path / "out")
    assert tokens == reference(["the cat sat"] * 20)


# ---------------------------------------------------------------- gigatoken


@functools.cache
def fast_tokenizer():
    return fineweb.FastTokenizer()


def fast(texts):
    return fast_tokenizer().encode(reading.large_strings(texts)).tolist()


@with_gigatoken
@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(any_text, tricky_text), max_size=20), st.integers(0, 20))
def test_gigatoken_gives_tiktokens_tokens(texts, start):
    assert fast(texts) == reference(texts)
    part = reading.large_strings(texts)[start:]  # shares memory with the whole
    assert fast_tokenizer().encode(part).tolist() == reference(texts[start:])


@with_gigatoken
def test_gigatoken_gives_tiktokens_tokens_of_a_word_without_end():
    text = random_letters(300_000)
    assert fast([text]) == reference([text])


@with_gigatoken
@pytest.mark.parametrize("glue", ["'s", " 1", "a", "  \n"])
def test_gigatoken_and_tiktoken_agree_on_every_character(glue):
    every = map(chr, range(0x40000))  # the planes in which characters have a meaning
    agreed = glue.join(char for char in every if not fineweb.DISPUTED.search(char))
    assert fast([agreed]) == fineweb.encode([agreed]).tolist()


@with_gigatoken
@pytest.mark.parametrize("places", [[0], [4], [0, 1], [1, 3], [3, 4], [0, 1, 2, 3, 4], []])
def test_disputed_letters_are_tokenized_by_the_reference_wherever_they_stand(places):
    new = [f"{char}'s a{char}" for char in "\u088f\u0c5c\u1c89\ua7ce\U00010940\U000323b0"]
    for letters in new:
        texts = [letters if i in places else f"text {i} é" for i in range(5)]
        assert fineweb.disputed(reading.large_strings(texts)) == places
        assert fast(texts) == reference(texts)


def test_every_disputed_letter_is_found():
    letters = [char for char in map(chr, range(0x40000)) if fineweb.DISPUTED.match(char)]
    assert fineweb.disputed(reading.large_strings(letters)) == [*range(len(letters))]


@with_gigatoken
def test_gigatoken_renewed_after_every_batch_gives_the_same_tokens(monkeypatch):
    made, seen = fineweb.FastTokenizer(), set()
    monkeypatch.setattr(fineweb.FastTokenizer, "RENEWAL", 0.0)
    for texts in (TEXTS[:20], TEXTS[20:], ["word " * 9]):
        assert made.encode(reading.large_strings(texts)).tolist() == reference(texts)
        assert made.gigatoken not in seen
        seen.add(made.gigatoken)


def test_tokenizer_is_tiktokens_gpt2(tmp_path, monkeypatch):
    # what it would download, under the names of its cache; it knows the sha256 of both
    cached = {"vocab.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}
    cached["merges.txt"] = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    for file, name in cached.items():
        (tmp_path / name).write_bytes((ROOT / "assets" / file).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("requests.get", None)
    made, theirs = fineweb.tokenizer(), tiktoken.get_encoding("gpt2")
    assert (made.name, made._pat_str) == (theirs.name, theirs._pat_str)
    assert made._mergeable_ranks == theirs._mergeable_ranks
    assert made._special_tokens == theirs._special_tokens


@with_gigatoken
def test_few_bytes_are_not_worth_a_call_of_gigatoken(monkeypatch):
    made = fineweb.FastTokenizer()
    monkeypatch.setattr(fineweb, "SMALL", 10_000)
    assert made.encode(reading.large_strings(TEXTS)).tolist() == reference(TEXTS)
    assert made.gigatoken is None
    assert made.encode(reading.large_strings(TEXTS * 9)).tolist() == reference(TEXTS * 9)
    assert made.gigatoken


# ---------------------------------------------------------------- processes


def test_bytes_do_not_depend_on_processes_or_tokenizer(mixed, tmp_path, small_blocks):
    made = []
    for tokenizer, processes in itertools.product(TOKENIZERS, (1, 2)):
        out = tmp_path / f"{tokenizer}-{processes}"
        prepare_local(mixed[0], out, processes=processes, tokenizer=tokenizer)
        made.append(contents(out))
    assert len(made[0]) > 5
    assert all(other == made[0] for other in made[1:])


def pipeline(tokenizer="tiktoken", processes=2):
    return Options(tokenizer=tokenizer, processes=processes)


@pytest.mark.parametrize(
    ("size", "ahead"), [(0, 2 + fineweb.AHEAD), (fineweb.AHEAD // 2 * reading.BLOCK_BYTES, 3)]
)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_reading_is_only_a_few_blocks_ahead_of_the_writing_and_fewer_large_ones(
    tokenizer, size, ahead
):
    asked = []

    def blocks():
        for i in itertools.count():
            asked.append(i)
            yield reading.Block(lambda: reading.large_strings(["text"]), i, 0.5, size)

    with contextlib.closing(fineweb.tokenize(blocks(), pipeline(tokenizer, 1))) as tokens:
        for i, (block, made) in enumerate(itertools.islice(tokens, 20)):
            assert (block.start, made.tolist()) == (i, reference(["text"]))
            assert len(asked) - i <= ahead
    assert len(asked) <= 20 + ahead


@with_gigatoken
def test_gigatoken_is_fed_by_four_threads_at_most():
    together, threads = threading.Barrier(4), set()

    def texts():
        threads.add(threading.get_ident())
        together.wait(5)
        return reading.large_strings(["text"])

    blocks = [reading.Block(texts, i, 1.0) for i in range(12)]
    assert len(list(fineweb.tokenize(blocks, pipeline("gigatoken", 16)))) == 12
    assert len(threads) == 4


def end_this_process():
    os._exit(3)


def test_dead_worker_is_one_clear_error():
    blocks = [reading.Block(end_this_process, 0, 1.0)] * 3
    with pytest.raises(UserError, match=r"process died.*--processes=1"):
        list(fineweb.tokenize(blocks, pipeline()))


@with_sigkill
def test_workers_end_when_the_main_process_is_killed():
    code = """
import functools, itertools, multiprocessing, fineweb, reading
if __name__ == "__main__":
    block = reading.Block(functools.partial(reading.large_strings, ["text"]), 0, 1.0)
    options = fineweb.Options(tokenizer="tiktoken", processes=2)
    for _ in fineweb.tokenize(itertools.repeat(block), options):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    workers = [int(pid) for pid in main.stdout.readline().split()]
    main.send_signal(signal.SIGKILL)
    main.communicate(timeout=20)  # the workers hold its output open until they end
    assert len(workers) == 2


def sleep_a_minute():
    time.sleep(60)
    return reading.large_strings(["text"])


def test_interrupted_preparation_waits_for_no_text_that_is_being_tokenized():
    """Such a wait took seconds, and a second Ctrl-C in it left processes that never ended."""

    def blocks():
        yield from [reading.Block(sleep_a_minute, 0, 1.0)] * 3
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(fineweb.tokenize(blocks(), pipeline()))
    assert time.monotonic() - begun < 30 and not multiprocessing.active_children()


def test_process_of_the_caller_s_own_is_left_to_it():
    other = multiprocessing.get_context("spawn").Process(target=sleep_a_minute)
    other.start()
    try:
        block = reading.Block(number_of_this_process, 0, 1.0)
        assert len(list(fineweb.tokenize([block] * 3, pipeline()))) == 3
        other.join(1)  # a signal takes a moment
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_tokenizer_that_was_edited_is_not_mixed_with_gigatoken_s(monkeypatch, tmp_path):
    one = fineweb.tokenizer()
    edited = tiktoken.Encoding(
        "mine", pat_str=r"\p{N}|\P{N}+", mergeable_ranks=one._mergeable_ranks, special_tokens={}
    )
    prepare_local(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    monkeypatch.setattr(fineweb, "tokenizer", lambda: edited)
    with pytest.raises(UserError, match="made with encoding=gpt2, not mine"):
        prepare_local(tmp_path / "a.jsonl", tmp_path / "out", tokenizer="tiktoken", processes=1)
    with pytest.raises(UserError, match="no longer gigatoken's GPT-2: use --tokenizer=tiktoken"):
        prepare_local(tmp_path / "a.jsonl", tmp_path / "other", tokenizer="gigatoken")


def number_of_this_process():
    return reading.large_strings([str(os.getpid())])


@with_sigkill
def test_workers_leave_ctrl_c_to_the_main_process():
    blocks, workers = itertools.repeat(reading.Block(number_of_this_process, 0, 1.0)), set()
    with contextlib.closing(fineweb.tokenize(blocks, pipeline())) as made:
        numbers = (int(fineweb.tokenizer().decode(tokens[1:])) for _, tokens in made)
        while len(workers) < 2:
            workers.add(next(numbers))
        for worker in workers:
            os.kill(worker, signal.SIGINT)  # a terminal sends it to all
        assert set(itertools.islice(numbers, 200)) <= workers


# ---------------------------------------------------------------- shards, manifest, folder


def test_manifest_says_what_the_shards_hold(corpus, tmp_path):
    prepare_local(corpus, tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    names = [shard["file"] for shard in manifest["shards"]]
    assert names[:2] == ["edufineweb_val_000000.npy", "edufineweb_train_000001.npy"]
    assert names == [path.name for path in shard_paths(tmp_path / "out")]
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["file"]
        tokens = np.load(path)
        assert tokens.dtype == np.uint16 and tokens.ndim == 1
        assert shard["tokens"] == len(tokens)
        assert shard["documents"] == np.count_nonzero(tokens == END_OF_TEXT)
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["tokens"] == len(reference(TEXTS))
    assert (manifest["source"], manifest["encoding"]) == ("local", "gpt2")
    assert (manifest["version"], manifest["shard_tokens"]) == (fineweb.VERSION, 64)
    assert not any(manifest["next"].values())


def test_same_input_elsewhere_gives_the_same_bytes(corpus, tmp_path):
    prepare_local(corpus, tmp_path / "a")
    (tmp_path / "moved").mkdir()
    prepare_local(shutil.copy(corpus, tmp_path / "moved"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("max_shards", [1, 2, 1000])
def test_max_shards_keeps_the_first(corpus, tmp_path, max_shards):
    expected = reference(TEXTS)[: 16 + 64 * max_shards]
    assert prepare_local(corpus, tmp_path / "out", max_shards=max_shards) == expected
    assert manifest_of(tmp_path / "out")["tokens"] == len(expected)


def test_more_max_shards_extend_a_folder_to_what_one_run_makes(mixed, tmp_path, small_blocks):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = prepare_local(mixed[0], whole)
    for count in (1, 3, 4):
        assert prepare_local(mixed[0], out, max_shards=count) == expected[: 16 + 64 * count]
        before = {path: path.stat().st_mtime_ns for path in shard_paths(out)}
    prepare_local(mixed[0], out)
    assert contents(out) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none was made again


@pytest.mark.parametrize("max_shards", [1, 2, 3])
def test_no_more_max_shards_than_there_are_is_already_there(corpus, tmp_path, capsys, max_shards):
    prepare_local(corpus, tmp_path / "out", max_shards=3)
    before = contents(tmp_path / "out")
    capsys.readouterr()
    prepare_local(corpus, tmp_path / "out", max_shards=max_shards)
    assert capsys.readouterr().out.startswith("already there: ")
    assert contents(tmp_path / "out") == before


def test_more_shards_than_can_be_numbered_are_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.Ranks, "shard_sizes", lambda *_: [16, 64, 64])
    with pytest.raises(UserError, match="more than 3 shards: set --shard_tokens to more"):
        prepare_local(corpus, tmp_path / "out")


def test_input_too_small_to_train_on_is_refused_and_leaves_nothing(corpus, tmp_path):
    size = len(reference(TEXTS))
    told = f"{size:,} tokens, too few for --val_tokens={size} .* try --val_tokens={size // 10}$"
    with pytest.raises(UserError, match=told):
        prepare_local(corpus, tmp_path / "out", val_tokens=size)
    assert not (tmp_path / "out").exists()
    assert len(prepare_local(corpus, tmp_path / "out", val_tokens=size - 1)) == size


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet", "empty.jsonl.gz"])
def test_input_without_text_is_refused_and_leaves_nothing(tmp_path, name):
    WRITERS[name.removeprefix("empty.")](tmp_path / name, [])
    with pytest.raises(UserError, match="the input gives 0 tokens, too few"):
        prepare_local(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_second_run_says_already_there_and_writes_nothing(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    prepare_local(corpus, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    first = capsys.readouterr().out
    prepare_local(corpus, out, processes=2, tokenizer="tiktoken")
    assert capsys.readouterr().out == "already there: " + first[first.index(f"{out}: ") :]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def change_input(corpus, out):
    write_jsonl(corpus, TEXTS[1:])


def remove_manifest(corpus, out):
    (out / "manifest.json").unlink()


def cut_manifest(corpus, out):
    os.truncate(out / "manifest.json", 100)


def remove_shard(corpus, out):
    (out / "edufineweb_train_000003.npy").unlink()


def cut_shard(corpus, out):
    os.truncate(out / "edufineweb_train_000003.npy", 150)


def swap_shard(corpus, out):
    np.save(out / "edufineweb_train_000003.npy", np.zeros(5, np.uint16))


def add_shard(corpus, out):
    np.save(out / "edufineweb_train_000999.npy", np.zeros(5, np.uint16))


CHANGES = [
    (change_input, r"made with input=1 files.* not 1 files"),
    (remove_manifest, r"holds \d+ shards and no manifest.json"),
    (cut_manifest, r"no whole manifest.json"),
    (remove_shard, r"lacks shards that its manifest.json lists"),
    (cut_shard, r"train_000003.npy is not whole"),
    (swap_shard, r"train_000003.npy: manifest.json says 64 tokens, found 5"),
    (add_shard, r"other shards than its manifest.json lists \(edufineweb_train_000999.npy\)"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_folder_with_other_shards_is_refused_and_kept(corpus, tmp_path, change, says):
    out = tmp_path / "out"
    prepare_local(corpus, out)
    change(corpus, out)
    before = contents(out)
    with pytest.raises(UserError, match=says) as error:
        prepare_local(corpus, out)
    assert str(out) in str(error.value) and "delete" in str(error.value)
    assert contents(out) == before


@pytest.mark.parametrize("place", [0, -1])
def test_long_input_that_differs_at_either_end_is_another(corpus, tmp_path, place):
    data = bytearray(corpus.read_bytes() + b"\n" * 200_000)
    corpus.write_bytes(data)
    prepare_local(corpus, tmp_path / "out")
    data[place] = ord(" ")
    corpus.write_bytes(data)
    with pytest.raises(UserError, match=r"made with input=1 files.* not 1 files"):
        prepare_local(corpus, tmp_path / "out")


def assert_refuses_what_is_made_otherwise(corpus, out):
    """Whoever wants other shards than are (to be) in a folder is told so, and nothing changes."""
    before = contents(out)
    for name, value in {"shard_tokens": 65, "val_tokens": 17, "text_column": "id"}.items():
        with pytest.raises(UserError, match=f"made with {name}=.*, not {value}: delete the folder"):
            prepare_local(corpus, out, **{name: value})
    with pytest.raises(UserError, match="made with source=local, not python-docs"):
        fineweb.prepare(Options(source="python-docs", out_dir=str(out)))
    with pytest.raises(UserError, match=r"made with input=1 files.* not 1 files"):
        prepare_local(write_jsonl(corpus.with_name("other.jsonl"), TEXTS), out)
    for manifest in out.glob("manifest*.json"):
        manifest.write_text(manifest.read_text().replace('"gpt2"', '"cl100k_base"'))
    changed = contents(out)
    with pytest.raises(UserError, match="made with encoding=cl100k_base, not gpt2: delete"):
        prepare_local(corpus, out)
    assert contents(out) == changed
    for name, data in before.items():
        (out / name).write_bytes(data)


def test_folder_made_with_other_options_is_refused(corpus, tmp_path):
    prepare_local(corpus, tmp_path / "out")
    assert_refuses_what_is_made_otherwise(corpus, tmp_path / "out")


def test_folder_of_another_version_of_the_tool_is_not_gone_on_with(corpus, tmp_path, monkeypatch):
    prepare_local(corpus, tmp_path / "out", max_shards=1)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(fineweb, "VERSION", fineweb.VERSION + 1)
    with pytest.raises(UserError, match="made with version=1, not 2: delete"):
        prepare_local(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_second_run_into_a_folder_is_refused_while_the_first_is_on(corpus, tmp_path):
    out = tmp_path / "out"
    with (
        fineweb.locked(out, fineweb.Ranks(), new=True),
        pytest.raises(UserError, match="another run is"),
    ):
        prepare_local(corpus, out)
    assert not out.exists()
    assert prepare_local(corpus, out) == reference(TEXTS)
    assert not list(out.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows deletes no open file")
@pytest.mark.parametrize("anew", [False, True], ids=["deleted", "made anew"])
def test_lock_of_a_run_that_ended_just_now_locks_nothing(corpus, tmp_path, monkeypatch, anew):
    """Another run takes the lock that has its name now, and both would be making the folder."""
    (tmp_path / "out").mkdir()

    def lock(file):
        os.unlink(file.name)
        if anew:
            Path(file.name).touch()
        return common.lock(file)

    monkeypatch.setattr(fineweb, "lock", lock)
    with pytest.raises(UserError, match="another run is making"):
        prepare_local(corpus, tmp_path / "out")
    assert not shard_paths(tmp_path / "out")


def test_text_that_is_cut_to_other_blocks_than_before_is_not_gone_on_with(tmp_path, monkeypatch):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    prepare_local(corpus, tmp_path / "out", max_shards=5)
    assert manifest_of(tmp_path / "out")["next"]["0"][1] == 14  # Blocks of 700 begin at 13 and 17
    for size in (700, 100_000):
        monkeypatch.setattr(reading, "BLOCK_BYTES", size)
        with pytest.raises(UserError, match="not read as when its shards were begun: delete"):
            prepare_local(corpus, tmp_path / "out")


def test_refused_run_leaves_an_empty_folder_that_was_there(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="too few for"):
        prepare_local(corpus, tmp_path / "out", val_tokens=100_000)
    assert list((tmp_path / "out").iterdir()) == []


def test_run_that_ends_while_another_looks_is_looked_at_again(corpus, tmp_path, monkeypatch):
    expected, read = prepare_local(corpus, tmp_path / "out"), fineweb.read_manifest

    def first_time(path):  # its manifest.partial is there no more
        monkeypatch.setattr(fineweb, "read_manifest", read)
        return read(path.with_name(fineweb.PARTIAL.format(0)))

    monkeypatch.setattr(fineweb, "read_manifest", first_time)
    assert prepare_local(corpus, tmp_path / "out") == expected


def test_out_dir_that_is_a_file_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="is a file"):
        prepare_local(corpus, corpus)


def test_error_in_mid_write_leaves_no_file_under_the_final_name(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"x.npy": b"old"}
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"x.npy": b"new"}


def test_file_that_a_scanner_holds_for_a_moment_gets_its_name(tmp_path, monkeypatch):
    replace, held = os.replace, []

    def replace_held(source, target):
        if held.pop():
            raise PermissionError(13, "used by another process", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_held)
    monkeypatch.setattr(common, "RETRIES", (0, 0))
    for times, there in ((0, True), (2, True), (3, False)):
        path, held[:] = tmp_path / str(times), [False] + [True] * times
        fate = contextlib.nullcontext() if there else pytest.raises(PermissionError)
        with fate, replacing(path) as temporary:
            temporary.write_text("all of it")
        assert [*tmp_path.glob(f"*{times}*")] == [path] * there


def test_every_file_is_synced_before_it_gets_its_name(corpus, tmp_path, synced):
    prepare_local(corpus, tmp_path / "out")
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} <= synced


def test_report_counts_steps_of_an_epoch_rounded_up(capsys):
    sizes = [100_000_000] * 99 + [53_989_101]
    names = ["edufineweb_val_000000.npy", *["edufineweb_train_000001.npy"] * 99]
    shards = [{"file": name, "tokens": size} for name, size in zip(names, sizes, strict=True)]
    fineweb.report("there", {"tokens": sum(sizes), "shards": shards})
    first, second = capsys.readouterr().out.splitlines()
    steps = "18,795 steps an epoch at 524,288 tokens a step"
    assert first == f"there: 99 train + 1 val shards, 9,953,989,101 tokens, {steps}"
    assert second == "train on it: " + common.command("train_gpt2.py", "--data_dir=there")


def test_bar_counts_tokens_with_rate_and_what_is_left(corpus, tmp_path, screen, small_blocks):
    total = len(prepare_local(corpus, tmp_path / "out"))
    bars = screen.getvalue().split("\r")
    assert re.search(rf"100%.* {total / 1000:.2f}k/{total / 1000:.2f}k \[.*tokens/s\]", bars[-1])
    foreseen = [re.search(r"/(\S+) \[\S+<(\S+),", bar) for bar in bars]
    totals = [float(match[1].rstrip("k")) for match in foreseen if match and "k" in match[1]]
    assert len(totals) > 10
    assert all(0.5 * total < 1000 * guess < 2 * total for guess in totals)


# ---------------------------------------------------------------- the disk


def test_disk_without_room_is_one_error_before_anything_is_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        UserError, match=r"out needs \S+kB more, 1.00kB are free: free some, or .*guessed from"
    ):
        prepare_local(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_to_come_is_said_in_tokens_and_bytes(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * 10**9))
    total = len(prepare_local(corpus, tmp_path / "out"))
    tokens, size = f"{total / 1000:.2f}k tokens", f"{2 * total / 1000:.2f}kB of shards"
    assert f"to come: about {tokens}, {size}; 7.00GB are free\n" in capsys.readouterr().out
    prepare_local(corpus, tmp_path / "less", max_shards=1)
    assert (
        "to come: about 80.0 tokens, 160B of shards; 7.00GB are free\n" in capsys.readouterr().out
    )


def test_what_is_to_come_is_not_guessed_from_a_first_small_file(tmp_path, monkeypatch, capsys):
    """Packed files hold several times their bytes."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("read me first", encoding="utf-8")
    line = json.dumps({"text": "".join(random.Random(1).choices("abcdefgh ", k=5000))}) + "\n"
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(line.encode() * 100))
    total = len(prepare_local(tmp_path / "in", tmp_path / "out", shard_tokens=100_000))
    assert f"to come: about {total / 1000:.0f}k tokens" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_names_of_files_are_any_bytes(tmp_path, kind):
    path = tmp_path / "x.parquet"
    write_parquet(path, ["some text " * 50])
    content = {"txt": b"some text " * 50, "jsonl": GOOD * 50, "parquet": path.read_bytes()}[kind]
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/n\xe4me." + kind.encode())).write_bytes(content)
    assert len(prepare_local(tmp_path / "in", tmp_path / "out", val_tokens=10)) > 50


@pytest.mark.parametrize(
    ("rank", "sizes", "most", "needed"),
    [
        (0, [9], 0, 6000),  # the only file
        (0, [5, 5], 0, 12_000),
        (0, [6, 2, 2], 0, 10_000),
        (3, [18, 2], 0, 24_000),  # a part smaller than most
        (0, [5, 5], 3, 2 * (10 + 3 * 100)),
    ],
)
def test_ranks_foresee_what_their_files_come_to(tmp_path, monkeypatch, rank, sizes, most, needed):
    asked = []
    monkeypatch.setattr(fineweb, "check_disk", lambda folder, size: asked.append(size) or 0)
    how = dict(out_dir=str(tmp_path), max_shards=most, val_tokens=10, shard_tokens=100)
    fineweb.foresee(Options(**how), make_ranks(4)[rank], fineweb.Source("", sizes, None), 6000)
    assert asked == [needed]


def test_room_is_asked_for_what_is_still_to_come(corpus, tmp_path, monkeypatch, small_blocks):
    asked = []
    monkeypatch.setattr(fineweb, "check_disk", lambda folder, size: asked.append(size) or 0)
    total = len(prepare_local(corpus, tmp_path / "out", max_shards=5))
    prepare_local(corpus, tmp_path / "out", max_shards=6)
    whole, rest = asked
    assert whole == 2 * total
    assert 2 * 64 <= rest <= 2 * 64 + 2 * 100  # a block is the least to go on from


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_that_fills_up_ends_in_one_line_and_can_go_on(corpus, tmp_path, end_of_command):
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_local(corpus, whole)
    shard = "edufineweb_train_000003.npy"

    def replacing(path):
        if path.name == shard:
            path.with_name(f".{shard}.{os.getpid()}.tmp").symlink_to("/dev/full")
        return common.replacing(path)

    with patched((fineweb, "replacing", replacing)):
        code, _, err = end_of_command(*flags(local(corpus, out)))
    assert code == 2 and re.fullmatch(r"error: .*No space left.*: fix that and run .*\n", err)
    assert shard not in contents(out)
    assert end_of_command(*flags(local(corpus, out)))[0] == 0
    assert contents(out) == contents(whole)


FILL_A_DISK = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 77
cd "$1"; shift
"$@" 2> "$ERRORS"; echo $? >> "$ERRORS"; ls -A out >> "$ERRORS"
mount -o remount,size=100m . && "$@" && cp -r out "$RESULT"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a disk of its own")
def test_real_full_disk_in_the_middle_of_a_shard(tmp_path):
    texts = ["one two three four " * 1000] * 300  # 2.4 MB of shards
    corpus, errors, result = tmp_path / "x.jsonl", tmp_path / "errors", tmp_path / "result"
    expected = prepare_local(write_jsonl(corpus, texts), tmp_path / "whole", shard_tokens=200_000)
    (tmp_path / "disk").mkdir()
    code = "import common, fineweb; fineweb.check_disk = lambda *_: 0; common.run(fineweb.main)"
    options = flags(local(corpus, "out", shard_tokens=200_000))
    line = ["unshare", "-rm", "sh", "-c", FILL_A_DISK, "sh", tmp_path / "disk", sys.executable]
    env = os.environ | {"ERRORS": str(errors), "RESULT": str(result), "PYTHONPATH": str(ROOT)}
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    made = subprocess.run([*line, "-c", code, *options], env=env, capture_output=True, text=True)
    if not errors.exists():
        pytest.skip(f"cannot mount a disk of its own: {made.stderr}")
    message, code, *names = errors.read_text().splitlines()
    assert message.startswith("error: ") and "No space left" in message and code == "2"
    shards = ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    assert names == [*shards, "edufineweb_val_000000.npy", fineweb.PARTIAL.format(0)]
    assert stream(result) == expected
    assert contents(result) == contents(tmp_path / "whole")


# ---------------------------------------------------------------- interruptions


@settings(deadline=None, max_examples=25)
@given(
    kills=st.lists(st.tuples(st.integers(1, 25), st.booleans()), min_size=1, max_size=4),
    block_bytes=st.sampled_from([30, 100, 100_000]),
    max_shards=st.sampled_from([0, 0, 4, 7]),
    tokenizer=st.sampled_from(TOKENIZERS),
)
def test_killed_anywhere_and_started_again_ends_with_the_same_bytes(
    mixed, kills, block_bytes, max_shards, tokenizer
):
    with quick_folder() as folder, patched((reading, "BLOCK_BYTES", block_bytes)):
        common = dict(max_shards=max_shards, tokenizer=tokenizer)
        prepare_local(mixed[0], folder / "whole", **common)
        options = local(mixed[0], folder / "out", **common)
        for step, after in kills:
            interrupted(options, step, after)
        fineweb.prepare(options)
        assert contents(folder / "out") == contents(folder / "whole")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_killed_at_every_change_one_after_the_other(
    mixed, tmp_path, small_blocks, tokenizer, after
):
    options = local(mixed[0], tmp_path / "out", tokenizer=tokenizer, shard_tokens=150)
    with patched((os, "fsync", lambda file: None)):
        fineweb.prepare(local(mixed[0], tmp_path / "whole", shard_tokens=150))
        kills = 0
        while interrupted(options, step=3 if after else 4, after=after):
            kills += 1
    assert kills > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_goes_on_from_the_last_finished_shard(corpus, tmp_path, small_blocks, capsys):
    options = local(corpus, tmp_path / "out")
    assert interrupted(options, step=12, after=True)
    made = {path: path.stat().st_mtime_ns for path in shard_paths(tmp_path / "out")}
    listed = json.loads((tmp_path / "out" / fineweb.PARTIAL.format(0)).read_text())["shards"]
    assert len(made) - 1 <= len(listed) >= 4
    capsys.readouterr()
    fineweb.prepare(options)
    assert f"going on after {len(listed)} shards\n" in capsys.readouterr().out
    kept = list(made)[: len(listed)]
    assert all(path.stat().st_mtime_ns == made[path] for path in kept)


@pytest.mark.parametrize("error", [UserError("line 9 is not JSON"), KeyboardInterrupt()])
def test_run_that_fails_keeps_whole_shards_alone_and_can_go_on(
    corpus, tmp_path, small_blocks, error
):
    options, whole = local(corpus, tmp_path / "out", tokenizer="gigatoken"), tmp_path / "whole"
    prepare_local(corpus, whole)
    calls, encode_block = itertools.count(1), fineweb.encode_block

    def failing(*args):
        if next(calls) == 25:
            raise error
        return encode_block(*args)

    with patched((fineweb, "encode_block", failing)), pytest.raises(type(error)):
        fineweb.prepare(options)
    made = contents(tmp_path / "out")
    partial = made.pop(fineweb.PARTIAL.format(0))
    assert len(made) > 3 and made.items() < contents(whole).items()
    assert json.loads(partial)["next"]["0"] is not None
    fineweb.prepare(options)
    assert contents(tmp_path / "out") == contents(whole)


def test_what_a_killed_run_left_half_written_goes_before_room_is_asked(corpus, tmp_path):
    out, seen = tmp_path / "out", []
    assert interrupted(local(corpus, out), step=6, after=True)
    names = ("edufineweb_train_000003.npy", "manifest.partial.0.json", "manifest.json")
    leftovers = [out / f".{name}.{pid}.tmp" for name in names for pid in (1, 22)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")

    def check_disk(*args):
        seen.extend(leftover.exists() for leftover in leftovers)
        return 0

    with patched((fineweb, "check_disk", check_disk)):
        fineweb.prepare(local(corpus, out))
    assert seen == [False] * len(leftovers)


def test_folder_that_is_removed_meanwhile_is_not_made_anew(corpus, tmp_path):
    out, calls, write = tmp_path / "out", itertools.count(1), fineweb.write_shard

    def write_shard(path, pieces):
        size = write(path, pieces)
        if next(calls) == 3:
            shutil.rmtree(out)
        return size

    with patched((fineweb, "write_shard", write_shard)), pytest.raises(FileNotFoundError):
        prepare_local(corpus, out)
    assert not out.exists()


def test_failing_run_waits_for_no_room_before_its_writer_and_drops_what_waits():
    """A second Ctrl-C in such a wait would leave the writer waiting for good."""
    release, got = threading.Event(), []

    def consume(items):
        next(items)
        release.wait()
        got.extend(items)

    with pytest.raises(KeyboardInterrupt), fineweb.beside(consume) as hand_over:
        for i in range(1 + fineweb.AHEAD):
            hand_over(i)
        threading.Timer(0.2, release.set).start()
        raise KeyboardInterrupt
    assert got == []


def test_texts_do_not_wait_for_the_disk(corpus, tmp_path):
    blocks = []

    class TokenStream(fineweb.TokenStream):
        def place(self):
            place = super().place()
            blocks.append(self.block)
            return place

    with patched((fineweb, "TokenStream", TokenStream)):
        prepare_local(corpus, tmp_path / "out")
    assert len(blocks) > 5 and all(block.load is None for block in blocks if block)


@pytest.fixture
def unfinished(corpus, tmp_path, small_blocks):
    """A folder whose making was stopped after some shards."""
    assert interrupted(local(corpus, tmp_path / "out"), step=9, after=True)
    return tmp_path / "out"


def test_unfinished_folder_is_not_trained_on(unfinished):
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"{unfinished}/ are not all there.*run the same"):
            train_gpt2.TokenShards(str(unfinished), split)


def test_extending_folder_is_neither_trained_on_nor_verified_before_its_end(
    corpus, tmp_path, small_blocks
):
    out = tmp_path / "out"
    prepare_local(corpus, out, max_shards=2)
    assert len(train_gpt2.TokenShards(str(out), "train")) == 2 * 64
    assert interrupted(local(corpus, out), step=6, after=False)
    with pytest.raises(UserError, match="are not all there yet"):
        train_gpt2.TokenShards(str(out), "train")
    with pytest.raises(UserError, match="are not all there yet"):
        fineweb.verify(out)


def test_unfinished_folder_made_with_other_options_is_refused(corpus, unfinished):
    assert_refuses_what_is_made_otherwise(corpus, unfinished)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (remove_shard, r"lacks shards that its manifest.json lists"),
        (cut_shard, r"train_000003.npy is not whole"),
        (swap_shard, r"train_000003.npy: manifest.json says 64 tokens, found 5"),
    ],
)
def test_unfinished_folder_with_a_damaged_shard_is_refused(corpus, unfinished, change, says):
    change(corpus, unfinished)
    before = contents(unfinished)
    with pytest.raises(UserError, match=says):
        prepare_local(corpus, unfinished)
    assert contents(unfinished) == before


def test_unfinished_folder_with_a_cut_manifest_is_refused(corpus, unfinished):
    os.truncate(unfinished / fineweb.PARTIAL.format(0), 100)
    before = contents(unfinished)
    with pytest.raises(UserError, match=r"no whole manifest\.partial\.0\.json: delete the folder"):
        prepare_local(corpus, unfinished)
    assert contents(unfinished) == before


@pytest.mark.parametrize("max_shards", [1, 2])
def test_fewer_max_shards_end_an_unfinished_folder(corpus, unfinished, max_shards):
    made = stream(unfinished)
    tokens = prepare_local(corpus, unfinished, max_shards=max_shards)
    assert not list(unfinished.glob(fineweb.PARTIAL.format("*")))
    assert len(tokens) >= 16 + 64 * max_shards and tokens == made[: len(tokens)]
    train_gpt2.TokenShards(str(unfinished), "train")


def test_fewer_max_shards_after_a_kill_between_shard_and_manifest(corpus, tmp_path, small_blocks):
    assert interrupted(local(corpus, tmp_path / "out"), step=8, after=True)  # the rename of train 3
    listed = json.loads((tmp_path / "out" / fineweb.PARTIAL.format(0)).read_text())["shards"]
    assert len(shard_paths(tmp_path / "out")) == len(listed) + 1 == 4
    tokens = prepare_local(corpus, tmp_path / "out", max_shards=2)
    assert tokens == reference(TEXTS)[: 16 + 64 * 2]


@pytest.mark.parametrize("name", ["mine.npy", "edufineweb_train_000999.npy"])
def test_shard_of_somebody_else_is_never_deleted(corpus, unfinished, name):
    np.save(unfinished / name, np.arange(9))
    with pytest.raises(UserError, match=f"holds other shards than .*{name}"):
        prepare_local(corpus, unfinished)
    assert (unfinished / name).exists()


def kill_and_restart(line, out, moments):
    """Run a command to its end, killed by SIGKILL when that many shards are there."""
    for moment in moments:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(shard_paths(out)) < moment:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL  # it was not at its end
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def python_docs_to(out, **options):
    """The command that makes shards of python-docs, many of them, in a folder."""
    options = Options("python-docs", out_dir=str(out), val_tokens=900, **options)
    return [sys.executable, str(ROOT / "fineweb.py"), *flags(options)]


def local_to(path, out, **options):
    return [sys.executable, str(ROOT / "fineweb.py"), *flags(local(path, out, **options))]


@pytest.fixture
def many_lines(tmp_path):
    return write_jsonl(tmp_path / "x.jsonl", [f"{i} {text}" for i, text in enumerate(TEXTS * 9)])


@with_sigkill
def test_command_killed_at_random_moments_ends_with_the_same_bytes(many_lines, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare_local(many_lines, whole, shard_tokens=50)
    total = len(shard_paths(whole))
    assert total > 250
    line = local_to(many_lines, out, shard_tokens=50, tokenizer="tiktoken")
    kill_and_restart(line, out, sorted(random.sample(range(total - 30), 3)))
    assert contents(out) == contents(whole)


@with_sigkill
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_command_with_processes_killed_often_ends_with_the_same_bytes(tmp_path, tokenizer):
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = dict(shard_tokens=700, tokenizer=tokenizer, processes=2)
    subprocess.run(python_docs_to(whole, shard_tokens=700, tokenizer="tiktoken"), check=True)
    total = len(shard_paths(whole))
    assert total > 500
    moments = sorted(random.sample(range(total - 40), 5))
    kill_and_restart(python_docs_to(out, **options), out, moments)
    assert contents(out) == contents(whole)


# ---------------------------------------------------------------- --verify


def flip_a_byte(out):
    path = out / "edufineweb_train_000002.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def list_shard_as(name):
    def change(out):
        manifest = manifest_of(out)
        manifest["shards"][1]["file"] = name.format(out=out)
        (out / "manifest.json").write_text(json.dumps(manifest))

    return change


DAMAGES = {
    "flipped": (flip_a_byte, r"train_000002.npy was changed: sha256=\w{64}, not \w{64}"),
    "cut": (lambda out: cut_shard("", out), "train_000003.npy is not whole"),
    "swapped": (lambda out: swap_shard("", out), "train_000003.npy: manifest.json says 64 tokens"),
    "missing": (
        lambda out: remove_shard("", out),
        r"that its manifest.json lists \(.*train_000003",
    ),
    "extra": (lambda out: add_shard("", out), r"than its manifest.json lists \(.*train_000999"),
    "no manifest": (
        lambda out: remove_manifest("", out),
        "out holds no manifest.json: nothing says",
    ),
    "cut manifest": (lambda out: cut_manifest("", out), "no whole manifest.json"),
    "no JSON": (lambda out: (out / "manifest.json").write_text("[]"), "no whole manifest.json"),
    "parent": (list_shard_as("../edufineweb_train_000001.npy"), "no whole manifest.json"),
    "absolute": (list_shard_as("{out}/edufineweb_train_000001.npy"), "no whole manifest.json"),
    "deeper": (list_shard_as("a/edufineweb_train_000001.npy"), "no whole manifest.json"),
    "foreign": (list_shard_as("manifest.json"), "no whole manifest.json"),
    "twice": (list_shard_as("edufineweb_train_000002.npy"), "no whole manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_not_as_it_was_made(mixed, tmp_path, end_of_command, damage):
    out = tmp_path / "out"
    prepare_local(mixed[0], out)
    shutil.copy(out / "edufineweb_train_000001.npy", tmp_path)
    change, says = DAMAGES[damage]
    change(out)
    before = contents(out)
    code, said, error = end_of_command("--verify", out)
    assert (code, said) == (2, "")
    assert re.fullmatch(f"error: .*{says}.*\n", error) and str(out) in error
    assert contents(out) == before


def test_verify_of_a_good_folder_says_so_and_changes_nothing(corpus, tmp_path, end_of_command):
    out = tmp_path / "out"
    total = len(prepare_local(corpus, out))
    before = contents(out)
    said = f"{out}: {len(before) - 1} shards, {total:,} tokens, all as manifest.json says\n"
    assert end_of_command(f"--verify={out}") == (0, said, "")
    assert contents(out) == before


def test_verify_of_no_folder_says_so(tmp_path, end_of_command):
    code, _, error = end_of_command("--verify", tmp_path / "none")
    assert code == 2 and "none holds no manifest.json" in error


# ---------------------------------------------------------------- several ranks


def interrupted_ranks(world, options, step, after, rank):
    try:
        with killed_at(step, after, rank, world):
            prepare_in_ranks(world, options)
    except Killed:
        return True
    return False


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 9))
def test_ranks_take_all_files_in_order_each_a_run_of_them(sizes, world):
    parts = [ranks.files(sizes) for ranks in make_ranks(world)]
    assert [file for part in parts for file in part] == list(range(len(sizes)))
    fair = sum(sizes) / world
    assert all(sum(sizes[i] for i in part) < fair + max(sizes) for part in parts)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_ranks_share_max_shards(max_shards, world):
    members = make_ranks(world)
    options = Options(shard_tokens=7, val_tokens=3, max_shards=max_shards)
    parts = [ranks.shard_sizes(options) for ranks in members]
    sizes = [size for part in parts for size in part]
    assert sizes[0] == 3 and set(sizes[1:]) <= {7}
    assert len(sizes) == 1 + max_shards if max_shards else len(sizes) == world * members[0].numbers
    for ranks, part in zip(members, parts, strict=True):
        last = {"file": f"edufineweb_train_{ranks.first_shard + len(part) - 1:06d}.npy"}
        assert ranks.owns(last) or not part


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 9))
def test_more_max_shards_take_none_from_a_rank(fewer, more, world):
    counts = [
        [len(ranks.shard_sizes(Options(max_shards=max_shards))) for ranks in make_ranks(world)]
        for max_shards in (fewer, fewer + more)
    ]
    assert all(a <= b for a, b in zip(*counts, strict=True))


@settings(deadline=None, max_examples=30)
@given(world=st.integers(2, 8), shard_tokens=st.integers(10, 300))
def test_ranks_together_make_the_documents_of_one_process(mixed, world, shard_tokens):
    with quick_folder() as folder:
        options = local(mixed[0], folder / "out", shard_tokens=shard_tokens)
        prepare_in_ranks(world, options)
        assert stream(folder / "out") == reference(mixed[1])
        others = [path.name for path in (folder / "out").iterdir() if path.suffix != ".npy"]
        assert others == ["manifest.json"]
        manifest = manifest_of(folder / "out")
        assert manifest["tokens"] == len(reference(mixed[1]))
        assert manifest["documents"] == len(mixed[1]) and manifest["ranks"] == world
        fineweb.verify(folder / "out")


@settings(deadline=None, max_examples=25)
@given(
    kills=st.lists(
        st.tuples(st.integers(1, 16), st.booleans(), st.integers(0, 2), st.sampled_from([0, 2, 5])),
        min_size=1,
        max_size=4,
    ),
    world=st.integers(2, 3),
)
def test_ranks_killed_anywhere_and_started_again_end_with_the_same_bytes(mixed, kills, world):
    with quick_folder() as folder, patched((reading, "BLOCK_BYTES", 100)):
        prepare_in_ranks(world, local(mixed[0], folder / "whole", shard_tokens=100))
        for step, after, rank, max_shards in kills:
            options = local(mixed[0], folder / "out", shard_tokens=100, max_shards=max_shards)
            interrupted_ranks(world, options, step, after, rank % world)
        prepare_in_ranks(world, local(mixed[0], folder / "out", shard_tokens=100))
        assert stream(folder / "out") == reference(mixed[1])
        assert contents(folder / "out") == contents(folder / "whole")


def test_rank_that_was_done_before_an_interruption_is_not_begun_anew(mixed, tmp_path, small_blocks):
    options = local(mixed[0], tmp_path / "out")
    prepare_in_ranks(2, local(mixed[0], tmp_path / "whole"))
    prepare_in_ranks(2, local(mixed[0], tmp_path / "out", max_shards=2))
    assert interrupted_ranks(2, options, step=1, after=False, rank=0)  # rank 1 makes all of its own
    prepare_in_ranks(2, options)
    assert stream(tmp_path / "out") == reference(mixed[1])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folder_begun_by_another_number_of_ranks_is_refused(mixed, tmp_path, small_blocks):
    out = tmp_path / "out"
    assert interrupted_ranks(2, local(mixed[0], out), step=7, after=False, rank=1)
    before = contents(out)
    for world in (1, 3):
        with pytest.raises(UserError, match=f"begun by 2 processes, not {world}: go on with as"):
            prepare_in_ranks(world, local(mixed[0], out))
    assert contents(out) == before
    prepare_in_ranks(2, local(mixed[0], out))
    with pytest.raises(UserError, match="made with shard_tokens=64, not 65"):
        prepare_in_ranks(3, local(mixed[0], out, shard_tokens=65))
    before = contents(out)
    prepare_local(mixed[0], out)  # all there: nothing to be divided
    assert contents(out) == before


def test_one_rank_without_room_ends_all_before_anything_is_written(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="are free: free some"):
        prepare_in_ranks(2, local(mixed[0], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_of_two_revisions_are_never_made_one_folder(tmp_path, monkeypatch):
    """Each rank asks for the newest; what they made is told apart the next time, too."""
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("some words and more of them " * 200, encoding="utf-8")
    open_source, commits = fineweb.open_source, itertools.count()

    def moved(options, revision):
        source = open_source(options, revision)
        return source._replace(revision=revision or f"commit {next(commits)}")

    monkeypatch.setattr(fineweb, "open_source", moved)
    for told in (
        "dataset has just changed: delete",
        "shards of revisions commit 0, commit 1: delete",
    ):
        with pytest.raises(UserError, match=told):
            prepare_in_ranks(2, local(tmp_path / "in", tmp_path / "out", val_tokens=16))


def test_dataset_that_changes_before_the_last_rank_looks_makes_no_folder(
    mixed, tmp_path, monkeypatch
):
    open_source, commits = fineweb.open_source, itertools.count()

    def moved(*args):
        return open_source(*args)._replace(revision=f"commit {next(commits)}")

    monkeypatch.setattr(fineweb, "open_source", moved)
    with pytest.raises(UserError, match=r"has just changed: .* name a commit by --revision"):
        prepare_in_ranks(2, local(mixed[0], tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def torchrun(options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [sys.executable, *launch, str(ROOT / "fineweb.py"), *flags(options)]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.parametrize("begun", [False, True])
def test_torchrun_makes_the_documents_of_one_process(mixed, tmp_path, begun):
    options = local(mixed[0], tmp_path / "out")
    if begun:  # and was killed
        assert interrupted_ranks(2, options, step=9, after=True, rank=1)
        assert list((tmp_path / "out").glob(fineweb.PARTIAL.format("*")))
    made = torchrun(options)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("train on it: ") == 1
    assert stream(tmp_path / "out") == reference(mixed[1])
    prepare_in_ranks(2, local(mixed[0], tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_says_a_mistake_once(tmp_path):
    made = torchrun(local(tmp_path / "none.txt", tmp_path / "out"))
    assert made.returncode == 1
    assert made.stderr.count("error: --input=") == 1 and not (tmp_path / "out").exists()


def test_torchrun_tells_a_mistake_in_one_rank_s_files_without_a_traceback(tmp_path):
    for name, texts in (("a", 400), ("b", 399)):
        write_jsonl(tmp_path / f"{name}.jsonl", ["some text " * 10] * texts)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("no JSON")
    made = torchrun(local(tmp_path / "*.jsonl", tmp_path / "out"))
    assert f"error: {tmp_path / 'b.jsonl'}, line 400 is not JSON" in made.stderr
    assert "RuntimeError" not in made.stderr  # of rank 0, which waits for the other


# ---------------------------------------------------------------- local files


def test_local_reads_every_kind_in_order_of_names(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    lines = [json.dumps({"text": f"line {i} of {name}"}) for i in range(2) for name in "abc"]
    packed = ("\n".join(lines) + "\n").encode()
    (folder / "1.TXT").write_bytes("\ufeffplain été\r\n".encode())
    (folder / "2.md").write_text("# Title\n")
    (folder / "3.jsonl").write_bytes(packed.rstrip())
    (folder / "4.jsonl.gz").write_bytes(gzip.compress(packed[:50]) + gzip.compress(packed[50:]))
    (folder / "5.jsonl.zst").write_bytes(zstd(packed[:50]) + zstd(packed[50:]))
    (folder / "6.txt.gz").write_bytes(gzip.compress(b"zipped"))
    write_parquet(folder / "7.parquet", ["row one", None, "row three"])
    (folder / "8.csv").write_text("not,read")
    (folder / "sub" / "9.txt").write_text("deep")
    texts = [json.loads(line)["text"] for line in lines]
    plain = ["plain été\r\n", "# Title\n"]
    expected = [*plain, *texts * 3, "zipped", "row one", "row three", "deep"]
    assert prepare_local(folder, tmp_path / "out") == reference(expected)


def test_files_of_other_kinds_are_counted(corpus, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(corpus.read_bytes())
    prepare_local(tmp_path / "in", tmp_path / "out")
    assert "left out" not in capsys.readouterr().out
    for name in ("b.html", "c.html", "README", ".hidden.html"):
        (tmp_path / "in" / name).write_text("text")
    prepare_local(tmp_path / "in", tmp_path / "again")
    assert "left out: 3 files of other kinds (.html, no ending)" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_inputs_are_read_in_the_order_given_and_once(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    given = [str(tmp_path / "c.txt"), str(tmp_path / "*.txt"), str(tmp_path)]
    assert [path.stem for path in reading.local_files(given)] == ["c", "a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets not everyone make links")
def test_linked_folders_are_read_each_once(tmp_path):
    texts, disk = tmp_path / "texts", tmp_path / "disk"
    for path in (texts / "b" / "x.txt", disk / "y.txt", disk / "deep" / "z.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (texts / "a").symlink_to(disk)
    (texts / "c").symlink_to(disk)  # again
    (disk / "deep" / "up").symlink_to(texts)  # and round in a circle
    for folders in ([texts], [texts, disk, disk / "deep"]):
        found = reading.local_files(map(str, folders))
        expected = ["a/deep/z.txt", "a/y.txt", "b/x.txt"]
        assert [path.relative_to(texts).as_posix() for path in found] == expected


def test_hidden_files_and_folders_are_left_out_but_not_a_hidden_folder_that_is_named(tmp_path):
    names = ("a.txt", ".b.txt", "._a.txt", ".git/c.txt", "d/.e/f.txt", "d/g.txt")
    for path in (tmp_path / ".in" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    found = [tmp_path / ".in" / name for name in ("a.txt", "d/g.txt")]
    assert reading.local_files([str(tmp_path / ".in")]) == found
    assert reading.local_files([str(tmp_path / ".in" / ".b.txt")]) == [tmp_path / ".in" / ".b.txt"]


def test_glob_that_finds_folders_reads_them_as_the_shells_own_would(tmp_path):
    for path in (tmp_path / name for name in ("a/x.txt", "b/deep/y.txt", "c.txt", "d.csv")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    expected = [tmp_path / name for name in ("a/x.txt", "b/deep/y.txt", "c.txt")]
    assert reading.local_files([str(tmp_path / "*")]) == expected
    assert reading.local_files([str(path) for path in sorted(tmp_path.glob("[abc]*"))]) == expected
    assert reading.local_files([str(tmp_path / "**")]) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets not everyone make links")
@pytest.mark.parametrize("name", ["b.txt", "more", "b.jsonl.gz"])
def test_link_to_what_is_not_there_is_an_error(tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).symlink_to(tmp_path / "unmounted" / "b")
    for path in (tmp_path, tmp_path / "*", tmp_path / name):
        with pytest.raises(UserError, match=f"{name} is a link to what is not there"):
            reading.local_files([str(path)])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets not everyone make links")
def test_links_that_are_not_missed_are_in_nobodys_way(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "picture.png").symlink_to(tmp_path / "unmounted")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path in (tmp_path, tmp_path / "**", tmp_path / "*"):
        assert reading.local_files([str(path)]) == [tmp_path / "a.txt"]


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="closed"):
        reading.local_files([str(tmp_path)])


def test_small_text_is_one_block(tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    assert [block.size for block in reading.read_file(tmp_path / "a.txt", "", 0)] == [13]


def test_name_with_glob_characters_is_a_name_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert reading.local_files([str(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]


def test_text_column_chooses_the_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": 1, "body": "the cat sat on the mat again"}\n' * 9)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["row"] * 9}), tmp_path / "y.parquet")
    tokens = prepare_local(tmp_path, tmp_path / "out", text_column="body")
    assert tokens == reference(["the cat sat on the mat again"] * 9 + ["row"] * 9)


GOOD = b'{"text": "fine"}\n'
COLUMN = pyarrow.table({"body": ["x"]})
NUMBERS = pyarrow.table({"text": [1]})
TWICE = pyarrow.table([pyarrow.array(["x"])] * 2, ["text", "text"])


def parquet_bytes(table):
    with tempfile.TemporaryDirectory() as folder:
        pyarrow.parquet.write_table(table, Path(folder, "x"))
        return Path(folder, "x").read_bytes()


BAD_INPUT = [
    ("x.jsonl", GOOD * 2 + b"{oops\n" + GOOD, r"x.jsonl, line 3 is not JSON .*fix it"),
    ("x.jsonl", GOOD + b'{"body": "b", "id": 1}\n', "line 2 has no 'text' but body, id: see --"),
    ("x.jsonl", GOOD + b'["text"]\n', "line 2 has no 'text' but list: see --text_column"),
    ("x.jsonl", GOOD + b'{"text": 7}\n', "line 2: expected text, found int: see --text_column"),
    ("x.jsonl", GOOD + b'{"text": "\xe9"}\n', r"line 2, byte 11: not UTF-8.*convert"),
    ("x.jsonl", GOOD + b'{"text": "e", "x": "\xe9"}\n' + GOOD, "line 2, byte 21: not UTF-8"),
    ("x.jsonl", GOOD + GOOD.strip() * 2 + b"\n" + GOOD, r"line 2 is not JSON .*Extra data"),
    ("x.jsonl", GOOD + b"{}\n", "line 2 has no 'text' but no field: see --text_column"),
    ("x.jsonl", GOOD * 9 + b"\n" * 9 + b"{", r"x.jsonl, line 19 is not JSON"),
    ("x.jsonl", GOOD + b'{"text": "a\nb"}\n', r"line 2 is not JSON"),
    ("x.jsonl", GOOD + b'{"text": ' + b"[" * 100_000, "x.jsonl, line 2 is not JSON .*fix it"),
    ("x.txt", "été\nde\n".encode() + b"l'\xe9t\xe9", r"x.txt, line 3, byte 12 of the file: not"),
    ("x.txt", b"one two\n" * 99 + b"caf\xe9", "line 100, byte 796 of the file: not UTF-8"),
    ("x.md", b"\xff\xfea\0", "x.md, line 1, byte 1 of the file: not UTF-8 .*convert or remove it"),
    ("x.txt.gz", gzip.compress(b"a\n" * 99 + b"\xe9 "), "x.txt.gz, line 100, byte 199 of the file"),
    ("x.jsonl.gz", gzip.compress(GOOD * 999)[:-20], r"cannot read .*x.jsonl.gz"),
    ("x.jsonl.gz", GOOD, r"cannot read .*x.jsonl.gz"),
    ("x.jsonl.zst", zstd(GOOD * 999)[:-3], r"cannot read .*x.jsonl.zst"),
    ("x.jsonl.zst", b"", r"cannot read .*x.jsonl.zst \(cut off: it has no byte of zstd\)"),
    ("x.parquet", parquet_bytes(COLUMN), "x.parquet has no 'text' but body: see --text_column"),
    ("x.parquet", parquet_bytes(TWICE), "x.parquet has 2 columns 'text' but text, text: see"),
    ("x.parquet", parquet_bytes(NUMBERS), "x.parquet: expected text, found int"),
    ("x.parquet", parquet_bytes(COLUMN)[:-9], "x.parquet is not a whole .parquet file"),
    ("x.parquet", b"", "x.parquet is not a whole .parquet file"),
    ("x.csv", b"a,b", r"none of the 1 files there ends \.txt, \.md, \.jsonl, \.parquet"),
]


@pytest.mark.parametrize("block_bytes", [20, 1 << 23])
@pytest.mark.parametrize(("name", "data", "says"), BAD_INPUT, ids=[bad[2] for bad in BAD_INPUT])
def test_bad_input_is_one_error_that_says_where(
    tmp_path, monkeypatch, name, data, says, block_bytes
):
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        prepare_local(tmp_path / "in", tmp_path / "out", val_tokens=100_000)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_first_line_that_is_null_is_one_error(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"null\n" + GOOD * 99)
    made = command(*flags(local(tmp_path / "x.jsonl", tmp_path / "out")))
    assert made.returncode == 2
    assert re.fullmatch(r"error: .*line 1 has no 'text' but NoneType: .*\n", made.stderr)


@pytest.mark.parametrize("given", ["missing.txt", "missing/", "none*.txt"])
def test_missing_input_is_named(tmp_path, given):
    with pytest.raises(UserError, match=re.escape(f"{given}: there is no such file or folder")):
        prepare_local(tmp_path / given if given != "missing/" else given, tmp_path / "out")


# ---------------------------------------------------------------- .jsonl, by Arrow and by Python


def refuse(*args):
    raise pyarrow.ArrowInvalid("no")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), tricky_text, any_text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
json_texts = st.one_of(st.none(), tricky_text, any_text)


@st.composite
def json_lines(draw):
    """A line of .jsonl that has a text, among other fields, perhaps more than once."""
    names = draw(st.lists(st.one_of(st.just("text"), st.just("id"), any_text), max_size=4))
    pairs = [(name, draw(json_values)) for name in names] + [("text", draw(json_texts))]
    others = draw(st.dictionaries(any_text, json_values, max_size=2))
    pairs += [(name, value) for name, value in others.items() if name != "text"]
    fields = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs)
    line = draw(st.sampled_from(["", " ", "\ufeff"])) + "{" + fields + "}"
    if draw(st.booleans()):  # the characters themselves, but for those that have no UTF-8
        escaped = r"(?<!\\)\\u(?!00[01]|0022|005c|d[89a-f])[0-9a-f]{4}"
        line = re.sub(escaped, lambda match: json.loads(f'"{match[0]}"'), line)
    return line


@settings(deadline=None, max_examples=300)
@given(
    lines=st.lists(st.one_of(json_lines(), st.sampled_from(["", " ", "\t"])), min_size=1),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
@example(lines=['{"text": "a", "n": NaN}', '{"text": "\\ud83d\\ude00 \\u0000"}'], end="\n", last=0)
@example(lines=['{"text": "a", "text": "b"}', '{"te\\u0078t": "b"}'], end="\r\n", last=1)
def test_arrow_and_python_read_the_same_texts_from_lines(lines, end, last):
    data = (end.join(lines) + end * last).encode()
    count = data.count(b"\n") + (not data.endswith(b"\n"))
    made = reading.parse_lines(data, count, "text", "x", 0).to_pylist()
    with patched((pyarrow.json, "read_json", refuse)):
        assert reading.parse_lines(data, count, "text", "x", 0).to_pylist() == made
    records = [json.loads(line.removeprefix("\ufeff")) for line in lines if line.strip()]
    assert reference(made) == reference([record["text"] for record in records])


def test_ordinary_lines_are_read_by_arrow_alone(monkeypatch):
    monkeypatch.setattr(reading, "parse_line", None)
    odd = ["", "\0", 'quote " and \\', "😀 été", "\u2028"]
    data = jsonl([*TEXTS, *odd])
    made = reading.parse_lines(data, len(TEXTS + odd), "text", "x", 0)
    assert made.to_pylist() == TEXTS + odd


# ---------------------------------------------------------------- .parquet


def texts_from(path, skip=0):
    blocks = list(reading.read_file(path, "text", skip))
    return blocks, [text for block in blocks for text in block.load().to_pylist()]


KINDS = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", pyarrow.string())]


@pytest.mark.parametrize("kind", [*KINDS, pyarrow.string_view()], ids=str)
def test_columns_of_every_kind_of_text_are_read_and_null_is_empty(tmp_path, kind, small_blocks):
    texts = [None if i % 5 == 2 else f"row {i % 7} é" for i in range(50)]
    column = pyarrow.array(texts, pyarrow.string()).cast(kind)
    path = write_parquet(tmp_path / "x.parquet", column, row_group_size=20)
    blocks, made = texts_from(path)
    assert len(blocks) > 3 and made == [text or "" for text in texts]
    assert prepare_local(path, tmp_path / "out") == reference(texts)


def test_large_row_group_is_read_in_batches_and_gone_on_with_at_each(tmp_path, small_blocks):
    texts = [f"row {i} of one group" for i in range(200)]
    path = write_parquet(tmp_path / "x.parquet", texts)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 1
    blocks, made = texts_from(path)
    assert len(blocks) > 20 and made == texts
    assert blocks[-1].share == 1.0 and blocks[0].share < 0.1
    for block in blocks:
        rest, made = texts_from(path, block.start)
        assert made == texts[block.start :] and rest[0].start == block.start


def test_run_goes_on_in_a_column_of_repeated_texts(tmp_path, small_blocks):
    column = pyarrow.array([f"row {i % 40} é" for i in range(200)]).dictionary_encode()
    path = write_parquet(tmp_path / "x.parquet", column)
    blocks, _ = texts_from(path)
    assert len(blocks) > 20
    for block in blocks:
        rest, made = texts_from(path, block.start)
        assert made == column[block.start :].to_pylist() and rest[0].start == block.start


@pytest.mark.parametrize("step", [5, 8, 11])
def test_killed_inside_a_row_group_ends_with_the_same_bytes(tmp_path, small_blocks, step):
    path = write_parquet(tmp_path / "x.parquet", TEXTS, row_group_size=25)
    prepare_local(path, tmp_path / "whole")
    assert interrupted(local(path, tmp_path / "out"), step, after=False)
    prepare_local(path, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- python-docs


@pytest.fixture(scope="module")
def python_docs():
    sys.modules.pop("this", None)
    return list(reading.python_docs())


def test_python_docs_end_to_end(python_docs, tmp_path):
    out = tmp_path / "docs"
    made = command("--source=python-docs", f"--out_dir={out}", PYTHONHASHSEED="1")
    assert made.returncode == 0, made.stderr
    tokens = stream(out)
    assert 400_000 < len(tokens) < 900_000
    assert tokens == reference(python_docs)
    manifest = manifest_of(out)
    assert [shard["tokens"] for shard in manifest["shards"]] == [32_768, len(tokens) - 32_768]
    assert manifest["revision"] == ".".join(map(str, sys.version_info[:3]))
    assert f"1 train + 1 val shards, {len(tokens):,} tokens" in made.stdout
    (said,) = re.findall("train on it: (.*)", made.stdout)
    _, script, config, folder = shlex.split(said)  # found from where the command ran
    assert (ROOT / script).samefile(ROOT / "train_gpt2.py") and folder == f"--data_dir={out}"
    assert (ROOT / config).samefile(ROOT / "configs" / "tiny.toml")
    assert made.stderr == ""


def test_python_docs_reads_without_running(python_docs):
    assert "this" not in sys.modules and "antigravity" not in sys.modules
    [argparse_doc] = [text for text in python_docs if text.startswith("argparse\n\n")]
    assert "argparse.ArgumentParser\n\nObject for parsing command line strings" in argparse_doc


def test_python_docs_are_the_library_once_without_its_tests(python_docs):
    assert len(python_docs) == len(set(python_docs)) > 400
    names = {text.split("\n", 1)[0] for text in python_docs}
    assert {"json", "json.decoder", "argparse"} <= names
    assert not any(name.startswith(("test.", "idlelib", "turtledemo")) for name in names)


def test_python_docs_begin_with_what_is_of_the_same_kind_as_the_rest(python_docs):
    """The validation split is their beginning."""
    reference = set(topics.values())
    places = [i / len(python_docs) for i, text in enumerate(python_docs) if text in reference]
    assert len(places) > 50 and 0.35 < np.mean(places) < 0.65


# ---------------------------------------------------------------- open_shard


def test_open_shard_maps_npy_and_bin_alike(tmp_path):
    tokens = np.array([END_OF_TEXT, 1, 65535], dtype=np.uint16)
    np.save(tmp_path / "x.npy", tokens)
    (tmp_path / "x.bin").write_bytes(bin_bytes(tokens))
    for name in ("x.npy", "x.bin"):
        shard = open_shard(tmp_path / name)
        assert isinstance(shard, np.memmap) and shard.dtype == np.uint16
        assert np.array_equal(shard, tokens)


def npy_bytes(array):
    with tempfile.TemporaryFile() as file:
        np.save(file, array)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.npy", None, "cannot read .*x.npy: No such file"),
        ("x.bin", None, "cannot read .*x.bin: No such file"),
        ("x.npy", b"", "x.npy is not a token shard: expected np.save's header .* found ''"),
        ("x.npy", b"hello, world", r"expected .* one row of uint16.*found 'hello, world'"),
        ("x.npy", npy_bytes(np.zeros(99, np.uint16))[:100], "x.npy is not a token shard: expected"),
        ("x.npy", npy_bytes(np.zeros(99, np.uint16))[:-5], "promises 326 bytes, found 321; delete"),
        ("x.npy", npy_bytes(np.zeros(99, np.uint16)) + b"x", "promises 326 bytes, found 327"),
        ("x.npy", npy_bytes(np.array([{}], dtype=object)), r"found .*'descr': '\|O'"),
        ("x.npy", npy_bytes(np.zeros(9)), r"found .*'descr': '<f8'.*'shape': \(9,\)"),
        ("x.npy", npy_bytes(np.zeros((3, 3), np.uint16)), r"found .*<u2.*'shape': \(3, 3\)"),
        ("x.npy", npy_bytes(np.zeros(9, ">u2")), r"found .*'descr': '>u2'"),
        ("x.npy", npy_bytes(np.zeros(0, np.uint16)), r"found .*'shape': \(0,\)"),
        ("x.bin", b"", r"expected a header of 256 int32 .*20240520, 1, found \[\] in 0 bytes"),
        ("x.bin", bin_bytes([1])[:1000], r"found \[20240520, 1\] in 1,000 bytes"),
        ("x.bin", bin_bytes([1, 2], magic=20240801), r"begins 20240520, 1, found \[20240801, 1\]"),
        ("x.bin", bin_bytes([1, 2], version=2), r"found \[20240520, 2\]"),
        ("x.bin", bin_bytes([1, 2, 3])[:-1], "promises 1,030 bytes, found 1,029; delete it and"),
        ("x.bin", bin_bytes([1, 2, 3]) + b"xx", "promises 1,030 bytes, found 1,032"),
        ("x.bin", bin_bytes([], promised=0), "x.bin is not whole"),
        ("x.bin", bin_bytes([1], promised=-1), "x.bin is not whole"),
    ],
)
def test_damaged_shard_is_one_error_with_expected_and_found(tmp_path, name, data, says):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        open_shard(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the command


def test_importing_defines_and_does_nothing_else(tmp_path):
    code = """
import os, sys
before = dict(os.environ)
import fineweb
heavy = {"torch", "pyarrow", "huggingface_hub", "gigatoken", "awkward", "zstandard", "tqdm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert dict(os.environ) == before
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert (made.returncode, made.stdout, made.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


def test_user_error_is_one_line_and_exit_code_2(tmp_path):
    made = command("--source=local", "--input", tmp_path / "no.txt", f"--out_dir={tmp_path}/out")
    assert made.returncode == 2
    assert re.fullmatch(r"error: --input=.*no\.txt: there is no such file or .*\n", made.stderr)


def test_documented_flags_are_parsed():
    line = ["--source=local", "--input", "a.txt", "b/", "--out_dir=x", "--shard_tokens=5"]
    line += ["--val_tokens=6", "--max_shards=7", "--processes=8", "--tokenizer=tiktoken"]
    parsed = command_line(Options, "", args=line)
    assert parsed == Options("local", ("a.txt", "b/"), out_dir="x", shard_tokens=5, val_tokens=6,
                             max_shards=7, processes=8, tokenizer="tiktoken")  # fmt: skip


def test_defaults_follow_the_source():
    made = {source: fineweb.resolve(Options(source)) for source in ["fineweb-edu", "python-docs"]}
    edu, docs = made["fineweb-edu"], made["python-docs"]
    assert (edu.out_dir, edu.val_tokens, edu.shard_tokens) == ("edu_fineweb10B", 10**8, 10**8)
    assert (docs.out_dir, docs.val_tokens, docs.processes) == (
        "python_docs",
        32_768,
        os.cpu_count(),
    )
    assert fineweb.resolve(Options("pretokenized")).out_dir == "edu_fineweb10B"
    assert fineweb.resolve(Options("local", ("x",))).out_dir == "local_text"


@pytest.mark.parametrize(("ranks", "processes"), [(1, 8), (3, 2), (16, 1)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, ranks, processes):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert fineweb.resolve(Options()).processes == processes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(input=("x.txt",)), "--input has no meaning with --source=fineweb-edu: add --source"),
        (dict(source="pretokenized", val_tokens=5), "--val_tokens has no meaning with"),
        (dict(source="python-docs", text_column="x"), "--text_column has no meaning with"),
        (dict(source="local"), "needs --input=PATH"),
        (dict(source="local", input=("",)), "one --input is empty"),
        (dict(shard_tokens=0), "--shard_tokens=0 is not possible: expected 1 to 1,000,000,000"),
        (dict(shard_tokens=10**12), "--shard_tokens=1000000000000 is not possible"),
        (dict(val_tokens=-1), "--val_tokens=-1 is not possible: expected 0 to"),
        (dict(processes=-1), "--processes=-1 is not possible"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        fineweb.prepare(Options(**options))


def test_input_given_twice_is_refused_as_one_of_them_would_be_lost():
    with pytest.raises(UserError, match="--input is given twice: name all of them after one"):
        command_line(Options, "", args=["--input", "a.txt", "--processes=1", "--input=b.txt"])


def test_verify_of_an_empty_name_makes_no_shards(end_of_command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = end_of_command("--verify", "")
    assert code == 2 and "holds no manifest.json" in err and not list(tmp_path.iterdir())


def test_without_gigatoken_tiktoken_does_the_work(monkeypatch):
    monkeypatch.setattr(fineweb.importlib.util, "find_spec", lambda name: None)
    assert fineweb.resolve(Options()).tokenizer == "tiktoken"
    with pytest.raises(UserError, match="gigatoken is missing: pip install gigatoken"):
        fineweb.resolve(Options(tokenizer="gigatoken"))
