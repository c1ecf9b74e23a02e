import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from torch.nn import functional as F

import hellaswag
from fineweb import UserError, tokenizer

REPOSITORY = Path(__file__).parents[1]
OWN = Path(__file__).parent / "data" / "hellaswag_own.jsonl"
SHARED = REPOSITORY.parent / "shared" / "data" / "hellaswag_val.jsonl"


@pytest.fixture(scope="module")
def tasks():
    return hellaswag.load(OWN)


class CausalMean(torch.nn.Module):
    """A causal stand-in: each position sees the mean of the embeddings up to and including it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(50257, 8)
        self.head = torch.nn.Linear(8, 50257)

    def logits_at(self, tokens, mask):
        count = torch.arange(1, tokens.size(1) + 1)[:, None]
        x = self.embedding(tokens).cumsum(1) / count  # (R, T, 8)
        return self.head(x[mask])


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        yield CausalMean()


def one_at_a_time(logits_at, task):
    """Reference: each of the four rows alone, unpadded, in float64."""
    totals, means = [], []
    for row in task.rows:
        tokens = torch.tensor(row.astype("int64"))[None]
        everywhere = torch.ones_like(tokens[:, :-1], dtype=torch.bool)
        logp = F.log_softmax(logits_at(tokens[:, :-1], everywhere).double(), dim=-1)
        logp = logp.gather(1, tokens[0, 1:, None])[task.start - 1 :]
        totals.append(logp.sum())
        means.append(logp.mean())
    return int(torch.stack(totals).argmax()), int(torch.stack(means).argmax())


def rigged(wanted, dislike=1000.0):
    """logits_at that is indifferent in row `wanted` of each task; in the others it bets on id 0."""

    def logits_at(tokens, mask):
        row = mask.nonzero()[:, 0]
        logits = torch.zeros(len(row), 50257)
        logits[row % 4 != wanted, 0] = dislike  # "!", which no ending here contains
        return logits

    return logits_at


# ---------------------------------------------------------------- tasks


def test_own_tasks_are_varied(tasks):
    assert len(tasks) >= 24
    assert {task.label for task in tasks} == {0, 1, 2, 3}


def test_rows_are_context_then_space_and_ending(tasks):
    first = json.loads(OWN.read_text(encoding="utf-8").splitlines()[0])
    for row, ending in zip(tasks[0].rows, first["endings"], strict=True):
        assert tokenizer().decode(row[: tasks[0].start].tolist()) == first["ctx"]
        assert tokenizer().decode(row[tasks[0].start :].tolist()) == " " + ending


def test_mask_covers_only_the_ending(tasks):
    tokens, targets, mask = hellaswag.collate(tasks, 1024, "cpu")
    assert tokens.shape == targets.shape == mask.shape and tokens.size(1) % 32 == 0
    rows = [(task, row) for task in tasks for row in task.rows]
    for r, (task, row) in enumerate(rows):
        assert targets[r][mask[r]].tolist() == row[task.start :].tolist()
        assert tokens[r, : len(row) - 1].tolist() == row[:-1].tolist()
        assert not tokens[r, len(row) :].any()


def test_long_rows_lose_the_context_not_the_ending(tasks):
    task = max(tasks, key=lambda task: len(task.rows[0]))
    ending = max(len(row) - task.start for row in task.rows)
    tokens, targets, mask = hellaswag.collate([task], ending + 3, "cpu")
    assert tokens.size(1) == ending + 3
    for r, row in enumerate(task.rows):
        assert targets[r][mask[r]].tolist() == row[task.start :].tolist()


def test_ending_longer_than_the_block_keeps_its_last_tokens(tasks):
    tokens, targets, mask = hellaswag.collate(tasks, 4, "cpu")
    assert tokens.shape == (4 * len(tasks), 4)
    endings = [row[task.start :].tolist() for task in tasks for row in task.rows]
    assert [t[m].tolist() for t, m in zip(targets, mask, strict=True)] == [e[-4:] for e in endings]


def test_examples_are_spread_evenly_over_the_file(tasks):
    some = hellaswag.load(OWN, examples=4)
    assert [task.rows[0].tolist() for task in some] == [
        tasks[i].rows[0].tolist() for i in range(0, len(tasks), len(tasks) // 4)
    ]
    assert len(hellaswag.load(OWN, examples=10**6)) == len(tasks)


GOOD = {"ctx": "A man", "endings": ["a.", "b.", "c.", "d."], "label": 1}


@pytest.mark.parametrize(
    "bad",
    [
        '{"ctx": "A man", ',
        '"text"',
        json.dumps(GOOD | {"endings": ["a.", "b.", "c."]}),
        json.dumps(GOOD | {"endings": ["a.", "b.", "c.", 4]}),
        json.dumps(GOOD | {"label": 4}),
        json.dumps(GOOD | {"label": ""}),
        json.dumps(GOOD | {"ctx": ""}),
        json.dumps({"ctx": "A man", "label": 1}),
    ],
)
def test_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"tasks\.jsonl, line 3: expected"):
        hellaswag.load(path)


def test_label_may_be_a_string_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(GOOD | {"label": "2"}) + "\r\n\r\n", encoding="utf-8")
    assert [task.label for task in hellaswag.load(path)] == [2]


def test_missing_and_empty_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        hellaswag.load(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        hellaswag.load(tmp_path / "empty.jsonl")


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the validation tasks at {SHARED}")
def test_all_validation_tasks_load_and_render():
    tasks = hellaswag.load(SHARED)
    assert len(tasks) == 10_042
    assert all(task.label in range(4) and len(task.rows) == 4 for task in tasks)
    assert all(1 <= task.start < len(row) <= 1025 for task in tasks for row in task.rows)


# ---------------------------------------------------------------- scoring


def test_rigged_logits_pick_the_label(tasks):
    for wanted in range(4):
        ours = [task for task in tasks if task.label == wanted]
        counts = hellaswag.evaluate(rigged(wanted), ours, 1024)
        assert counts.tolist() == [len(ours), len(ours), len(ours)]
        counts = hellaswag.evaluate(rigged((wanted + 1) % 4), ours, 1024)
        assert counts.tolist() == [0, 0, len(ours)]


def test_acc_takes_the_sum_and_acc_norm_the_mean(tmp_path):
    long = "walks and walks and walks and walks and walks and walks home."
    path = tmp_path / "tasks.jsonl"
    task = {"ctx": "A man", "endings": ["sits.", long, long, long], "label": 0}
    path.write_text(json.dumps(task), encoding="utf-8")
    # A token costs ln 50257 = 10.8 in row 1 and 12.3 elsewhere; row 0 has 2 of them, the others 13.
    counts = hellaswag.evaluate(rigged(1, dislike=12.0), hellaswag.load(path), 1024)
    assert counts.tolist() == [1, 0, 1]


def test_batched_picks_equal_scoring_one_task_at_a_time(tasks, model):
    expected = {i: one_at_a_time(model.logits_at, task) for i, task in enumerate(tasks)}
    assert len(set(expected.values())) > 4  # not a model that always picks the same
    for batch_rows in (4, 20, 64):
        picks = hellaswag.predictions(model.logits_at, tasks, 1024, batch_rows=batch_rows)
        assert {i: (by_sum, by_mean) for i, by_sum, by_mean in picks} == expected


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_task_is_counted_once_across_ranks(tasks, model, world):
    alone = hellaswag.evaluate(model.logits_at, tasks, 1024, batch_rows=20)
    ranks = [
        list(
            hellaswag.predictions(model.logits_at, tasks, 1024, rank=r, world=world, batch_rows=20)
        )
        for r in range(world)
    ]
    assert sorted(pick[0] for picks in ranks for pick in picks) == list(range(len(tasks)))
    counts = [
        hellaswag.evaluate(model.logits_at, tasks, 1024, rank=r, world=world, batch_rows=20)
        for r in range(world)
    ]
    assert torch.equal(sum(counts), alone)


def test_rank_without_a_batch_counts_nothing(tasks, model):
    counts = hellaswag.evaluate(model.logits_at, tasks[:4], 1024, rank=1, world=2)
    assert counts.tolist() == [0, 0, 0] and counts.dtype == torch.int64


def test_score_adds_ranks_and_gives_binomial_errors(tasks, model):
    one = hellaswag.evaluate(model.logits_at, tasks, 1024)
    twin = SimpleNamespace(device="cpu", rank=0, world=1, sum=lambda counts: 2 * counts)
    scores = hellaswag.score(model.logits_at, tasks, 1024, twin)
    p = one[1].item() / len(tasks)
    assert scores["tasks"] == 2 * len(tasks)
    assert scores["acc_norm"] == pytest.approx(p)
    assert scores["acc_norm_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (2 * len(tasks))))


# ---------------------------------------------------------------- download


class Response:
    """What requests.get gives: chunks of `body`, with an error in their midst if there is one."""

    def __init__(self, body, status=200, error=None):
        self.body, self.status, self.error = body, status, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def raise_for_status(self):
        if self.status != 200:
            raise requests.HTTPError(f"{self.status} for url")

    def iter_content(self, size):
        yield self.body[:7]
        if self.error:
            raise self.error
        yield self.body[7:]


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Serve a response in place of the network; returns the cache path and a list of calls."""
    body = OWN.read_bytes()
    monkeypatch.setattr(hellaswag, "CACHE", tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    monkeypatch.setattr(hellaswag, "SIZE", len(body))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
    calls = []

    def serve(response):
        monkeypatch.setattr(requests, "get", lambda url, **_: calls.append(url) or response)
        return hellaswag.CACHE, calls

    return serve


def test_download_happens_once(download, tasks):
    cache, calls = download(Response(OWN.read_bytes()))
    assert len(hellaswag.load()) == len(hellaswag.load()) == len(tasks)
    assert cache.read_bytes() == OWN.read_bytes() and calls == [hellaswag.URL]


@pytest.mark.parametrize(
    "response",
    [
        Response(OWN.read_bytes()[:-1]),
        Response(OWN.read_bytes()[:-2] + b"x\n"),
        Response(OWN.read_bytes(), status=404),
        Response(OWN.read_bytes(), error=requests.ConnectionError("connection reset")),
    ],
    ids=["cut", "altered", "not found", "reset"],
)
def test_failed_download_leaves_nothing(download, response):
    cache, _ = download(response)
    with pytest.raises(UserError, match="hellaswag_val"):
        hellaswag.load()
    assert list(cache.parent.iterdir()) == []


# ---------------------------------------------------------------- command


def test_help_names_every_option():
    command = [sys.executable, str(REPOSITORY / "hellaswag.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"--{name}" in shown.stdout for name in ("model", "examples", "data", "json"))
