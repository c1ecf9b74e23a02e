import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bench
import fineweb
import train_gpt2 as gpt
from fineweb import UserError

TASKS = Path(__file__).parent / "data" / "hellaswag_own.jsonl"
TINY_MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=128", "--device=cpu"]
VERSIONS = {"bench", "threads", "cores", "machine", "python", "torch", "numpy", "tiktoken"}


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Run a bench in this process; returns what it wrote as JSON."""

    def run(name, *options):
        path = tmp_path / "figures" / "bench.json"
        monkeypatch.setattr(sys, "argv", ["bench.py", name, *options, f"--json={path}"])
        bench.main()
        written = json.loads(path.read_text(encoding="utf-8"))
        assert written["bench"] == name and set(written) >= VERSIONS
        return written

    return run


def flags(cfg):
    return [f"--{key}={value}" for key, value in asdict(cfg).items()]


def assert_positive(written, *keys):
    assert {key: written[key] for key in keys if not written[key] > 0} == {}


# ---------------------------------------------------------------- commands


def test_no_command_lists_them_all_and_fails(run_cli):
    done = run_cli("bench.py")
    assert done.returncode == 2
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")]
    assert listed[-5:] == ["train", "loader", "tokenize", "hellaswag", "sample"]


@pytest.mark.parametrize("name, code", [("fly", 2), ("--help", 0), ("-h", 0)])
def test_only_asking_for_help_succeeds_without_a_command(name, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", name])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == code and "tokenize" in capsys.readouterr().out


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_help_names_the_command_s_own_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    assert all(f"--{key}" in helped for key in bench.COMMANDS[name][1].__dataclass_fields__)


@pytest.mark.parametrize("name, option", [("train", "steps"), ("sample", "rounds")])
def test_zero_timings_are_refused_by_name(name, option, figures):
    with pytest.raises(UserError, match=f"{option}=0 must be 1 or more"):
        figures(name, f"--{option}=0")


def test_json_holds_what_the_table_shows(capsys, tmp_path):
    path = tmp_path / "new" / "x.json"
    figures = {"bench": "x", "rate": 1234.56, "small": 0.0012345, "n": 7, "mfu": None, "same": True}
    bench.report(dict(figures), path)
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    written = json.loads(path.read_text())
    assert written | figures == written and set(written) == set(table) - {"wrote"}
    shown = [table[key] for key in figures]
    assert shown == ["x", "1,235", "0.001234", "7", "unknown", "True"]


# ---------------------------------------------------------------- timing


def test_sides_take_turns():
    calls = []
    sides = {side: lambda side=side: calls.append(side) or len(calls) for side in "ab"}
    seconds, results = bench.take_turns(sides, 3)
    assert calls == list("ababab") and results == {"a": 5, "b": 6}
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_ratio_is_the_median_over_pairs():
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 16.0], "others": [1.0, 1.0, 1.0]}
    assert bench.compare(seconds, 8, "rows") == {
        "ours_rows_per_s": 4.0, "theirs_rows_per_s": 4.0, "others_rows_per_s": 8.0,
        "ratio_to_theirs": 2.0, "ratio_to_others": 0.5,
    }  # fmt: skip


def test_waiting_for_data_is_what_the_iterator_takes():
    def slow():
        for item in "abc":
            time.sleep(0.01)
            yield item

    waits = []
    batches = bench.timed(slow(), waits)
    assert [next(batches) for _ in range(3)] == list("abc")
    assert len(waits) == 3 and min(waits) >= 0.009


# ---------------------------------------------------------------- training and its data


def test_timed_steps_are_those_of_training(figures, tiny_run, train):
    _, streams = train(tiny_run)
    written = figures("train", *flags(tiny_run), f"--steps={tiny_run.max_steps - 1}")
    assert written["last_loss"] == streams["train"][tiny_run.max_steps - 1]
    assert written["data"] == tiny_run.data_dir
    assert written["tokens_per_step"] == 128 and written["batch"] == "4 x 16 x 2 micro-steps"
    times = ("step_s_p10", "step_s_median", "step_s_p90", "first_step_s", "tokens_per_s")
    assert_positive(written, *times, "data_wait_s_per_step")
    assert written["step_s_p10"] <= written["step_s_median"] <= written["step_s_p90"]
    assert written["tokens_per_s"] == pytest.approx(128 / written["step_s_median"])
    assert written["mfu"] is None and written["compiled"] is False
    assert not (Path(tiny_run.log_dir) / "bench").exists()


@pytest.mark.parametrize("name", ["train", "loader"])
def test_random_tokens_stand_in_for_shards_and_go_again(name, figures, tiny, monkeypatch, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    missing = str(tmp_path / "missing")
    options = ["--tokens=5000", "--steps=2", f"--data_dir={missing}"]
    written = figures(name, *flags(tiny), *options)
    assert written["data"] == f"random tokens: {missing}/ holds no shards"
    assert_positive(written, "tokens_per_s")
    assert list(temporary.iterdir()) == []


def test_loader_is_set_beside_what_training_needs(figures, tiny_run):
    written = figures("loader", *flags(tiny_run), "--steps=5")
    assert written["tokens"] == 2077 and written["batch"] == "4 x 16"
    assert_positive(written, "start_up_s", "batch_s_median", "15,000,000M_tokens_batch_s")
    rate = written["needed_tokens_per_s"] / written["share_of_a_step"]
    assert rate == pytest.approx(written["tokens_per_s"])
    memory = [v for key, v in written.items() if key.endswith("_start_up_mib")]
    assert len(memory) == 4 and max(memory) < 4


@pytest.mark.slow
def test_two_ranks_report_once(run_cli, tiny_run, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    path = tmp_path / "two.json"
    options = [*flags(tiny_run), "--steps=3", f"--json={path}"]
    done = run_cli("bench.py", "train", *options, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens_per_step") == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["ranks"] == 2 and written["batch"] == "4 x 16 x 1 micro-steps"


# ---------------------------------------------------------------- tokenizing


def test_tokenizers_write_the_same_shards(figures, tmp_path):
    texts = [f"Document {i} counts: {list(range(i, i + 50))}, naïve café." for i in range(400)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    written = figures("tokenize", f"--input={path}", "--rounds=1", "--processes=1")
    assert written["tokens"] == len(fineweb.encode(texts))
    assert written["mb"] == pytest.approx(sum(len(text.encode()) for text in texts) / 1e6)
    assert written["same_shards"] is True
    assert_positive(written, "tiktoken_mb_per_s", "tiktoken_tokens_per_s")
    if importlib.util.find_spec("gigatoken"):
        assert_positive(written, "gigatoken_mb_per_s", "ratio_to_tiktoken")


def test_tokenizing_too_little_is_told_in_fineweb_s_words(figures, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short to cut a validation shard from")
    with pytest.raises(UserError, match="too few") as told:
        figures("tokenize", f"--input={path}", "--rounds=1", "--processes=1")
    assert len(str(told.value).splitlines()) <= 2


@pytest.mark.slow
def test_python_docs_are_tokenized_by_default(figures):
    written = figures("tokenize", "--rounds=1")
    assert written["data"] == "python-docs" and written["tokens"] > 100_000
    assert written["same_shards"] is True


# ---------------------------------------------------------------- HellaSwag and sampling


def test_batched_predictions_are_those_of_one_task_at_a_time(figures):
    options = [f"--data={TASKS}", "--examples=6", "--rounds=1", "--dtype=float32"]
    written = figures("hellaswag", *TINY_MODEL, *options)
    assert written["tasks"] == written["tasks_that_agree"] == 6
    rates = ("batched_tasks_per_s", "one_at_a_time_tasks_per_s", "ratio_to_one_at_a_time")
    assert_positive(written, *rates)


def test_every_sample_of_the_batch_counts(figures, monkeypatch):
    def two_seconds(sides, rounds):
        return {name: [2.0] * rounds for name in sides}, {
            name: call() for name, call in sides.items()
        }

    monkeypatch.setattr(bench, "take_turns", two_seconds)
    options = ["--max_new_tokens=5", "--batch=3", "--rounds=1", "--dtype=float32"]
    written = figures("sample", *TINY_MODEL, *options)
    assert written["model"].startswith("untrained, n_layer 1, n_head 2")
    assert written["new_tokens"] == 5 and written["ratio_to_uncached"] == 1.0
    assert written["cached_tokens_per_s"] == written["uncached_tokens_per_s"] == 3 * 5 / 2


def test_both_sides_of_sampling_are_timed(figures):
    written = figures("sample", *TINY_MODEL, "--max_new_tokens=5", "--rounds=2")
    rates = ("cached_tokens_per_s", "uncached_tokens_per_s", "ratio_to_uncached")
    assert_positive(written, *rates)


def test_a_checkpoint_can_be_timed(figures, tiny_run, train):
    folder, _ = train(tiny_run)
    checkpoint = str(folder / "step_000008.pt")
    written = figures("sample", f"--model={checkpoint}", "--max_new_tokens=4", "--rounds=1")
    assert written["model"] == checkpoint
    assert written["parameters"] == sum(
        p.numel() for p in gpt.GPT.from_checkpoint(checkpoint).parameters()
    )


def test_both_sides_of_sampling_draw_the_same_tokens(tiny, toggles, make_model):
    model = make_model(replace(tiny, **toggles))
    idx, how = torch.tensor([[3, 1], [4, 1]]), gpt.Sampling(top_k=50)

    def sample(generate):
        return torch.cat(list(generate(model, idx, 14, how, torch.Generator().manual_seed(1))), 1)

    assert torch.equal(sample(gpt.generate), sample(bench.generate_uncached))
