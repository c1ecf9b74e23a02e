import gzip
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from preparing import bin_bytes

import bench
import fineweb
import train_gpt2 as gpt
from common import UserError, command_line

TASKS = Path(__file__).parent / "data" / "hellaswag_own.jsonl"
TINY_MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=128", "--device=cpu"]
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
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


def test_json_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "open_model", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "sample", f"--json={tmp_path}"])
    with pytest.raises(UserError, match="is a folder: name a file"):
        bench.main()


def flags(cfg):
    return flags_of(asdict(cfg))


def flags_of(keys):
    return [f"--{key}={value}" for key, value in keys.items()]


def assert_positive(written, *keys):
    assert {key: written[key] for key in keys if not written[key] > 0} == {}


# ---------------------------------------------------------------- commands


def test_no_command_lists_them_all_and_fails(run_cli):
    done = run_cli("bench.py")
    assert done.returncode == 2
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")]
    assert listed[-8:] == list(bench.COMMANDS)


@pytest.mark.parametrize("name, code", [("--fly", 2), ("--help", 0), ("-h", 0)])
def test_only_asking_for_help_succeeds_without_a_command(name, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", name])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == code and "tokenize" in capsys.readouterr().out


def test_unknown_command_is_told_which_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "fly"])
    with pytest.raises(UserError, match="fly is none of train, memory"):
        bench.main()


@pytest.mark.parametrize("name", ["memory", "precision", "tokenize", "hellaswag", "sample", "all"])
def test_what_is_measured_by_one_process_refuses_torchrun(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["bench.py", name])
    with pytest.raises(
        UserError, match=f"bench.py {name} runs as one process: .* without torchrun"
    ):
        bench.main()


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


def test_json_holds_what_the_table_shows(capsys, monkeypatch, tmp_path):
    path = tmp_path / "new" / "x.json"
    figures = {"rate": 1234.56, "small": 0.0012345, "n": 7, "mfu": None, "same": True}
    figures["parts"] = {"a": 2.5, "b": "word"}
    monkeypatch.setattr(bench, "bench_sample", lambda options: figures)
    monkeypatch.setitem(bench.COMMANDS, "sample", (bench.bench_sample, bench.SampleOptions))
    monkeypatch.setattr(sys, "argv", ["bench.py", "sample", f"--json={path}"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines if line != "parts")
    written = json.loads(path.read_text())
    assert written | figures == written
    assert set(written) | {"a", "b"} == set(table) - {"wrote"} | {"bench", "parts"}
    shown = [table[key] for key in ("rate", "small", "n", "mfu", "same", "a", "b")]
    assert shown == ["1,235", "0.001234", "7", "unknown", "True", "2.5", "word"]


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
    written = figures("train", *flags(tiny_run), f"--steps={tiny_run.max_steps - 2}")
    assert written["last_loss"] == streams["train"][tiny_run.max_steps - 1]
    assert written["data"] == tiny_run.data_dir
    assert written["tokens_per_step"] == 128 and written["batch"] == "4 x 16 x 2 micro-steps"
    times = ("step_s_p10", "step_s_median", "step_s_p90", "first_step_s", "tokens_per_s")
    assert_positive(written, *times, "data_wait_s_per_step")
    assert written["step_s_p10"] <= written["step_s_median"] <= written["step_s_p90"]
    assert written["tokens_per_s"] == pytest.approx(128 / written["step_s_median"])
    assert written["mfu"] is None and written["compiled"] is False
    assert not (Path(tiny_run.log_dir) / "bench").exists()


# What a peer trains is worth comparing only if it is the same: loss, gradients and steps.
GPT2_IDS = dict(vocab_size=50304, n_embd=16)  # transformers' peer has GPT-2's vocabulary


LLAMA = dict(mlp="swiglu", norm="rmsnorm", bias=False, pos_embedding="rope")


@pytest.mark.parametrize(
    "name, keys",
    [("plain", {}), ("transformers", GPT2_IDS), ("transformers", LLAMA | GPT2_IDS)],
)
def test_a_peer_computes_the_same_loss_and_gradients(name, keys, tiny, make_model):
    model = make_model(replace(tiny, **keys)).train()
    idx = torch.randint(512, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    peer = bench.PEERS[name](model)
    losses = model(inputs, targets), peer(inputs, targets)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    # the token embedding's depends on the gradients of all that is above it
    wte = [torch.autograd.grad(loss, next(side.parameters()))[0]
           for loss, side in zip(losses, (model, peer), strict=True)]  # fmt: skip
    torch.testing.assert_close(*wte, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ours", "plain", "transformers"])
def test_each_side_compiles_to_one_graph(name, tiny, make_model):
    model = make_model(replace(tiny, **GPT2_IDS)).train()
    side = bench.PEERS.get(name, lambda model: model)(model)
    idx = torch.zeros(2, 16, dtype=torch.long)
    assert torch.compile(side, backend="eager", fullgraph=True)(idx, idx).isfinite()


@pytest.mark.parametrize("name", ["plain", "transformers"])
def test_a_peer_takes_the_same_steps_beside_ours(name, figures, tiny, tmp_path):
    cfg = replace(tiny, **GPT2_IDS, data_dir=str(tmp_path / "missing"), max_steps=20)
    written = figures("train", *flags(cfg), "--tokens=200", "--steps=4", f"--against={name}")
    assert written[f"{name}_last_loss"] == pytest.approx(written["last_loss"], rel=1e-5)
    assert written["last_loss"] < 10.8
    times = ("step_s_median", "tokens_per_s", "first_step_s", "peak_memory_gib")
    assert_positive(written, f"ratio_to_{name}", *times, *(f"{name}_{key}" for key in times))


@pytest.mark.parametrize("name, keys, reason", [
    ("plain", ["--qk_norm=True", "--mlp=relu2"], "no mlp=relu2, qk_norm=True"),
    ("transformers", ["--logit_softcap=5"], "has no logit_softcap=5.0"),
    ("transformers", ["--bias=False"], "GPT2LMHeadModel has no bias=False"),
    ("transformers", ["--qkv_bias=False"], "GPT2LMHeadModel has no qkv_bias=False"),
    ("transformers", [*flags_of(LLAMA), "--dropout=0.1"], "LlamaForCausalLM has no dropout=0.1"),
])  # fmt: skip
def test_a_peer_of_another_architecture_is_refused(name, keys, reason, figures, tmp_path):
    with pytest.raises(UserError, match=f"against={name}.*{reason}$"):
        figures("train", *keys, f"--against={name}", f"--data_dir={tmp_path}", *TINY_MODEL)


@pytest.mark.parametrize("words, told", [
    (["train", "--against=plain", "--gradient_checkpointing=True"], "has neither gradient_check"),
    (["train", "--against=plain", "--dtype=float16"], "has neither .* dtype=float16"),
    (["train", "--resume=True"], "leave resume and check out"),
    (["train", "--check"], "leave resume and check out"),
    (["train", f"--profile={TASKS}"], "profile=.*cannot be created"),
    (["memory", "--init_from=gpt2"], "of new models"),
    (["sample", "--compile_step=True"], "compile_step is for CUDA"),
])  # fmt: skip
def test_what_cannot_be_measured_is_told_at_once(words, told, figures):
    with pytest.raises(UserError, match=told):
        figures(*words, *TINY_MODEL)


def test_out_of_memory_is_told_in_a_line(monkeypatch, figures):
    def too_much(options):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(bench.COMMANDS, "sample", (too_much, bench.SampleOptions))
    with pytest.raises(UserError, match="sample is out of memory: halve"):
        figures("sample")


def test_weights_of_a_compiled_step_are_cast_once(tiny):
    model = gpt.GPT(tiny)
    idx = torch.arange(8)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.text_logits(model.features(idx))
        cast = bench.weights_in(torch.bfloat16, model)
        logits = cast.text_logits(cast.features(idx))
    assert cast.lm_head.weight is cast.transformer.wte.weight
    linear = [part for part in cast.modules() if isinstance(part, torch.nn.Linear)]
    assert len(linear) > 4 and {part.weight.dtype for part in linear} == {torch.bfloat16}
    assert cast.transformer.ln_f.weight.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.02)


def test_peers_are_not_for_several_ranks(run_cli):
    done = run_cli("bench.py", "train", "--against=plain", "--device=cpu", launcher=TWO_RANKS)
    assert done.returncode and "against=plain compares on one rank" in done.stderr


def test_peak_memory_counts_what_is_held_at_once(runtime):
    torch.zeros(1000)
    kept = []
    with bench.watch_memory(runtime) as peak:
        kept.append(torch.zeros(1000))
        for _ in range(3):
            torch.zeros(5000)
    assert peak == [4 * 6000]


def test_a_profile_leaves_a_trace_and_the_longest_operators(figures, tiny_run, tmp_path):
    folder = tmp_path / "profile"
    written = figures("train", *flags(tiny_run), "--steps=1", f"--profile={folder}")
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    operators = written["operators_ms"]
    assert "aten::mm" in operators and "aten::mm" in names
    assert list(operators.values()) == sorted(operators.values(), reverse=True)
    assert "aten::mm" in (folder / "operators.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_foretold_from_small_models(figures, tiny, tmp_path, checkpointing):
    cfg = replace(tiny, n_layer=5, vocab_size=2048, gradient_checkpointing=checkpointing)
    cfg = replace(cfg, data_dir=str(tmp_path), block_size=64, n_embd=64)
    options = [*flags(cfg), "--tokens=5000", "--cards", "1", "2", "--reserve=0.995"]
    written = figures("memory", *options)
    assert written["predicted_over_measured"] == pytest.approx(1, abs=0.15)
    more = replace(cfg, micro_batch_size=6, grad_accum_steps=2)
    found = figures("train", *flags(more), "--tokens=5000", "--steps=1")["peak_memory_gib"]
    parts = ("activations_gib_per_sequence", "logits_gib_per_sequence")
    assert_positive(written, "weights_gib", *parts)
    foretold = written["weights_gib"] + 6 * sum(written[key] for key in parts)
    assert foretold == pytest.approx(found, rel=0.15)
    assert written["card_2_gib"].startswith("64 sequences")


def test_a_card_too_small_is_told(figures, tiny, tmp_path):
    options = [*flags(replace(tiny, data_dir=str(tmp_path))), "--tokens=5000"]
    assert figures("memory", *options, "--cards", "1", "--reserve=1")["card_1_gib"] == "too little"


def test_precision_is_the_difference_to_float32(figures, tiny_run):
    written = figures("precision", *flags(replace(tiny_run, dtype="bfloat16")), "--steps=4")
    assert 0 < abs(written["difference"]) < 0.05
    assert written["difference"] == written["as_configured"] - written["float32"]
    assert abs(figures("precision", *flags(tiny_run), "--steps=4")["difference"]) < 1e-6


# ---------------------------------------------------------------- all of them


def options_of(command):
    """A part's script and what it is given; UserError or SystemExit if that is no command."""
    words = [word for word in command.split() if not word.isupper()]
    while "=" in words[0]:
        del words[0]
    script, *argv = words
    if script == "fineweb.py":
        return script, command_line(fineweb.Options, "", argv)
    if script == "train_gpt2.py":
        return script, gpt.load_config(argv)[0]
    name, *argv = argv
    kind = bench.COMMANDS[name][1]
    if issubclass(kind, gpt.Config):
        return script, gpt.load_config(argv, kind)[0]
    return script, command_line(kind, "", argv)


@pytest.mark.parametrize("values", [bench.FULL, bench.REHEARSAL], ids=["full", "rehearsal"])
@pytest.mark.parametrize("name", bench.PARTS)
def test_each_part_is_a_command(name, values, monkeypatch):
    monkeypatch.chdir(Path(bench.__file__).parent)
    script, options = options_of(
        bench.PARTS[name].format(**values, folder="/tmp/x", trace="x", data="")
    )
    assert Path(script).exists() and options
    if values is bench.FULL and name in ("plain", "transformers", "base", "memory"):
        assert (options.n_layer, options.n_embd) == (12, 768)


def test_parts_that_fail_or_take_too_long_leave_the_others_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "PARTS", {
        "fails": "train_gpt2.py --n_embd=7",
        "sample": "OMP_NUM_THREADS=1 bench.py sample {model} --max_new_tokens=2 --rounds=1",
        "never_ends": "train_gpt2.py configs/tiny.toml --log_dir={folder} --data_dir={data}",
        "too_late": "bench.py sample",
    })  # fmt: skip
    path = tmp_path / "all.json"
    argv = ["all", "--small=True", "--minutes=0.5", f"--data={tmp_path}", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    waiting = subprocess.run

    def run(command, timeout, **how):
        if "configs/tiny.toml" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return waiting(command, timeout=timeout, **how)

    monkeypatch.setattr(subprocess, "run", run)
    clock = iter([0, 1, 1, 2, 2, 3, 10, 10, 11, 29.5])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert "n_embd=7 is not a multiple" in written["fails"]["error"]
    assert written["sample"]["cached_tokens_per_s"] > 0 and written["sample"]["threads"] == 1
    assert written["never_ends"] == {"not_done": "stopped after 20 s"}
    assert written["too_late"] == {"not_done": "no time was left"}
    assert written["failed"] == ["fails"] and set(written) >= VERSIONS
    assert written["left_out"] == ["never_ends", "too_late"]
    assert "n_embd=7" in capsys.readouterr().out


def test_parts_can_be_chosen_and_are_checked(figures, monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "run_part", lambda command, *_: ran.append(command) or {})
    assert {"xl", "docs"} <= figures("all", "--parts", "xl", "docs").keys()
    assert ["gpt2_xl" in ran[0], "python-docs" in ran[1], len(ran)] == [True, True, 2]
    with pytest.raises(UserError, match=r"parts=fly is none of docs, plain"):
        figures("all", "--parts", "fly")


@pytest.mark.slow
def test_a_rehearsal_of_all_leaves_every_part_s_figures(run_cli, tmp_path):
    path = tmp_path / "all.json"
    argv = ["all", "--small=True", "--minutes=15", f"--data={TASKS}", f"--json={path}"]
    assert run_cli("bench.py", *argv, seconds=900).returncode == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["failed"] == [] and set(written) >= set(bench.PARTS)
    assert {name for name in bench.PARTS if "not_done" in written[name]} == set()


@pytest.mark.parametrize("name", ["train", "loader"])
def test_random_tokens_stand_in_for_shards_and_go_again(name, figures, tiny, monkeypatch, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # else there, too
    missing = str(tmp_path / "missing")
    options = ["--tokens=5000", "--steps=2", f"--data_dir={missing}"]
    written = figures(name, *flags(tiny), *options)
    assert written["data"] == f"random tokens: {missing}/ holds no shards"
    assert_positive(written, "tokens_per_s")
    assert list(temporary.iterdir()) == []


def test_shards_of_llm_c_are_data_too(tiny, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"tiny_shakespeare_{split}.bin").write_bytes(bin_bytes(range(500)))
    with bench.training_data(replace(tiny, data_dir=str(tmp_path))) as (_, data):
        assert data == str(tmp_path)


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
    path = tmp_path / "two.json"
    options = [*flags(tiny_run), "--steps=3", f"--json={path}"]
    done = run_cli("bench.py", "train", *options, launcher=TWO_RANKS)
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
    alone = figures("hellaswag", *TINY_MODEL, *options, "--against=none")
    assert_positive(alone, "seconds", "batched_tasks_per_s")
    assert not alone.keys() & {"tasks_that_agree", *rates[1:]}


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
