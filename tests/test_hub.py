"""hub.py, and fineweb.py with it: downloads that go on where they were, from a stand-in."""

import contextlib
import errno
import functools
import hashlib
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub.constants
import pyarrow
import pytest
from preparing import (
    ROOT,
    TEXTS,
    bin_bytes,
    contents,
    flags,
    interrupted,
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

import fineweb
import train_gpt2
from common import UserError
from fineweb import END_OF_TEXT, Options


class Hub(ThreadingHTTPServer):
    """A server that plays the hub for a folder, and a record of what it was asked."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.commit, self.sums = folder, "c0ffee".ljust(40, "0"), {}
        self.fetched = []  # names of files
        self.starts = {}  # file -> where its ranges began
        self.ends, self.takes_ranges = {}, True  # file -> after how many bytes to hang up, once
        self.hangs_up = threading.Event()  # until then it stays silent
        self.hangs_up.set()
        self.failing, self.fails_with = (), 500  # how the names end of the files it cannot send
        self.refuses, self.refuses_with = {}, 404  # headers of its answer to whatever is asked
        self.large = (".parquet", ".bin")  # which files have a sha256
        self.heads = []  # (path, token, encoding) of what was asked
        folder.mkdir()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def about(self, path):
        name, data = path.relative_to(self.folder).as_posix(), path.read_bytes()
        sha256 = self.sums.get(name, hashlib.sha256(data).hexdigest())
        lfs = dict(sha256=sha256, size=len(data), pointerSize=1)
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's
        about = dict(rfilename=name, size=len(data), blobId=self.sums.get(name, sha1))
        return about | (dict(lfs=lfs) if path.suffix in self.large else {})


class Answers(BaseHTTPRequestHandler):
    """What the hub answers: a dataset's files, what one of them is, and its bytes from a server."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, url = self.server, urllib.parse.urlsplit(self.path)
        hub.heads.append((url.path, self.headers["Authorization"], self.headers["Accept-Encoding"]))
        if hub.refuses:
            return self.answer(b"", hub.refuses_with, hub.refuses)
        if match := re.fullmatch("/api/datasets/(.+)/revision/(.+)", url.path):
            assert url.query.lower() == "blobs=true"
            hub.asked = match[1], match[2]
            files = [hub.about(path) for path in hub.folder.rglob("*") if path.is_file()]
            random.Random(0).shuffle(files)
            self.answer(json.dumps(dict(id=match[1], sha=hub.commit, siblings=files)).encode())
        elif match := re.fullmatch(f"/datasets/(.+)/resolve/{hub.commit}/(.+)", url.path):
            about = hub.about(hub.folder / match[2])
            etag = about["lfs"]["sha256"] if "lfs" in about else about["blobId"]
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": about["size"]}
            elsewhere = f"http://localhost:{hub.server_port}/elsewhere/{match[2]}"
            headers = linked | {"Location": elsewhere, "X-Repo-Commit": hub.commit}
            self.answer(b"", 302, headers)
        elif match := re.fullmatch("/elsewhere/(.+)", url.path):
            self.send_file(match[1])
        else:
            self.send_error(404)

    def send_file(self, name):
        data, found = (self.server.folder / name).read_bytes(), {}
        etag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if self.command == "HEAD":
            return self.answer(data, headers=etag)
        hub, start = self.server, 0
        if name.endswith(hub.failing):
            return self.send_error(hub.fails_with)
        hub.fetched.append(name)
        if hub.takes_ranges and (asked := self.headers.get("Range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            hub.starts.setdefault(name, []).append(start)
            found = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        end = start + hub.ends.get(name, len(data))
        self.answer(data[start:end], 206 if start else 200, etag | found, len(data) - start)
        if hub.ends.pop(name, None) is not None:
            hub.hangs_up.wait()
            self.close_connection = True

    def answer(self, data, status=200, headers=(), size=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", len(data) if size is None else size)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    constants = huggingface_hub.constants
    template = hub.address + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fineweb.hub, "PAUSES", ())
    yield hub
    hub.shutdown()
    hub.server_close()


def fill_with_parquet(hub):
    for index, name in enumerate(["sample/10BT/000", "sample/10BT/001", "data/other/000"]):
        path = hub.folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = TEXTS[20 * index : 20 * index + 20]
        write_parquet(path, texts, row_group_size=7)
    (hub.folder / "README.md").write_text("# about")


SAMPLE = ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]


def prepare_hub(out_dir, **options):
    fineweb.prepare(Options(out_dir=str(out_dir), **options))


def test_fineweb_edu_reads_the_parquet_files_of_its_subset(hub, tmp_path):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])
    assert hub.asked == ("HuggingFaceFW/fineweb-edu", "main")
    assert hub.fetched == SAMPLE
    manifest = manifest_of(tmp_path / "out")
    assert manifest["dataset"] == "HuggingFaceFW/fineweb-edu@main"
    assert manifest["revision"] == hub.commit
    assert manifest["shards"][0]["tokens"] == manifest["val_tokens"] == 50


def test_finished_folder_needs_no_network(hub, tmp_path, capsys):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    hub.fetched.clear()
    del hub.asked
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert "already there" in capsys.readouterr().out
    assert hub.fetched == [] and not hasattr(hub, "asked")


def test_fineweb_edu_fetches_no_more_files_than_max_shards_need(
    hub, tmp_path, small_blocks, monkeypatch
):
    monkeypatch.setattr(fineweb, "AHEAD", 0)  # of Blocks that are read early
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50, max_shards=1)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])[:100]
    assert hub.fetched == SAMPLE[:1]


def test_whole_dataset_is_read_without_a_subset(hub, tmp_path):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", dataset="me/mine", subset="", revision="v2", shard_tokens=50)
    assert hub.asked == ("me/mine", "v2")
    assert hub.fetched == ["data/other/000.parquet", *SAMPLE]
    assert manifest_of(tmp_path / "out")["dataset"] == "me/mine@v2"


@pytest.mark.parametrize(
    ("subset", "names"),
    [
        ("", ["data/train-00-of-02", "data/train-01-of-02", "other/10/x"]),
        ("data", ["data/train-00-of-02", "data/train-01-of-02"]),
        ("data/train-01", ["data/train-01-of-02"]),
        ("data/test", ["data/test-00-of-01"]),
        ("data/val", ["data/val-00"]),
        ("other-10", ["other/10/x"]),
        ("other", ["other/10/x"]),
        ("oth", ["other/10/x"]),
    ],
)
def test_subset_is_a_folder_or_how_names_begin_and_what_is_held_out_stays_out(subset, names):
    there = ["data/test-00-of-01", "data/train-00-of-02", "data/train-01-of-02", "data/val-00"]
    there += ["other/10/x", "other/10/x_eval"]
    named = [f"{name}.{end}" for name in there for end in ("parquet", "md")]
    files = [SimpleNamespace(rfilename=name) for name in named]
    found = [file.rfilename for file in fineweb.in_subset(subset, files)]
    assert found == [f"{name}.parquet" for name in names]


def test_what_is_to_fetch_is_said_and_needs_room(hub, tmp_path, monkeypatch, capsys, small_blocks):
    fill_with_parquet(hub)
    monkeypatch.setattr(fineweb, "AHEAD", 0)
    prepare_hub(tmp_path / "first", shard_tokens=50, max_shards=1)
    assert hub.fetched == SAMPLE[:1] and "to fetch" not in capsys.readouterr().out
    full = patched((shutil, "disk_usage", lambda path: SimpleNamespace(free=10)))
    with full, pytest.raises(UserError, match=r"cache needs \S+B more, 10.0B are free"):
        prepare_hub(tmp_path / "out", shard_tokens=50)
    size = (hub.folder / SAMPLE[1]).stat().st_size
    said = f"to fetch: {size / 1000:.2f}kB into {tmp_path / 'cache'}; "
    assert said not in capsys.readouterr().out
    assert hub.fetched == SAMPLE[:1] and not (tmp_path / "out").exists()
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert hub.fetched == SAMPLE and said in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"again needs \S+B more"):
        prepare_hub(tmp_path / "again", shard_tokens=50)
    assert "to fetch" not in capsys.readouterr().out


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_what_is_to_fetch_is_said_by_the_first_rank_and_room_asked_by_each(
    tmp_path, monkeypatch, capsys, rank, times
):
    monkeypatch.setenv("RANK", rank)
    fineweb.hub.check_room(tmp_path, 1000)
    assert capsys.readouterr().out.count("to fetch: 1.00kB into ") == times
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(UserError, match=r"needs 1\.00kB more"):
        fineweb.hub.check_room(tmp_path, 1000)


def test_dataset_that_moved_is_gone_on_with_as_it_was(hub, tmp_path, small_blocks):
    fill_with_parquet(hub)
    options = Options(out_dir=str(tmp_path / "out"), shard_tokens=50)
    assert interrupted(options, step=9, after=True)
    fineweb.prepare(options)
    assert hub.asked == ("HuggingFaceFW/fineweb-edu", hub.commit)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])


def test_folder_of_another_revision_is_refused(hub, tmp_path, small_blocks):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50, max_shards=1)
    assert interrupted(Options(out_dir=str(tmp_path / "part"), shard_tokens=50), 7, after=True)
    hub.commit = "0" * 40
    for folder in (tmp_path / "out", tmp_path / "part"):
        before = contents(folder)
        for change in (dict(revision="v2"), dict(dataset="me/mine"), dict(subset="data")):
            with pytest.raises(UserError, match=r"holds shards made with .*: delete the folder"):
                prepare_hub(folder, shard_tokens=50, **change)
        with pytest.raises(UserError, match=r"holds shards of revision c0ffee0+, not 0+: delete"):
            prepare_hub(folder, shard_tokens=50)
        assert contents(folder) == before


def test_subset_without_parquet_is_named(hub, tmp_path):
    fill_with_parquet(hub)
    with pytest.raises(UserError, match=r"no .parquet file in me/mine/sample/1T: see --dataset"):
        prepare_hub(tmp_path / "out", dataset="me/mine", subset="sample/1T", revision="v2")
    assert hub.asked == ("me/mine", "v2")


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
    assert len(shard_paths(tmp_path / "out")) == 2  # those before it


def test_interrupted_download_goes_on_with_what_is_missing(hub, tmp_path):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "whole", source="pretokenized")
    hub.failing = ("2.bin",)
    says = r"cannot fetch finewebedu_train_000002.bin of kjj0/.* \(Server error '500.*: check its"
    with pytest.raises(UserError, match=says):
        prepare_hub(tmp_path / "out", source="pretokenized")
    assert [path.name for path in shard_paths(tmp_path / "out")] == [
        "edufineweb_val_000000.bin",
        "edufineweb_train_000001.bin",
    ]
    with pytest.raises(UserError, match="are not all there yet"):
        train_gpt2.TokenShards(str(tmp_path / "out"), "train")
    hub.failing = ()
    hub.fetched.clear()
    prepare_hub(tmp_path / "out", source="pretokenized")
    assert hub.fetched == ["finewebedu_train_000002.bin", "finewebedu_train_000003.bin"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pretokenized_shards_are_extended_to_what_one_run_makes(hub, tmp_path):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "whole", source="pretokenized")
    for max_shards, count in [(1, 2), (2, 3), (1, 3), (0, 4)]:
        hub.fetched.clear()
        prepare_hub(tmp_path / "out", source="pretokenized", max_shards=max_shards)
        assert len(shard_paths(tmp_path / "out")) == count
        assert len(hub.fetched) == {1: 2, 2: 1, 0: 1}[max_shards] * (count != 3 or max_shards == 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pretokenized_shard_with_another_sha256_gets_no_name(hub, tmp_path):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "whole", source="pretokenized")
    hub.sums["finewebedu_train_000002.bin"] = "0" * 64
    says = (
        f"finewebedu_train_000002.bin of .* came with another checksum than {'0' * 64}: try again"
    )
    with pytest.raises(UserError, match=says):
        prepare_hub(tmp_path / "out", source="pretokenized")
    out = tmp_path / "out"
    assert not list(out.rglob("*train_000002*"))  # to be fetched anew
    hub.sums.clear()
    prepare_hub(out, source="pretokenized")
    assert contents(out) == contents(tmp_path / "whole")


def fill_with_a_large_file(hub):
    """One of each kind; returns the names."""
    random.seed(0)
    tokens = [END_OF_TEXT, *range(40_000)]
    names = ["finewebedu_train_000001.bin", "sample/10BT/000.parquet"]
    (hub.folder / "finewebedu_val_000000.bin").write_bytes(bin_bytes(tokens[:9]))
    (hub.folder / names[0]).write_bytes(bin_bytes(tokens))
    (hub.folder / names[1]).parent.mkdir(parents=True)
    texts = [random.randbytes(500).hex() for _ in range(100)]
    write_parquet(hub.folder / names[1], texts, compression="none")
    return names


BOTH = pytest.mark.parametrize(
    ("options", "file"), [(dict(source="pretokenized"), 0), (dict(shard_tokens=50_000), 1)]
)
# huggingface_hub's own chunks are of 10 MB
PREPARE = """
import common, fineweb, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000
common.run(fineweb.main)
"""


@with_sigkill
@BOTH
def test_download_that_was_killed_goes_on_where_it_was(hub, tmp_path, options, file):
    name = fill_with_a_large_file(hub)[file]
    prepare_hub(tmp_path / "whole", **options)
    hub.fetched.clear()
    places = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "new")}
    line = [
        sys.executable,
        "-c",
        PREPARE,
        *flags(Options(out_dir=str(tmp_path / "out"), **options)),
    ]
    start = functools.partial(subprocess.Popen, line, cwd=ROOT, env=os.environ | places)
    hub.ends[name], size = 55_000, 0
    hub.hangs_up.clear()
    with start() as process:
        while size < 50_000 and process.poll() is None:
            size = max(
                path.stat().st_size for path in [hub.folder, *tmp_path.rglob("*.incomplete")]
            )
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    hub.hangs_up.set()
    with start() as process:
        assert process.wait(timeout=60) == 0
    assert 50_000 <= hub.starts[name][0] <= 55_000 and hub.fetched.count(name) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.incomplete"))


@BOTH
def test_download_goes_on_when_the_hub_hangs_up(hub, tmp_path, monkeypatch, options, file):
    name = fill_with_a_large_file(hub)[file]
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.ends[name] = 55_000
    prepare_hub(tmp_path / "out", **options)
    assert hub.starts == {name: [50_000]}
    fineweb.verify(tmp_path / "out")


def fetch_again(hub, path, left):
    """What is at `path` after `left` was left there of a file with 100 zeros."""
    (hub.folder / "x.bin").write_bytes(bytes(100))
    path.with_name(f"{path.name}.incomplete").write_bytes(left)
    dataset = fineweb.hub.Dataset("me/mine", "main")
    dataset.fetch(dataset.files[0], path)
    return path.read_bytes()


@pytest.mark.parametrize(("left", "starts"), [(0, []), (60, [60]), (100, []), (101, [])])
def test_left_part_of_a_download_is_used(hub, tmp_path, left, starts):
    assert fetch_again(hub, tmp_path / "x", bytes(left)) == bytes(100)
    assert hub.starts.get("x.bin", []) == starts
    assert hub.fetched == ["x.bin"] * (left != 100)


def test_left_part_of_another_file_is_thrown_away(hub, tmp_path):
    assert fetch_again(hub, tmp_path / "x", b"1" * 60) == bytes(100)
    assert hub.fetched == ["x.bin"] * 2 and hub.starts == {"x.bin": [60]}


def test_file_that_comes_otherwise_twice_is_not_taken(hub, tmp_path):
    hub.sums["x.bin"] = "0" * 64
    with pytest.raises(
        UserError, match=r"x.bin of me/mine came with another checksum than 0+: try"
    ):
        fetch_again(hub, tmp_path / "x", b"1" * 60)
    assert not list(tmp_path.glob("x*"))


def test_server_that_sends_all_instead_of_the_rest_is_believed(hub, tmp_path):
    hub.takes_ranges = False
    assert fetch_again(hub, tmp_path / "x", bytes(60)) == bytes(100)


def test_hub_that_fails_for_a_while_is_waited_for(hub, tmp_path, monkeypatch, capsys):
    waited = []

    def sleep(pause):
        waited.append(pause)
        hub.failing = () if len(waited) == 2 else hub.failing

    monkeypatch.setattr(fineweb.hub, "PAUSES", (11, 22, 33))
    monkeypatch.setattr(fineweb.hub.time, "sleep", sleep)
    hub.failing = ("x.bin",)
    assert fetch_again(hub, tmp_path / "x", bytes(60)) == bytes(100)
    assert waited == [11, 22] and hub.starts == {"x.bin": [60]}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and re.match("x.bin: Server error '500 .*: trying again in 11 s", said[0])


def test_hub_that_sends_something_each_time_is_not_waited_for_longer(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.hub, "PAUSES", (11, 22))
    waited, sizes = [], iter((30, 30, 0, 30, 0, 0, 0))

    def reset(url, part, **_):
        part.write(bytes(next(sizes)))
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(fineweb.hub.time, "sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", reset)
    with pytest.raises(UserError, match="Connection reset by peer"):
        fetch_again(hub, tmp_path / "x", b"")
    assert waited == [11, 11, 11, 22, 11, 22] and not list(sizes)


def test_list_of_files_is_waited_for_as_files_are(hub, tmp_path, monkeypatch, capsys):
    fill_with_parquet(hub)
    waited = []

    def sleep(pause):
        waited.append(pause)
        hub.refuses = {} if len(waited) == 2 else hub.refuses

    monkeypatch.setattr(fineweb.hub, "PAUSES", (11, 22, 33))
    monkeypatch.setattr(fineweb.hub.time, "sleep", sleep)
    hub.refuses, hub.refuses_with = {"X-Request-Id": "Root=1-abc"}, 503
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert waited == [11, 22] and stream(tmp_path / "out") == reference(TEXTS[:40])
    said = r"the list of files of HuggingFaceFW/fineweb-edu at main: .*503.*: trying again in 11 s"
    assert re.search(said, capsys.readouterr().out)


def test_list_of_files_without_a_network_fails_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.hub, "PAUSES", (11, 22, 33))
    monkeypatch.setattr(fineweb.hub.time, "sleep", None)
    hub.server_close()
    with pytest.raises(UserError, match=r"cannot fetch the list of files of .*: check its name"):
        prepare_hub(tmp_path / "out")


def test_list_of_files_is_not_waited_for_without_end(tmp_path, monkeypatch):
    def silent(*_, timeout=None, **__):
        assert 0 < timeout <= 60
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", silent)
    with pytest.raises(UserError, match=r"list of files of me/mine at main \(The read operation"):
        prepare_hub(tmp_path / "out", dataset="me/mine")


def test_shards_that_would_have_one_name_are_refused(hub, tmp_path):
    fill_with_shards(hub)
    (hub.folder / "b").mkdir()
    (hub.folder / "b" / "finewebedu_train_000001.bin").write_bytes(bin_bytes([END_OF_TEXT]))
    with pytest.raises(UserError, match=r"holds b/.*_000001.bin and fine.*_000001.bin, which"):
        prepare_hub(tmp_path / "out", source="pretokenized")
    assert not hub.fetched


def answer(status):
    return SimpleNamespace(response=SimpleNamespace(status_code=status))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(104, "reset"), True),
        (OSError("Consistency check failed"), True),
        (httpx.ConnectTimeout("slow"), True),
        (ValueError("too large"), False),
        (TypeError("another version"), False),
        (OSError(errno.ENOSPC, "full"), False),
        *((answer(status), status != 404) for status in (404, 408, 429, 503)),
    ],
)
def test_what_may_pass_is_waited_for(error, passes):
    assert fineweb.hub.may_pass(error) == passes


def test_hub_that_refuses_is_not_asked_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb.hub, "PAUSES", (11, 22, 33))
    monkeypatch.setattr(fineweb.hub.time, "sleep", None)
    hub.failing, hub.fails_with = ("x.bin",), 404
    with pytest.raises(
        UserError, match=r"cannot fetch x.bin of me/mine \(.*404.*\): check its name"
    ):
        fetch_again(hub, tmp_path / "x", b"")


def test_what_the_hub_says_comes_without_its_numbers_alone(hub, tmp_path):
    hub.refuses = {"X-Error-Code": "RepoNotFound", "X-Request-Id": "Root=1-abc"}
    says = r"list of files of me/typo at main \(404 .*Repository Not Found .*\): check its name"
    with pytest.raises(UserError, match=says) as raised:
        prepare_hub(tmp_path / "out", dataset="me/typo")
    assert "\n" not in str(raised.value)


def test_token_is_for_the_hub_alone_and_nothing_comes_packed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_again(hub, tmp_path / "x", b"")
    # once a day huggingface_hub asks for /api/agent-harnesses, too
    asked = {(path.split("/me/")[0], token) for path, token, _ in hub.heads if "/me/" in path}
    assert asked == {("/api/datasets", "Bearer hf_secret"), ("/datasets", "Bearer hf_secret")}
    [(token, packed)] = {head[1:] for head in hub.heads if head[0] == "/elsewhere/x.bin"}
    assert (token, packed) == (None, "identity")


@pytest.mark.parametrize("options", [dict(source="pretokenized"), dict(shard_tokens=50)])
def test_every_file_is_synced_before_it_gets_its_name(hub, tmp_path, synced, options):
    fill_with_parquet(hub)
    fill_with_shards(hub)
    prepare_hub(tmp_path / "out", **options)
    files = [*(tmp_path / "out").iterdir(), *(tmp_path / "cache").glob("*/blobs/*")]
    assert len(files) > 4 and {path.stat().st_ino for path in files} <= synced


@pytest.mark.parametrize("options", [dict(source="pretokenized"), dict(shard_tokens=50)])
def test_files_without_a_sha256_are_fetched_too(hub, tmp_path, options):
    hub.large = ()
    fill_with_shards(hub)
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", **options)
    fineweb.verify(tmp_path / "out")
    assert len(hub.fetched) == (4 if "source" in options else 2)


def test_parquet_with_another_sha256_does_not_stay(hub, tmp_path):
    fill_with_parquet(hub)
    hub.sums[SAMPLE[1]] = "0" * 64
    with pytest.raises(
        UserError, match=f"001.parquet of .* came with another checksum than {'0' * 64}"
    ):
        prepare_hub(tmp_path / "out", shard_tokens=50)
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 1
    hub.sums.clear()
    prepare_hub(tmp_path / "out", shard_tokens=50)
    assert stream(tmp_path / "out") == reference(TEXTS[:40])


@pytest.mark.parametrize("links", [True, False])
def test_downloaded_file_lies_in_the_cache_once(hub, tmp_path, monkeypatch, links):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: links)
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    held = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size > 1000 and not path.is_symlink() for path in held) == 2
    assert sum(path.is_symlink() for path in held) == 2 * links
    hub.fetched.clear()
    prepare_hub(tmp_path / "again", shard_tokens=50)
    assert hub.fetched == [] and stream(tmp_path / "again") == reference(TEXTS[:40])
    name = dict(repo_id="HuggingFaceFW/fineweb-edu", repo_type="dataset", revision=hub.commit)
    path = huggingface_hub.hf_hub_download(filename=SAMPLE[0], **name)
    assert hub.fetched == [] and Path(path).read_bytes() == (hub.folder / SAMPLE[0]).read_bytes()
    os.unlink(os.path.realpath(path))
    prepare_hub(tmp_path / "anew", shard_tokens=50)
    assert hub.fetched == SAMPLE[:1] and stream(tmp_path / "anew") == reference(TEXTS[:40])


def test_file_that_two_runs_need_is_fetched_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    name = fill_with_a_large_file(hub)[1]
    hub.ends[name] = 55_000
    options = fineweb.resolve(Options(dataset="me/mine"))
    sources = [fineweb.open_source(options, None) for _ in range(2)]
    hub.hangs_up.clear()
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(source.read, 0, 0) for source in sources]
        time.sleep(0.2)  # both would have asked by now
        hub.hangs_up.set()
        assert [sum(len(block.load()) for block in blocks.result()) for blocks in made] == [100] * 2
    assert hub.fetched == [name] * 2 and hub.starts == {name: [50_000]}


def test_next_file_is_fetched_while_one_is_read(hub, tmp_path, small_blocks):
    fill_with_parquet(hub)
    options = fineweb.resolve(Options())
    source = fineweb.open_source(options, None)
    blocks = fineweb.read_blocks(source, [0, 1], [0, 0, 0])
    assert next(blocks).file == 0
    deadline = time.time() + 20
    while not list((tmp_path / "cache").rglob("001.parquet")) and time.time() < deadline:
        time.sleep(0.01)
    assert hub.fetched == SAMPLE and len({block.file for block in blocks}) == 2
    assert hub.fetched == SAMPLE


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_file_that_cannot_be_fetched_ahead_is_told_when_it_is_needed(hub, tmp_path):
    fill_with_parquet(hub)
    hub.failing = ("001.parquet",)
    with pytest.raises(UserError, match=r"cannot fetch sample/10BT/001.parquet of HuggingFaceFW/"):
        prepare_hub(tmp_path / "out", shard_tokens=50)


def first_of_sample(hub):
    fill_with_parquet(hub)
    dataset = fineweb.hub.Dataset("me/mine", "main")
    return dataset, next(file for file in dataset.files if file.rfilename == SAMPLE[0])


@pytest.mark.parametrize("links", [True, False])
def test_file_that_was_cut_in_the_cache_is_fetched_anew(hub, tmp_path, monkeypatch, links):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: links)
    dataset, file = first_of_sample(hub)
    os.truncate(dataset.download(file), 100)
    assert dataset.missing([file]) == file.size - 100
    assert dataset.download(file).read_bytes() == (hub.folder / SAMPLE[0]).read_bytes()
    assert hub.fetched == SAMPLE[:1] * 2


def test_half_file_under_a_name_of_the_cache_is_replaced_by_a_link(hub, tmp_path):
    dataset, file = first_of_sample(hub)
    path = dataset.path(file)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert dataset.download(file).read_bytes() == (hub.folder / SAMPLE[0]).read_bytes()
    assert path.is_symlink()


def test_cache_that_has_the_file_is_not_written_to(hub, tmp_path, monkeypatch):
    fill_with_parquet(hub)
    prepare_hub(tmp_path / "out", shard_tokens=50)
    monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", None)
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", None)
    prepare_hub(tmp_path / "again", shard_tokens=50)
    assert hub.fetched == SAMPLE


@pytest.mark.parametrize("name", ["../x.parquet", "/x.parquet", "a/../../x.parquet"])
def test_name_that_leads_out_of_the_dataset_is_refused(hub, tmp_path, monkeypatch, name):
    info = SimpleNamespace(sha="0", siblings=[SimpleNamespace(rfilename=name, size=1, lfs=None)])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    with pytest.raises(UserError, match=r"me/mine has a file outside itself, .*x.parquet: do not"):
        prepare_hub(tmp_path / "out", dataset="me/mine")


def test_small_file_with_another_checksum_is_not_taken(hub, tmp_path):
    hub.large = ()
    fill_with_shards(hub)
    hub.sums["finewebedu_train_000002.bin"] = "0" * 40
    with pytest.raises(UserError, match=r"000002.bin of .* came with another checksum than 0{40}:"):
        prepare_hub(tmp_path / "out", source="pretokenized")


def test_run_waits_for_what_it_fetches_ahead_though_locks_do_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", lambda _: contextlib.nullcontext())
    fill_with_parquet(hub)
    hub.ends[SAMPLE[1]] = 400
    hub.hangs_up.clear()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(prepare_hub, tmp_path / "out", shard_tokens=50)
        time.sleep(0.5)  # it has read the first file by now
        assert not made.done()
        hub.hangs_up.set()
        made.result()
    assert hub.fetched == [*SAMPLE, SAMPLE[1]]
    assert stream(tmp_path / "out") == reference(TEXTS[:40])


def end_while_fetching_ahead(hub, tmp_path, stop=lambda process: None):
    """(exit code, stderr) of a run that is waiting for a silent hub's second file."""
    hub.ends[SAMPLE[1]] = 400
    hub.hangs_up.clear()
    places = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "new")}
    options = Options(out_dir=str(tmp_path / "out"), shard_tokens=50)
    small = "import fineweb, reading; reading.BLOCK_BYTES = 1; fineweb.run(fineweb.main)"
    line = [sys.executable, "-c", small, *flags(options)]
    how = dict(cwd=ROOT, env=os.environ | places, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(line, **how) as process:
        while SAMPLE[1] not in hub.fetched and process.poll() is None:
            time.sleep(0.01)
        stop(process)
        errors = process.communicate(timeout=8)[1]  # it would ask again after 10
    hub.hangs_up.set()
    assert SAMPLE[1] in hub.fetched and "Traceback" not in errors
    return process.returncode, errors


@with_sigkill
def test_ctrl_c_does_not_wait_for_what_is_fetched_ahead(hub, tmp_path):
    fill_with_parquet(hub)
    interrupt = operator.methodcaller("send_signal", signal.SIGINT)
    code, errors = end_while_fetching_ahead(hub, tmp_path, interrupt)
    assert code == 130 and errors.endswith("\ninterrupted\n")


def test_error_does_not_wait_for_what_is_fetched_ahead(hub, tmp_path):
    fill_with_parquet(hub)
    bad = pyarrow.array([b"good"] * 20 + [b"\xff"] + [b"good"] * 500).view(pyarrow.string())
    write_parquet(hub.folder / SAMPLE[0], bad)
    code, errors = end_while_fetching_ahead(hub, tmp_path)
    assert code == 2 and "000.parquet, rows 17 to 32: Invalid UTF8" in errors


def test_room_is_for_what_is_to_fetch_too_where_it_goes_to_the_same_disk(tmp_path, monkeypatch):
    source = fineweb.Source("", [1], None, missing=lambda: 1000)
    monkeypatch.setattr(fineweb.hub, "cache", lambda: tmp_path)
    [ranks] = make_ranks(1)
    options = Options(out_dir=str(tmp_path))
    foresee = functools.partial(fineweb.foresee, options, ranks, source, 500)
    with patched((shutil, "disk_usage", lambda path: SimpleNamespace(free=1499))):
        with pytest.raises(UserError, match=r"needs 1.50kB more, 1.50kB are free"):
            foresee()
        monkeypatch.setattr(fineweb.hub, "cache", lambda: Path("/proc"))
        foresee()
    monkeypatch.setattr(fineweb.hub, "cache", lambda: tmp_path)
    with patched((shutil, "disk_usage", lambda path: SimpleNamespace(free=1500))):
        foresee()


def test_what_is_there_of_a_file_needs_no_more_room(hub, tmp_path):
    fill_with_parquet(hub)
    dataset = fineweb.hub.Dataset("me/mine", "main")
    files = [file for file in dataset.files if file.lfs]
    whole = dataset.missing(files)
    assert whole == sum(file.size for file in files)
    blob = dataset.place(files[0])
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.incomplete").write_bytes(bytes(100))
    assert dataset.missing(files) == whole - 100
    dataset.download(files[1])
    assert dataset.missing(files) == whole - 100 - files[1].size
    blob.with_name(f"{blob.name}.incomplete").write_bytes(bytes(files[0].size + 1))  # of no use
    assert dataset.missing(files) == whole - files[1].size
    blob.with_name(f"{blob.name}.incomplete").write_bytes(bytes(100))
    dataset.commit = "0" * 40  # which has the same files
    assert dataset.missing(files) == whole - 100 - files[1].size


@pytest.mark.parametrize("calls", range(1, 14))
def test_shard_that_was_fetched_but_not_noted_is_not_fetched_again(
    hub, tmp_path, monkeypatch, calls
):
    fill_with_shards(hub)
    out, replace, left = tmp_path / "out", os.replace, iter(range(calls))

    def killed(*paths):
        if next(left, None) is None:
            raise KeyboardInterrupt  # which stands for the kill
        replace(*paths)

    with patched((os, "replace", killed)), pytest.raises(KeyboardInterrupt):
        prepare_hub(out, source="pretokenized")
    prepare_hub(out, source="pretokenized")
    assert len(hub.fetched) == len(set(hub.fetched)) == 4
    fineweb.verify(out)


def test_what_lies_under_the_name_of_a_shard_is_checked(hub, tmp_path):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "whole", source="pretokenized")
    incoming = tmp_path / "out" / ".incoming"
    incoming.mkdir(parents=True)
    shutil.copy(hub.folder / "finewebedu_train_000003.bin", incoming / "edufineweb_val_000000.bin")
    prepare_hub(tmp_path / "out", source="pretokenized")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_to_fetch_are_said_with_their_room(hub, tmp_path, screen, capsys):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "out", source="pretokenized", max_shards=1)
    assert f"to fetch: 2.06kB into {tmp_path / 'out'}; " in capsys.readouterr().out
    prepare_hub(tmp_path / "out", source="pretokenized")
    assert f"to fetch: 2.06kB into {tmp_path / 'out'}; " in capsys.readouterr().out
    assert re.search(r"100%.* 12.0/12.0 \[.*tokens/s\]", screen.getvalue().split("\r")[-1])


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_is_said_as_it_is(hub, tmp_path, monkeypatch):
    from huggingface_hub.file_download import http_get

    def full(url, *args, **keys):
        if SAMPLE[1] in url:
            raise OSError(errno.ENOSPC, "No space left on device")
        http_get(url, *args, **keys)

    fill_with_parquet(hub)
    monkeypatch.setattr(fineweb.hub, "PAUSES", (1000,))
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match=f"No space left on device: '{SAMPLE[1]} of Hugging"):
        prepare_hub(tmp_path / "out", shard_tokens=50)


def test_ranks_divide_the_shards_to_fetch(hub, tmp_path):
    fill_with_shards(hub)
    prepare_hub(tmp_path / "one", source="pretokenized")
    hub.fetched.clear()
    prepare_in_ranks(2, Options("pretokenized", out_dir=str(tmp_path / "two")))
    assert sorted(hub.fetched) == sorted(path.name for path in hub.folder.glob("*.bin"))
    assert stream(tmp_path / "two") == stream(tmp_path / "one")
    fineweb.verify(tmp_path / "two")


def test_no_room_for_what_is_to_fetch_is_said_first(hub, tmp_path, monkeypatch):
    fill_with_shards(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 1030 - 1))
    with pytest.raises(UserError, match=r"out needs 4.12kB more, 4.12kB are free"):
        prepare_hub(tmp_path / "out", source="pretokenized")
    assert hub.fetched == [] and not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 1030))
    prepare_hub(tmp_path / "out", source="pretokenized")


@pytest.mark.parametrize("split", ["none", "val", "train"])
def test_dataset_without_shards_of_both_splits_is_named(hub, tmp_path, split):
    (hub.folder / f"finewebedu_{split}_000001.bin").write_bytes(bin_bytes([END_OF_TEXT]))
    with pytest.raises(UserError, match=r"kjj0/finewebedu10B-gpt2 holds no .*_val_000000.bin"):
        prepare_hub(tmp_path / "out", source="pretokenized")
