import errno
import json
import shutil
import sys
from collections import namedtuple
from dataclasses import asdict, replace

import pytest
import torch

import export
from fineweb import UserError, tokenizer
from train_gpt2 import GPT, Config, Sampling, complete, load_model

EXPORTABLE = {
    "gpt2": {},
    "no-bias": {"bias": False},
    "no-qkv_bias": {"qkv_bias": False},
    "untied": {"tie_embeddings": False, "dropout": 0.1},
    "unpadded": {"vocab_size": 50257},
}
TEXT = "Hello, I'm a language model,"


@pytest.fixture
def checkpoint(tmp_path, tiny, make_model):
    """Write a checkpoint of GPT-2's vocabulary with these settings; returns its path."""

    def write(**settings):
        model = make_model(replace(tiny, **{"vocab_size": 50304} | settings))
        content = {"model": model.state_dict(), "config": asdict(model.cfg)}
        torch.save(content | {"step": 1000, "best": 3.25}, tmp_path / "best.pt")
        return str(tmp_path / "best.pt")

    return write


@pytest.fixture(params=EXPORTABLE.values(), ids=EXPORTABLE)
def exported(request, checkpoint, tmp_path):
    """(our model, the folder made of it)"""
    path, folder = checkpoint(**request.param), tmp_path / "exported"
    export.export(path, folder)
    return load_model(path), folder


def hugging_face(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- the same model


@torch.inference_mode()
def test_transformers_computes_the_same_logits(exported):
    model, folder = exported
    oracle = hugging_face(folder)
    idx = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(idx)[..., :50257]
    assert type(oracle).__name__ == "GPT2LMHeadModel"
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, oracle(idx).logits, atol=1e-4, rtol=0)


def test_transformers_generates_the_same_greedy_text(checkpoint, tmp_path):
    path = checkpoint(block_size=64)
    export.export(path, tmp_path / "exported")
    idx = torch.tensor([tokenizer().encode_ordinary(TEXT)])
    oracle = hugging_face(tmp_path / "exported")
    theirs = oracle.generate(idx, max_new_tokens=40, do_sample=False)[0, idx.size(1) :]
    ours = complete(load_model(path), TEXT, Sampling(temperature=0), max_new_tokens=40)
    assert ours == [tokenizer().decode(theirs.tolist())]
    assert len(set(theirs.tolist())) > 3


def test_from_pretrained_reads_back_every_tensor_exactly(exported):
    model, folder = exported
    back = GPT.from_pretrained(folder)
    assert back.cfg.tie_embeddings == model.cfg.tie_embeddings
    before, after = model.state_dict(), back.state_dict()
    for name, p in after.items():
        if name in before:
            assert torch.equal(p, before[name][: len(p)]), name
        else:
            assert name.endswith("bias") and not p.any(), name
    assert before.keys() <= after.keys()


def test_a_folder_exports_to_the_same_bytes(exported, tmp_path):
    _, folder = exported
    export.export(str(folder), tmp_path / "again")
    for name in names(folder):
        if name not in ("README.md", "config.json"):  # they know of the run, and of its dropout
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
@torch.inference_mode()
def test_full_size_gpt2_equals_transformers(tmp_path):
    torch.manual_seed(1)
    model = GPT(Config()).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.02)  # biases that are zero would hide mistakes
    torch.save({"model": model.state_dict(), "config": asdict(model.cfg), "step": 0, "best": 11.0},
               tmp_path / "best.pt")  # fmt: skip
    export.export(str(tmp_path / "best.pt"), tmp_path / "exported")
    oracle = hugging_face(tmp_path / "exported")
    assert sum(p.numel() for p in oracle.parameters()) == 124_439_808
    idx = torch.randint(50257, (1, 256), generator=torch.Generator().manual_seed(0))
    theirs = oracle(idx).logits
    torch.testing.assert_close(model(idx)[..., :50257], theirs, atol=1e-4, rtol=1e-5)
    back = GPT.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(back(idx), theirs, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT,
        "  two  spaces\n\n\tand a tab . ",
        "naïve café, 你好 🎉\u200b",
        "don't we'll I'D 1234",
    ],
)
def test_the_exported_tokenizer_encodes_as_tiktoken(shared_folder, text):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shared_folder)
    assert theirs(text).input_ids == tokenizer().encode_ordinary(text)
    assert theirs.decode(theirs(text).input_ids) == text


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """An exported folder that several tests read."""
    folder = tmp_path_factory.mktemp("shared")
    cfg = Config(n_layer=1, n_head=1, n_embd=8, block_size=16)
    torch.save({"model": GPT(cfg).state_dict(), "config": asdict(cfg), "step": 3, "best": 9.5},
               folder / "best.pt")  # fmt: skip
    export.export(str(folder / "best.pt"), folder / "exported")
    return folder / "exported"


def test_tokenizer_ends_where_the_model_does(shared_folder):
    from transformers import AutoTokenizer, GenerationConfig

    theirs = AutoTokenizer.from_pretrained(shared_folder)
    assert (len(theirs), theirs.model_max_length) == (50257, 16)
    assert theirs.eos_token_id == theirs.bos_token_id == 50256
    assert GenerationConfig.from_pretrained(shared_folder).eos_token_id == 50256


def test_files_are_readable_to_whom_the_umask_allows(shared_folder):
    modes = {path.stat().st_mode for path in shared_folder.iterdir()}
    assert len(modes) == 1


def test_model_card_tells_the_run_and_no_path_of_its_machine(checkpoint, tmp_path):
    path = checkpoint(data_dir="/home/someone/my_shards", log_dir="/home/someone/log")
    export.export(path, tmp_path / "my_model")
    card = (tmp_path / "my_model" / "README.md").read_text(encoding="utf-8")
    parameters = sum(p.numel() for p in GPT.from_pretrained(tmp_path / "my_model").parameters())
    for fact in (f"| {parameters:,} |", "| 1,000 |", "| 128,000 |", "3.2500 (perplexity 25.79)",
                 "# my_model", "| my_shards |", "n_embd = 32"):  # fmt: skip
        assert fact in card
    assert "someone" not in card


def test_model_card_claims_nothing_that_is_not_known(shared_folder, checkpoint, tmp_path):
    export.export(str(shared_folder), tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "parameters" in card
    assert "validation loss" not in card
    assert "learning_rate" not in card
    export.export(checkpoint(grad_accum_steps=4), tmp_path / "unknown_batch")
    assert "training tokens" not in (tmp_path / "unknown_batch/README.md").read_text("utf-8")


# ---------------------------------------------------------------- refusals


def test_all_toggles_that_gpt2_lacks_are_named_at_once(checkpoint, tmp_path):
    path = checkpoint(pos_embedding="rope", mlp="swiglu", norm="rmsnorm", qk_norm=True,
                      logit_softcap=5.0)  # fmt: skip
    with pytest.raises(UserError) as refusal:
        export.export(path, tmp_path / "exported")
    for toggle in ("pos_embedding=rope", "mlp=swiglu", "norm=rmsnorm", "qk_norm=True",
                   "logit_softcap=5.0"):  # fmt: skip
        assert toggle in str(refusal.value)
    with pytest.raises(UserError, match="no mlp=relu2:"):
        export.export(checkpoint(mlp="relu2"), tmp_path / "exported")
    assert names(tmp_path) == ["best.pt"]


def test_a_folder_with_anything_in_it_stays_as_it_is(checkpoint, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("four years")
    for out_dir in (taken, taken / "thesis.txt"):
        with pytest.raises(UserError, match="not empty"):
            export.export(checkpoint(), out_dir)
    assert names(taken) == ["thesis.txt"]


def test_an_empty_folder_and_one_in_a_new_place_are_filled(shared_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for out_dir in (tmp_path / "empty", tmp_path / "a" / "b"):
        export.export(str(shared_folder), out_dir)
        assert names(out_dir) == names(shared_folder)


def test_nothing_is_left_of_an_export_that_fails(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)  # the weights are written by then
    with pytest.raises(UserError, match="No space left"):
        export.export(checkpoint(), tmp_path / "exported")
    assert names(tmp_path) == ["best.pt"]


def test_a_full_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="bytes of disk, 1,000 are free"):
        export.export(checkpoint(), tmp_path / "exported")
    assert names(tmp_path) == ["best.pt"]


def test_command_says_what_it_wrote(shared_folder, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / "exported"
    monkeypatch.setattr(
        sys, "argv", ["export.py", f"--model={shared_folder}", f"--out_dir={out_dir}"]
    )
    export.main()
    printed = capsys.readouterr().out
    assert f"wrote {out_dir}" in printed
    assert all(name in printed for name in names(out_dir))
    assert json.loads((out_dir / "config.json").read_text("utf-8"))["n_embd"] == 8
