"""fineweb.py: every token of every document once, in order, in shards that are whole or absent."""

import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fineweb
from fineweb import END_OF_TEXT, Options, UserError, open_shard

ROOT = Path(fineweb.__file__).parent
TOKENIZERS = ["tiktoken", *["gigatoken"] * bool(importlib.util.find_spec("gigatoken"))]
with_gigatoken = pytest.mark.skipif(len(TOKENIZERS) < 2, reason="needs gigatoken")
TEXTS = [f"Document {i}: the cat's {'very ' * i}long tail, été {i * i}.\n" for i in range(40)]
any_text = st.text(st.characters(exclude_categories=()))  # surrogates, unassigned, NUL and all


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


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def prepare_local(path, out_dir, **options):
    options = {"processes": 1, "val_tokens": 16, "shard_tokens": 64} | options
    fineweb.prepare(Options(source="local", input=(str(path),), out_dir=str(out_dir), **options))
    return stream(out_dir)


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def command(*args, **env):
    line = [sys.executable, str(ROOT / "fineweb.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | env)


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
    with tempfile.TemporaryDirectory() as folder:
        path, out_dir = write_jsonl(Path(folder, "x.jsonl"), documents), Path(folder, "out")
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


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=20),
    val_tokens=st.integers(1, 40),
    shard_tokens=st.integers(1, 40),
)
def test_cut_keeps_every_token_in_order(lengths, val_tokens, shard_tokens):
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    arrays = np.split(tokens, np.cumsum(lengths))
    if len(tokens) <= val_tokens:
        with pytest.raises(UserError, match="too few"):
            list(fineweb.cut(arrays, val_tokens, shard_tokens))
        return
    shards = list(fineweb.cut(arrays, val_tokens, shard_tokens))
    assert np.array_equal(np.concatenate(shards), tokens)
    assert [len(shard) for shard in shards[:-1]] == [
        val_tokens,
        *[shard_tokens] * len(shards[1:-1]),
    ]


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
def test_nul_surrogates_and_long_lines_are_encoded(tmp_path, tokenizer):
    texts = ["a\0b\0", "lone \ud800 and \udfff, pair \ud83d\ude00", "word " * 200_000, "z" * 99_999]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    tokens = prepare_local(path, tmp_path / "out", tokenizer=tokenizer, shard_tokens=100_000)
    assert tokens == reference(texts)


def test_empty_documents_are_left_out(tmp_path):
    lines = [
        '{"text": ""}',
        '{"text": null}',
        "",
        *['{"text": "the cat sat"}'] * 20,
        '{"text": ""}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    tokens = prepare_local(tmp_path / "x.jsonl", tmp_path / "out")
    assert tokens == reference(["the cat sat"] * 20)


@with_gigatoken
@settings(deadline=None, max_examples=300)
@given(st.lists(any_text.filter(bool), min_size=1, max_size=20))
def test_gigatoken_gives_tiktokens_tokens(batch):
    assert fineweb.encode_fast(batch).tolist() == fineweb.encode(batch).tolist()


@with_gigatoken
@pytest.mark.parametrize("glue", ["'s", " 1", "a", "  \n"])
def test_gigatoken_and_tiktoken_agree_on_every_character(glue):
    every = map(chr, range(0x40000))  # the planes in which characters have a meaning
    agreed = glue.join(char for char in every if not fineweb.DISPUTED.search(char))
    assert np.array_equal(fineweb.encode_fast([agreed]), fineweb.encode([agreed]))
    new = [f"{char}{glue}x" for char in "\ud800\u088f\ua7ce\U00010940\U000323b0\U00033479"]
    assert np.array_equal(fineweb.encode_fast(new), fineweb.encode(new))


def test_bytes_do_not_depend_on_processes_or_tokenizer(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 100)  # many batches, so that order matters
    made = []
    for tokenizer, processes in itertools.product(TOKENIZERS, (1, 2)):
        out = tmp_path / f"{tokenizer}-{processes}"
        prepare_local(corpus, out, processes=processes, tokenizer=tokenizer)
        made.append(contents(out))
    assert len(made[0]) > 5
    assert all(other == made[0] for other in made[1:])


def test_dead_worker_is_one_clear_error():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "encode", os._exit)
        with pytest.raises(UserError, match=r"process died.*--processes=1"):
            list(fineweb.encode_in_processes([3, 3, 3], processes=2))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_workers_end_when_the_main_process_is_killed():
    code = """
import itertools, multiprocessing, fineweb
for _ in fineweb.encode_in_processes(itertools.repeat(["text"]), 2):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    workers = [int(pid) for pid in main.stdout.readline().split()]
    main.send_signal(signal.SIGKILL)
    main.communicate(timeout=20)  # the workers hold its output open until they end
    assert len(workers) == 2


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


def test_input_too_small_to_train_on_is_refused_and_leaves_nothing(corpus, tmp_path):
    size = len(reference(TEXTS))
    with pytest.raises(UserError, match=f"{size:,} tokens, too few for --val_tokens={size}"):
        prepare_local(corpus, tmp_path / "out", val_tokens=size)
    assert not (tmp_path / "out").exists()
    assert len(prepare_local(corpus, tmp_path / "out", val_tokens=size - 1)) == size


def test_second_run_says_already_there_and_writes_nothing(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    prepare_local(corpus, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    first = capsys.readouterr().out
    prepare_local(corpus, out, processes=2, tokenizer="tiktoken")
    assert capsys.readouterr().out == "already there: " + first.split("\n", 1)[1]
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_input, r"made with input=1 files.* not 1 files"),
        (remove_manifest, r"holds \d+ shards and no whole manifest.json"),
        (cut_manifest, r"no whole manifest.json"),
        (remove_shard, r"other shards than its manifest.json lists"),
        (cut_shard, r"train_000003.npy is no whole .npy shard"),
        (swap_shard, r"other shards than its manifest.json lists"),
        (add_shard, r"other shards than its manifest.json lists"),
    ],
)
def test_folder_with_other_shards_is_refused_and_kept(corpus, tmp_path, change, says):
    out = tmp_path / "out"
    prepare_local(corpus, out)
    change(corpus, out)
    before = contents(out)
    with pytest.raises(UserError, match=says) as error:
        prepare_local(corpus, out)
    assert str(out) in str(error.value) and "delete" in str(error.value)
    assert contents(out) == before


@pytest.mark.parametrize("option", [{"shard_tokens": 65}, {"val_tokens": 17}, {"max_shards": 9}])
def test_folder_made_with_other_options_is_refused(corpus, tmp_path, option):
    prepare_local(corpus, tmp_path / "out")
    before = contents(tmp_path / "out")
    [(name, value)] = option.items()
    with pytest.raises(UserError, match=f"made with {name}=.*, not {value}: delete the folder or"):
        prepare_local(corpus, tmp_path / "out", **option)
    with pytest.raises(UserError, match="made with source=local, not python-docs"):
        fineweb.prepare(Options(source="python-docs", out_dir=str(tmp_path / "out")))
    assert contents(tmp_path / "out") == before


def test_out_dir_that_is_a_file_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="is a file"):
        prepare_local(corpus, corpus)


def test_error_in_mid_write_leaves_no_file_under_the_final_name(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), fineweb.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert contents(tmp_path) == {"x.npy": b"old"}
    with fineweb.replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"x.npy": b"new"}


def test_report_counts_steps_of_an_epoch_rounded_up(capsys):
    sizes = [100_000_000] * 99 + [53_989_101]
    names = ["edufineweb_val_000000.npy", *["edufineweb_train_000001.npy"] * 99]
    shards = [{"file": name, "tokens": size} for name, size in zip(names, sizes, strict=True)]
    fineweb.report("there", {"tokens": sum(sizes), "shards": shards})
    first, second = capsys.readouterr().out.splitlines()
    steps = "18,795 steps an epoch at 524,288 tokens a step"
    assert first == f"there: 99 train + 1 val shards, 9,953,989,101 tokens, {steps}"
    assert second == "train on it: python train_gpt2.py --data_dir=there"


# ---------------------------------------------------------------- local files


def zstd(data):
    return pyarrow.compress(data, "zstd", asbytes=True)


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
    table = pyarrow.table({"n": [1, 2, 3], "text": ["row one", None, "row three"]})
    pyarrow.parquet.write_table(table, folder / "7.parquet")
    (folder / "8.csv").write_text("not,read")
    (folder / "sub" / "9.txt").write_text("deep")
    texts = [json.loads(line)["text"] for line in lines]
    plain = ["plain été\r\n", "# Title\n"]
    expected = [*plain, *texts * 3, "zipped", "row one", "row three", "deep"]
    assert prepare_local(folder, tmp_path / "out") == reference(expected)


def test_inputs_are_read_in_the_order_given_and_once(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    given = [str(tmp_path / "c.txt"), str(tmp_path / "*.txt"), str(tmp_path)]
    assert [path.stem for path in fineweb.local_files(given)] == ["c", "a", "b"]


def test_name_with_glob_characters_is_a_name_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert fineweb.local_files([str(tmp_path / "a[1].txt")]) == [tmp_path / "a[1].txt"]


def test_text_column_chooses_the_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": 1, "body": "the cat sat on the mat again"}\n' * 9)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["row"] * 9}), tmp_path / "y.parquet")
    tokens = prepare_local(tmp_path, tmp_path / "out", text_column="body")
    assert tokens == reference(["the cat sat on the mat again"] * 9 + ["row"] * 9)


GOOD = b'{"text": "fine"}\n'
COLUMN = pyarrow.table({"body": ["x"]})
NUMBERS = pyarrow.table({"text": [1]})


def parquet_bytes(table):
    with tempfile.TemporaryDirectory() as folder:
        pyarrow.parquet.write_table(table, Path(folder, "x"))
        return Path(folder, "x").read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.jsonl", GOOD * 2 + b"{oops\n" + GOOD, r"x.jsonl, line 3 is no JSON .*mend it"),
        (
            "x.jsonl",
            GOOD + b'{"body": "b", "id": 1}\n',
            "line 2 has no 'text' but body, id: see --",
        ),
        ("x.jsonl", GOOD + b'["text"]\n', "line 2 has no 'text' but list: see --text_column"),
        ("x.jsonl", GOOD + b'{"text": 7}\n', "line 2: expected text, found int: see --text_column"),
        ("x.jsonl", GOOD + b'{"text": "\xe9"}\n', r"line 2, byte 11: not UTF-8.*convert"),
        ("x.txt", "été\nde\n".encode() + b"l'\xe9t\xe9", r"x.txt, line 3, byte 3: not UTF-8"),
        ("x.jsonl.gz", gzip.compress(GOOD * 999)[:-20], r"cannot read .*x.jsonl.gz"),
        ("x.jsonl.gz", GOOD, r"cannot read .*x.jsonl.gz"),
        ("x.jsonl.zst", zstd(GOOD * 999)[:-3], r"cannot read .*x.jsonl.zst"),
        ("x.parquet", parquet_bytes(COLUMN), "x.parquet has no 'text' but body: see --text_column"),
        ("x.parquet", parquet_bytes(NUMBERS), "x.parquet: expected text, found int"),
        ("x.parquet", parquet_bytes(COLUMN)[:-9], "x.parquet is no whole .parquet file"),
        ("x.csv", b"a,b", r"none of the 1 files there ends \.txt, \.md, \.jsonl, \.parquet"),
    ],
)
def test_bad_input_is_one_error_that_says_where(tmp_path, name, data, says):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as error:
        prepare_local(tmp_path / "in", tmp_path / "out", val_tokens=100_000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["missing.txt", "missing/", "none*.txt"])
def test_missing_input_is_named(tmp_path, given):
    with pytest.raises(UserError, match=re.escape(f"{given}: no file that ends .txt")):
        prepare_local(tmp_path / given if given != "missing/" else given, tmp_path / "out")


# ---------------------------------------------------------------- python-docs


@pytest.fixture(scope="module")
def python_docs():
    sys.modules.pop("this", None)
    return list(fineweb.python_docs())


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
    assert f"train on it: python train_gpt2.py configs/tiny.toml --data_dir={out}" in made.stdout
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


# ---------------------------------------------------------------- Hugging Face, by stand-ins


class Hub:
    """A folder that plays the hub: the functions fineweb.py calls, and a record of the calls."""

    def __init__(self, folder):
        self.folder, self.fetched = folder, []
        folder.mkdir()

    def dataset_info(self, dataset, revision):
        self.asked = dataset, revision
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        names = [path.relative_to(self.folder).as_posix() for path in files]
        random.Random(0).shuffle(names)
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n) for n in names])

    def hf_hub_download(self, dataset, name, *, repo_type, revision, local_dir):
        assert (repo_type, revision) == ("dataset", "c0ffee")
        self.fetched.append(name)
        if local_dir is None:
            return str(self.folder / name)
        Path(local_dir, name).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.folder / name, Path(local_dir, name))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    return hub


def fill_with_parquet(hub):
    for index, name in enumerate(["sample/10BT/000", "sample/10BT/001", "data/other/000"]):
        path = hub.folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = TEXTS[20 * index : 20 * index + 20]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    (hub.folder / "README.md").write_text("# about")


def prepare_hub(out_dir, **options):
    fineweb.prepare(Options(out_dir=str(out_dir), **options))


def test_fineweb_edu_reads_the_parquet_files_of_its_subset(hub, tmp_path):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])
    assert hub.asked == ("HuggingFaceFW/fineweb-edu", "main")
    assert hub.fetched == ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]
    manifest = manifest_of(tmp_path / "out")
    assert manifest["dataset"] == "HuggingFaceFW/fineweb-edu@main"
    assert manifest["revision"] == "c0ffee"
    assert manifest["shards"][0]["tokens"] == manifest["val_tokens"] == 50


def test_finished_folder_needs_no_network(hub, tmp_path, capsys):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    hub.fetched.clear()
    del hub.asked
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert "already there" in capsys.readouterr().out
    assert hub.fetched == [] and not hasattr(hub, "asked")


def test_fineweb_edu_fetches_no_more_files_than_max_shards_need(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 100)
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50, max_shards=1)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])[:100]
    assert hub.fetched == ["sample/10BT/000.parquet"]


def test_subset_without_parquet_is_named(hub, tmp_path):
    fill_with_parquet(hub)
    with pytest.raises(UserError, match=r"no .parquet file in me/mine/sample/1T/: see --dataset"):
        prepare_hub(tmp_path / "out", dataset="me/mine", subset="sample/1T", revision="v2")
    assert hub.asked == ("me/mine", "v2")


def bin_bytes(tokens, promised=None, magic=20240520, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def fill_with_shards(hub):
    for index, split in enumerate(["val", "train", "train", "train"]):
        data = bin_bytes([END_OF_TEXT, index, index])
        (hub.folder / f"finewebedu_{split}_{index:06d}.bin").write_bytes(data)
    (hub.folder / ".gitattributes").write_text("")


@pytest.mark.parametrize(("max_shards", "count"), [(0, 4), (2, 3)])
def test_pretokenized_shards_get_the_projects_names(hub, tmp_path, max_shards, count):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "out", source="pretokenized", max_shards=max_shards)
    names = [f"edufineweb_{'train' if i else 'val'}_{i:06d}.bin" for i in range(count)]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, "manifest.json"])
    expected = [token for i in range(count) for token in (END_OF_TEXT, i, i)]
    assert stream(tmp_path / "out") == expected
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["documents"], manifest["tokens"]) == (count, 3 * count)
    assert manifest["dataset"] == "kjj0/finewebedu10B-gpt2@main"
    assert hub.fetched == [name.replace("edufineweb", "finewebedu") for name in names]


def test_pretokenized_shard_cut_short_gets_no_final_name(hub, tmp_path):
    fill_with_shards(hub)
    os.truncate(hub.folder / "finewebedu_train_000002.bin", 1028)
    with pytest.raises(
        UserError, match=r"train_000002.bin is not whole.* 1,030 bytes, found 1,028"
    ):
        prepare_hub(tmp_path / "out", source="pretokenized")
    assert not shard_paths(tmp_path / "out")


def test_interrupted_download_can_go_on(hub, tmp_path, monkeypatch):
    fill_with_shards(hub)
    working = hub.hf_hub_download

    def failing(dataset, name, **where):
        if name.endswith("2.bin"):
            raise ConnectionError("connection reset\nby peer")
        return working(dataset, name, **where)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    says = r"cannot fetch finewebedu_train_000002.bin of kjj0/.* \(connection reset\): check the"
    with pytest.raises(UserError, match=says):
        prepare_hub(tmp_path / "out", source="pretokenized")
    assert (tmp_path / "out" / ".incoming" / "finewebedu_train_000001.bin").exists()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", working)
    prepare_hub(tmp_path / "out", source="pretokenized")
    assert len(stream(tmp_path / "out")) == 12


def test_dataset_without_shards_is_named(hub, tmp_path):
    with pytest.raises(UserError, match=r"kjj0/finewebedu10B-gpt2 holds no .*_val_000000.bin"):
        prepare_hub(tmp_path / "out", source="pretokenized")


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
        ("x.npy", b"", "x.npy is no whole .npy shard .*expected 8 bytes got 0.*delete it"),
        ("x.npy", b"hello, world", r"x.npy is no whole .npy shard .*expected.*NUMPY.*got b'hello"),
        ("x.npy", npy_bytes(np.zeros(99, np.uint16))[:-5], "x.npy is no whole .npy shard"),
        ("x.npy", npy_bytes(np.array([{}], dtype=object)), "x.npy is no whole .*Python objects"),
        ("x.npy", npy_bytes(np.zeros(9)), r"expected one row of uint16, found float64 of shape"),
        ("x.npy", npy_bytes(np.zeros((3, 3), np.uint16)), r"found uint16 of shape \(3, 3\)"),
        ("x.npy", npy_bytes(np.zeros(0, np.uint16)), r"found uint16 of shape \(0,\)"),
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


def test_tokenizer_tables_are_the_projects_own(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    fineweb.tokenizer.cache_clear()
    assert fineweb.tokenizer().n_vocab == END_OF_TEXT + 1
    assert Path(os.environ["TIKTOKEN_CACHE_DIR"]) == ROOT / "assets" / "tiktoken"


def test_user_error_is_one_line_and_exit_code_2(tmp_path):
    made = command("--source=local", "--input", tmp_path / "no.txt", f"--out_dir={tmp_path}/out")
    assert made.returncode == 2
    assert re.fullmatch(r"error: --input=.*no\.txt: no file that ends .*\n", made.stderr)


def test_documented_flags_are_parsed():
    line = ["--source=local", "--input", "a.txt", "b/", "--out_dir=x", "--shard_tokens=5"]
    line += ["--val_tokens=6", "--max_shards=7", "--processes=8", "--tokenizer=tiktoken"]
    parsed = fineweb.command_line(Options, "", args=line)
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(input=("x.txt",)), "--input has no meaning with --source=fineweb-edu"),
        (dict(source="pretokenized", val_tokens=5), "--val_tokens has no meaning with"),
        (dict(source="python-docs", text_column="x"), "--text_column has no meaning with"),
        (dict(source="local"), "needs --input=PATH"),
        (dict(shard_tokens=0), "--shard_tokens=0 is too small: expected 1 or more"),
        (dict(val_tokens=-1), "--val_tokens=-1 is too small: expected 0 or more"),
        (dict(processes=-1), "--processes=-1 is too small"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        fineweb.resolve(Options(**options))


def test_without_gigatoken_tiktoken_does_the_work(monkeypatch):
    monkeypatch.setattr(fineweb.importlib.util, "find_spec", lambda name: None)
    assert fineweb.resolve(Options()).tokenizer == "tiktoken"
    with pytest.raises(UserError, match="gigatoken is missing: pip install gigatoken"):
        fineweb.resolve(Options(tokenizer="gigatoken"))
