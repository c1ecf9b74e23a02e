import copy
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import TOGGLES
from torch.nn import functional as F

import hellaswag
from common import UserError
from fineweb import tokenizer
from train_gpt2 import GPT, Config

REPOSITORY = Path(__file__).parents[1]
OWN = Path(__file__).parent / "data" / "hellaswag_own.jsonl"
SHARED = REPOSITORY.parent / "shared" / "data" / "hellaswag_val.jsonl"


@pytest.fixture(scope="module")
def tasks():
    return hellaswag.load(OWN)


@pytest.fixture(scope="module", params=TOGGLES.values(), ids=TOGGLES)
def model(request):
    """Untrained but opinionated: a small GPT with ten times the usual weights, float32."""
    torch.manual_seed(1)
    model = GPT(Config(n_layer=2, n_head=2, n_embd=16, block_size=128, **request.param)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model.requires_grad_(False)


def one_at_a_time(model, task):
    """Reference: each of the four rows alone, unpadded, all of its logits, summed in float64."""
    totals, means, by_characters = [], [], []
    for ending, characters in zip(task.endings, task.characters, strict=True):
        row = torch.tensor([task.context + ending])
        logp = F.log_softmax(model(row[:, :-1])[0, :, :50257].double(), dim=-1)
        logp = logp.gather(1, row[0, 1:, None])[len(task.context) - 1 :]
        totals.append(logp.sum())
        means.append(logp.mean())
        by_characters.append(logp.sum() / characters)
    return [int(torch.stack(x).argmax()) for x in (totals, means, by_characters)]


class Fond:
    """Stands for a model to which all ids are alike, but for some that it likes."""

    def __init__(self, ids, much=1000.0):
        self.cfg, self.ids, self.much = Config(), ids, much

    def features(self, tokens, position, mask):
        return tokens[..., None]

    def text_logits(self, x):
        logits = torch.zeros(len(x), 50257)
        logits[:, self.ids] = self.much
        return logits


# ---------------------------------------------------------------- tasks


def test_own_tasks_are_varied(tasks):
    assert len(tasks) >= 24
    assert {task.label for task in tasks} == {0, 1, 2, 3}


def test_endings_follow_their_context_after_a_space(tasks):
    first = json.loads(OWN.read_text(encoding="utf-8").splitlines()[0])
    assert tokenizer().decode(tasks[0].context) == first["ctx"]
    for tokens, ending in zip(tasks[0].endings, first["endings"], strict=True):
        assert tokenizer().decode(tokens) == " " + ending


def collated(tasks, block_size=1024):
    return hellaswag.collate([hellaswag.pack(task, block_size) for task in tasks], "cpu")


def seen_and_predicted(tasks, block_size=1024):
    """Of each ending's tokens: the tokens and positions that the place before it sees, and it."""
    (tokens, position, mask), *scored = collated(tasks, block_size)
    endings = [[] for _ in range(4 * len(tasks))]
    for row, column, target, ending in zip(*(x.tolist() for x in scored), strict=True):
        sees = mask[row, 0, column]
        seen = tokens[row][sees].tolist(), position[row][sees].tolist()
        endings[ending].append((*seen, target))
    return endings


def test_each_token_of_an_ending_is_predicted_from_its_context_and_ending_alone(tasks):
    made = seen_and_predicted(tasks)
    for i, ending in enumerate(ending for task in tasks for ending in task.endings):
        context = tasks[i // 4].context
        rows = [context + ending[:j] for j in range(len(ending))]
        assert made[i] == [
            (row, [*range(len(row))], token) for row, token in zip(rows, ending, strict=True)
        ]


def test_padding_is_to_few_widths_and_sees_something(tasks):
    (tokens, position, mask), *_ = collated(tasks)
    assert tokens.shape == position.shape and mask.shape == (
        *tokens.shape[:1],
        1,
        *[tokens.size(1)] * 2,
    )
    assert tokens.size(1) % 32 == 0
    assert mask.any(-1).all()  # attention of a place that sees nothing would be no number


def test_long_tasks_lose_the_contexts_beginning_for_all_endings_alike(tasks):
    task = max(tasks, key=lambda task: len(task.context))
    longest = max(map(len, task.endings))
    made = seen_and_predicted([task], longest + 3)
    for ending, tokens in zip(made, task.endings, strict=True):
        assert [target for *_, target in ending] == tokens
        assert ending[0][:2] == (task.context[-4:], [0, 1, 2, 3])
    assert max(max(position) for ending in made for _, position, _ in ending) == longest + 2


def test_ending_longer_than_the_block_keeps_its_first_tokens(tasks):
    made = seen_and_predicted(tasks, 4)
    endings = [ending for task in tasks for ending in task.endings]
    assert [[target for *_, target in ending] for ending in made] == [e[:4] for e in endings]
    assert all(max(position) < 4 for ending in made for _, position, _ in ending)


def test_examples_are_spread_evenly_over_the_file(tasks):
    some = hellaswag.load(OWN, examples=4)
    assert some == [tasks[i] for i in range(0, len(tasks), len(tasks) // 4)]
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
        json.dumps(GOOD | {"label": 1.9}),
        json.dumps(GOOD | {"label": float("inf")}),
        json.dumps(GOOD | {"endings": "abcd"}),
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
    assert all(task.label in range(4) and len(task.endings) == 4 for task in tasks)
    assert all(task.context and all(task.endings) for task in tasks)
    assert all(len(task.context) + len(e) <= 1025 for task in tasks for e in task.endings)


# ---------------------------------------------------------------- scoring


def test_characters_are_those_of_the_ending_without_its_space(tasks):
    first = json.loads(OWN.read_text(encoding="utf-8").splitlines()[0])
    assert tasks[0].characters == [len(ending) for ending in first["endings"]]


def test_one_metric_counts_tokens_and_another_characters():
    nll, tokens, characters = torch.tensor([[8.0, 9.0, 10.0, 99.0], [1, 2, 2, 9], [9, 9, 12, 9]])
    assert hellaswag.pick(nll, tokens, characters) == [[0, 1, 2]]


def test_no_task_is_right_of_a_model_whose_output_is_no_number(tasks, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = torch.nan
        assert hellaswag.evaluate(broken, tasks).tolist() == [len(tasks), 0, 0, 0]


def test_the_likeliest_ending_is_picked(tasks):
    for task in tasks:
        for wanted in range(4):
            counts = hellaswag.evaluate(Fond(task.endings[wanted]), [task])
            right = int(wanted == task.label)
            assert counts.tolist() == [1, right, right, right]


def test_acc_takes_the_sum_and_acc_norm_the_mean(tmp_path):
    long = "walks and walks and walks and walks and walks and walks home."
    path = tmp_path / "tasks.jsonl"
    task = {"ctx": "A man", "endings": ["sits.", long, long, long], "label": 0}
    path.write_text(json.dumps(task), encoding="utf-8")
    tasks = hellaswag.load(path)
    # A token of the long endings costs 8.8, another ln 50257 = 10.8: "sits." has one of each.
    counts = hellaswag.evaluate(Fond(tasks[0].endings[1], much=2.0), tasks)
    assert counts.tolist() == [1, 1, 0, 0]


def test_batched_picks_equal_scoring_one_task_at_a_time(tasks, model):
    expected = {i: one_at_a_time(model, task) for i, task in enumerate(tasks)}
    assert len(set(map(tuple, expected.values()))) > 4  # no model that always picks the same
    for batch_tokens in (1, 500, 4096):
        picks = hellaswag.predictions(model, tasks, batch_tokens=batch_tokens)
        assert dict(picks) == expected


def test_batched_picks_of_a_trained_model_are_those_of_one_task_at_a_time(tasks, tiny_run, train):
    cfg = replace(tiny_run, vocab_size=50304, n_embd=16, block_size=128, total_batch_size=512)
    folder, log = train(replace(cfg, max_steps=20))
    assert log["train"][19] < log["train"][0] - 1
    model = GPT.from_checkpoint(folder / "step_000020.pt")
    with torch.no_grad():
        expected = {i: one_at_a_time(model, task) for i, task in enumerate(tasks)}
        assert dict(hellaswag.predictions(model, tasks)) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_task_is_counted_once_across_ranks(tasks, model, world):
    how = dict(world=world, batch_tokens=500)
    ranks = [list(hellaswag.predictions(model, tasks, rank=r, **how)) for r in range(world)]
    assert sorted(pick[0] for picks in ranks for pick in picks) == list(range(len(tasks)))
    counts = [hellaswag.evaluate(model, tasks, rank=r, **how) for r in range(world)]
    assert torch.equal(sum(counts), hellaswag.evaluate(model, tasks, batch_tokens=500))


def test_rank_without_a_batch_counts_nothing(tasks, model):
    counts = hellaswag.evaluate(model, tasks[:4], rank=1, world=2)
    assert counts.tolist() == [0, 0, 0, 0] and counts.dtype == torch.int64


def test_score_adds_ranks_and_gives_binomial_errors(tasks, model):
    one = hellaswag.evaluate(model, tasks)
    twin = SimpleNamespace(device="cpu", rank=0, world=1, sum=lambda counts: 2 * counts)
    scores = hellaswag.score(model, tasks, twin)
    p = one[2].item() / len(tasks)
    assert scores["tasks"] == 2 * len(tasks)
    right = dict(zip(("acc", "acc_norm", "acc_norm_chars"), one[1:].tolist(), strict=True))
    assert {key: scores[key] * len(tasks) for key in right} == pytest.approx(right)
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


def test_in_training_one_rank_downloads_for_all(download, runtime):
    _, calls = download(Response(OWN.read_bytes()))
    runtime.rank, runtime.world, runtime.sum = 1, 2, lambda ready: 2 * ready
    runtime.agree = lambda decide: OWN  # what rank 0 has found
    assert hellaswag.shared("", 4, runtime) == hellaswag.load(OWN, 4)
    assert calls == []


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


def test_server_that_does_not_answer_is_not_waited_for(download, monkeypatch):
    download(None)

    def get(url, timeout=None, **_):
        assert timeout and timeout <= 60  # seconds: without it, requests waits for ever
        raise requests.Timeout("no answer")

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(UserError, match="could not fetch HellaSwag"):
        hellaswag.load()


# ---------------------------------------------------------------- command


def test_help_names_every_option():
    command = [sys.executable, str(REPOSITORY / "hellaswag.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"--{name}" in shown.stdout for name in ("model", "examples", "data", "json"))


def test_fewer_examples_than_none_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--model=x", "--examples=-1"])
    with pytest.raises(UserError, match="--examples=-1 is not possible: 0 scores all"):
        hellaswag.main()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run hellaswag.py in this process on a small model and the tests' own tasks."""
    model = GPT(Config(n_layer=1, n_head=1, n_embd=8, block_size=64))
    content = {"model": model.state_dict(), "config": asdict(model.cfg)}
    torch.save(content, tmp_path / "best.pt")

    def run(*flags):
        words = [f"--model={tmp_path / 'best.pt'}", f"--data={OWN}", "--device=cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *words])
        hellaswag.main()

    return run


@pytest.mark.parametrize(("flags", "count"), [(["--examples=8"], 8), ([], None)])
def test_as_many_tasks_are_scored_as_asked_for(command, tasks, tmp_path, capsys, flags, count):
    command(*flags, "--dtype=float32", f"--json={tmp_path / 'scores.json'}")
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    model = GPT.from_checkpoint(tmp_path / "best.pt")
    with torch.no_grad():
        some = hellaswag.load(OWN, count) if count else tasks
        n, *right = hellaswag.evaluate(model, some).tolist()
    assert n == scores["tasks"] == (count or len(tasks))
    assert [scores[name] * n for name in hellaswag.METRICS] == pytest.approx(right)
    assert capsys.readouterr().out.startswith(f"HellaSwag, {n} tasks in ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_command_scores_in_the_dtype_asked_for_without_gradients(command, monkeypatch, dtype):
    seen, score = [], hellaswag.score

    def looked_at(model, tasks, runtime):
        product = model.lm_head(torch.ones(1, model.cfg.n_embd))
        seen.append((product.dtype, product.requires_grad, model.training))
        return score(model, tasks, runtime)

    monkeypatch.setattr(hellaswag, "score", looked_at)
    command("--examples=1", f"--dtype={str(dtype).removeprefix('torch.')}")
    assert seen == [(dtype, False, False)]


def test_json_that_cannot_be_written_is_refused_before_hours_of_scoring(command, monkeypatch):
    monkeypatch.setattr(hellaswag, "score", lambda *_: pytest.fail("scored"))
    with pytest.raises(UserError, match="is a folder: name a file"):
        command(f"--json={OWN.parent}")


def test_lack_of_memory_is_one_line_that_says_what_helps(command, monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hellaswag, "score", short)
    with pytest.raises(UserError, match=r"^hellaswag\.py is out of memory: take --device=cpu, or"):
        command()


@pytest.mark.slow
def test_two_ranks_report_once(tmp_path, run_cli):
    model = GPT(Config(n_layer=1, n_head=1, n_embd=8, block_size=64))
    content = {"model": model.state_dict(), "config": asdict(model.cfg)}
    torch.save(content, tmp_path / "best.pt")
    options = ["--model=best.pt", f"--data={OWN}", "--json=scores.json", "--dtype=float32"]
    told = []
    for ranks in (1, 2):
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        done = run_cli("hellaswag.py", *options, launcher=torchrun)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("acc_norm_chars") == done.stdout.count("wrote ") == 1
        told.append(json.loads((tmp_path / "scores.json").read_text(encoding="utf-8")))
    assert told[0] == told[1]
