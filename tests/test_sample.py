import contextlib
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import hellaswag
import sample
from common import UserError
from fineweb import END_OF_TEXT, tokenizer
from plots import attention
from sample import Options, sampling, stream
from train_gpt2 import GPT, Config, KVCache, Sampling, complete, next_logits

OWN_TASKS = Path(__file__).parent / "data" / "hellaswag_own.jsonl"


@pytest.fixture
def model(tiny, make_model):
    return make_model(replace(tiny, vocab_size=50304))


@pytest.fixture
def write_tokens(monkeypatch):
    """Have `generate` yield these tokens, whatever the model."""

    def write(tokens):
        steps = [torch.tensor([[token]]) for token in tokens]
        monkeypatch.setattr(sample, "generate", lambda *_: iter(steps))

    return write


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, model):
    """Run sample.py in this process on the checkpoint of `model`; returns what it prints."""
    path = tmp_path / "best.pt"
    torch.save({"model": model.state_dict(), "config": asdict(model.cfg)}, path)

    def run(*flags):
        flags = [f"--model={path}", "--max_new_tokens=8", "--dtype=float32", *flags, "--device=cpu"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        sample.main()
        return capsys.readouterr().out

    return run


# ---------------------------------------------------------------- presets and flags


def test_presets_are_what_the_documentation_says():
    how = {name: sampling(Options(model="", preset=name)) for name in sample.PRESETS}
    assert how == {
        "conservative": Sampling(temperature=0.6, top_k=40),
        "nucleus": Sampling(temperature=0.8, top_p=0.9),
        "greedy": Sampling(temperature=0),
    }
    assert sampling(Options(model="")) == how["nucleus"]


def test_a_flag_overrides_its_field_of_the_preset_alone():
    how = sampling(Options(model="", preset="conservative", top_k=0, repetition_penalty=1.2))
    assert how == Sampling(temperature=0.6, top_k=0, repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("repetition_penalty", 0.0),
        ("max_new_tokens", 0), ("num_samples", 0), ("seed", -1), ("seed", 2**63),
        ("num_samples", 2**31), ("max_new_tokens", 2**31),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name_and_value(field, value):
    with pytest.raises(UserError, match=f"{field}={value} .* must be "):
        sampling(Options(model="", **{field: value}))


def test_values_are_checked_before_the_model_is_read(run_cli):
    done = run_cli("sample.py", "--model=nowhere.pt", "--top_p=0")
    assert done.returncode == 2
    assert "top_p=0" in done.stderr
    assert "nowhere" not in done.stderr + done.stdout


# ---------------------------------------------------------------- streaming


def test_characters_split_over_tokens_are_printed_whole(model, write_tokens):
    text = "naïve 你好 🎉 end"
    tokens = tokenizer().encode_ordinary(text)
    assert any("�" in tokenizer().decode([token]) for token in tokens)
    write_tokens(tokens)
    pieces = list(stream(model, "", Sampling(), len(tokens), seed=0))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_shown_as_such(model, write_tokens):
    tokens = tokenizer().encode_ordinary("a 🎉")[:-1]
    write_tokens(tokens)
    assert "".join(stream(model, "", Sampling(), 8, seed=0)) == "a �"


def test_the_end_of_a_document_is_not_printed(model, write_tokens):
    write_tokens([*tokenizer().encode_ordinary("The end"), END_OF_TEXT])
    assert "".join(stream(model, "", Sampling(), 8, seed=0)) == "The end"


@pytest.mark.parametrize("prompt", ["The cat", ""])
def test_streamed_text_equals_complete(model, prompt):
    how = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    pieces = stream(model, prompt, how, 24, seed=5)
    assert "".join(pieces) == complete(model, prompt, how, max_new_tokens=24, seed=5)[0]


# ---------------------------------------------------------------- the command


def test_command_prints_the_prompt_and_its_continuation(command, model):
    [text] = complete(model, "The cat", Sampling(temperature=0), max_new_tokens=8)
    assert command("--prompt=The cat", "--preset=greedy") == f"The cat{text}\n"


def test_the_seed_decides_what_is_sampled_and_greedy_ignores_it(command):
    def run(*flags):
        return command("--prompt=The cat", *flags)

    assert run("--seed=1") == run("--seed=1") != run("--seed=2")
    assert run("--seed=1", "--preset=greedy") == run("--seed=2", "--preset=greedy")


def test_several_samples_are_printed_whole_under_a_rule_each(command, model):
    texts = complete(model, "The cat", sample.PRESETS["nucleus"], 3, 8, seed=7)
    rules = [f"---- {i} of 3 ".ljust(72, "-") for i in (1, 2, 3)]
    expected = "".join(f"{rule}\nThe cat{text}\n" for rule, text in zip(rules, texts, strict=True))
    assert command("--prompt=The cat", "--num_samples=3", "--seed=7") == expected
    assert len(set(texts)) == 3


@pytest.mark.parametrize("end", ["", EOFError(), RuntimeError("input(): lost sys.stdin")])
def test_interactive_continues_each_prompt_until_an_empty_one_or_the_end(command, monkeypatch, end):
    typed = iter(["The cat", "The dog", end, "never read"])

    def read(prompt):
        line = next(typed)
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    printed = command("--interactive=True", "--preset=greedy")
    assert printed.count("The cat") == printed.count("The dog") == 1
    assert next(typed) == "never read"


def test_each_interactive_prompt_has_a_seed_of_its_own(command, monkeypatch):
    typed = iter(["The cat", "The cat", ""])
    expected = [command("--prompt=The cat", f"--seed={seed}") for seed in (5, 6)]
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert command("--interactive", "--seed=5") == "".join(expected)
    assert expected[0] != expected[1]


def test_prompt_beside_interactive_is_refused_as_it_would_be_ignored(command):
    with pytest.raises(UserError, match="--interactive asks for prompts: leave --prompt out"):
        command("--interactive", "--prompt=The cat")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (sample, ["--prompt=cat", "--device=cpu"]),
        (hellaswag, [f"--data={OWN_TASKS}", "--device=cpu"]),
        (attention, ["--text=cat"]),
    ],
    ids=["sample", "hellaswag", "attention"],
)
def test_a_model_of_other_tokens_is_refused(tmp_path, tiny, monkeypatch, script, flags):
    torch.save({"model": GPT(tiny).state_dict(), "config": asdict(tiny)}, tmp_path / "x.pt")
    monkeypatch.setattr(sys, "argv", ["x.py", f"--model={tmp_path / 'x.pt'}", *flags])
    with pytest.raises(UserError, match=r"vocab_size=512.*50257"):
        script.main()
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_reader_who_has_enough_ends_the_command_quietly(tmp_path, make_model):
    model = make_model(Config(n_layer=1, n_head=1, n_embd=8, block_size=16))
    content = {"model": model.state_dict(), "config": asdict(model.cfg)}
    torch.save(content, tmp_path / "best.pt")
    line = [sys.executable, str(Path(sample.__file__)), f"--model={tmp_path / 'best.pt'}"]
    line += ["--device=cpu", "--max_new_tokens=5000", "--top_k=5", "--preset=conservative"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_torchrun_is_refused(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        command()


def test_head_by_columns_is_the_same_head(model):
    idx = torch.randint(0, 50257, (2, 16))
    expected = model(idx)
    assert sample.by_columns(model, torch.bfloat16).lm_head.weight.is_contiguous()
    turned = sample.by_columns(model, torch.float32).lm_head.weight
    assert turned is model.transformer.wte.weight and turned.t().is_contiguous()
    torch.testing.assert_close(model(idx), expected)


@pytest.mark.parametrize("on", [True, False])
def test_one_row_alone_is_multiplied_without_onednn(model, monkeypatch, on):
    def step(model, idx, *where):
        assert where == (1, 2, 3)
        used.append((idx.numel(), torch.backends.mkldnn.enabled))
        return 1 / (idx.numel() - 3)

    used = []
    monkeypatch.setattr(sample, "next_logits", step)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", on)  # whatever a test before has left
    for row in (torch.zeros(1, 1), torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(1, 3)):
        with contextlib.suppress(ZeroDivisionError):
            sample.best_step(row.device)(model, row, 1, 2, 3)
        assert torch.backends.mkldnn.enabled == on
    assert used == [(1, False), (2, on), (2, on), (3, on)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_command_takes_the_fast_way_of_its_dtype(command, monkeypatch, dtype):
    def step(model, *inputs):
        turned.add(model.lm_head.weight.t().is_contiguous())
        return next_logits(model, *inputs)

    turned = set()
    monkeypatch.setattr(sample, "next_logits", step)  # as one_row calls it, and generate does not
    command(f"--dtype={dtype}")
    assert turned == {dtype == "float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_gives_the_logits_of_any_step(model, dtype):
    def logits(step):
        cache, keys = KVCache(16), torch.arange(16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            for new in (keys[:3], keys[3:4]):  # a prompt, then a token
                mask = keys <= new[:, None]
                last = step(model, new[None], new, mask, cache)
        return last[:, :50257].float()

    near = {} if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(logits(sample.one_row), logits(next_logits), **near)
