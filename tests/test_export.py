import errno
import json
import logging
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import asdict, dataclass, make_dataclass, replace
from pathlib import Path

import pytest
import torch

import export
import hellaswag
import train_gpt2
from common import UserError
from fineweb import tokenizer
from pretrained import KINDS, has_other_tokens
from sample import load_text_model
from train_gpt2 import ARCHITECTURE, GPT, Config, Sampling, complete, load_model

LLAMA = {"pos_embedding": "rope", "mlp": "swiglu", "norm": "rmsnorm", "bias": False}
EXPORTABLE = {
    "gpt2": {},
    "no-bias": {"bias": False},
    "no-qkv_bias": {"qkv_bias": False},
    "untied": {"tie_embeddings": False, "dropout": 0.1},
    "unpadded": {"vocab_size": 50257},
    "llama": LLAMA,
    "llama-untied": LLAMA | {"tie_embeddings": False, "dropout": 0.1},
    "llama-rope_theta": LLAMA | {"rope_theta": 100.0, "qkv_bias": False},
}
OWN_TASKS = Path(__file__).parent / "data" / "hellaswag_own.jsonl"
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


def random_ids(*shape):
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_transformers_computes_the_same_logits(exported):
    model, folder = exported
    oracle, idx = hugging_face(folder), random_ids(2, 16)
    logits = model(idx)[..., :50257]
    llama = model.cfg.norm == "rmsnorm"
    assert type(oracle).__name__ == ("LlamaForCausalLM" if llama else "GPT2LMHeadModel")
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, oracle(idx).logits, atol=1e-4, rtol=0)


def greedy_text(oracle, max_new_tokens):
    idx = torch.tensor([tokenizer().encode_ordinary(TEXT)])
    new = oracle.generate(idx, max_new_tokens=max_new_tokens, do_sample=False)[0, idx.size(1) :]
    assert len(set(new.tolist())) > 3
    return tokenizer().decode(new.tolist())


@pytest.mark.parametrize("name", ["gpt2", "untied", "llama", "llama-untied"])
def test_transformers_generates_the_same_greedy_text(checkpoint, tmp_path, name):
    path = checkpoint(block_size=64, **EXPORTABLE[name])
    export.export(path, tmp_path / "exported")
    theirs = greedy_text(hugging_face(tmp_path / "exported"), 40)
    assert complete(load_model(path), TEXT, Sampling(temperature=0), max_new_tokens=40) == [theirs]


def test_from_pretrained_reads_back_every_tensor_exactly(exported):
    model, folder = exported
    back = GPT.from_pretrained(folder)
    adds_biases = model.cfg.norm == "layernorm"
    for key in ARCHITECTURE:
        if key != "vocab_size" and not (adds_biases and key.endswith("bias")):
            # without biases, there is none to the queries either
            assert getattr(back.cfg, key) == getattr(model.cfg, key) or key == "qkv_bias", key
    before, after = model.state_dict(), back.state_dict()
    for name, p in after.items():
        if name in before:
            assert torch.equal(p, before[name][: len(p)]), name
        else:
            assert adds_biases and name.endswith("bias") and not p.any(), name
    assert before.keys() <= after.keys()


def test_a_folder_exports_to_the_same_bytes(exported, tmp_path):
    _, folder = exported
    export.export(str(folder), tmp_path / "again")
    for name in names(folder):
        if name not in ("README.md", "config.json"):  # they know of the run, and of its dropout
            assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(
    ("settings", "parameters"), [({}, 124_439_808), (LLAMA, 123_551_232)], ids=["gpt2", "llama"]
)
def test_full_size_equals_transformers_both_ways(tmp_path, settings, parameters):
    torch.manual_seed(1)
    model = GPT(Config(**settings)).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.05)  # biases that are zero would hide mistakes
    torch.save({"model": model.state_dict(), "config": asdict(model.cfg), "step": 0, "best": 11.0},
               tmp_path / "best.pt")  # fmt: skip
    export.export(str(tmp_path / "best.pt"), tmp_path / "exported")
    oracle, idx = hugging_face(tmp_path / "exported"), random_ids(1, 1024)
    assert sum(p.numel() for p in oracle.parameters()) == parameters
    theirs = oracle(idx).logits
    torch.testing.assert_close(model(idx)[..., :50257], theirs, atol=1e-4, rtol=1e-5)
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="200MB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    back = GPT.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(back(idx), theirs, atol=1e-4, rtol=1e-5)
    assert complete(back, TEXT, Sampling(temperature=0), max_new_tokens=16) == [
        greedy_text(oracle, 16)
    ]


# ---------------------------------------------------------------- Llamas from elsewhere


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def llama(request, tmp_path):
    """(a Llama of transformers' with random weights, the folder that transformers made of it)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=128,
        max_position_embeddings=16, vocab_size=512, rms_norm_eps=1e-5, rope_theta=500.0,
        tie_word_embeddings=request.param, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    return model, tmp_path / "llama"


def change_config(folder, **keys):
    """Set keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


@torch.inference_mode()
def assert_same_logits(oracle, folder):
    back, idx = GPT.from_pretrained(folder), random_ids(2, 16) % 512
    theirs = oracle(idx).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(back(idx), theirs, atol=1e-4, rtol=0)


def test_a_llama_of_transformers_is_read(llama):
    assert_same_logits(*llama)


def test_what_transformers_4_wrote_is_read(llama):
    oracle, folder = llama
    change_config(folder, rope_parameters=None, rope_theta=500.0, dtype=None, head_dim=None,
                  torch_dtype="float32")  # fmt: skip
    assert_same_logits(oracle, folder)


def test_what_config_json_leaves_out_is_as_in_transformers(llama):
    oracle, folder = llama
    if not oracle.config.tie_word_embeddings:
        change_config(folder, tie_word_embeddings=None)
        assert_same_logits(oracle, folder)
    change_config(folder, rms_norm_eps=None)
    with pytest.raises(UserError, match="rms_norm_eps is 1e-06"):
        GPT.from_pretrained(folder)


def test_buffers_that_old_llamas_saved_are_left_out(llama):
    from safetensors.torch import load_file, save_file

    oracle, folder = llama
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(oracle, folder)


def test_gpt2_is_read_as_openai_has_it(shared_folder, tmp_path):
    """Names without a prefix, the buffers of its masks, and no word of the head, which is tied."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {key.removeprefix("transformer."): w for key, w in weights.items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    change_config(tmp_path, tie_word_embeddings=None)
    ours, expected = GPT.from_pretrained(tmp_path), GPT.from_pretrained(shared_folder)
    assert ours.cfg == expected.cfg and ours.cfg.tie_embeddings
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_weights_in_several_files_are_read(llama, exported, tmp_path):
    for oracle, name in ((llama[0], "a"), (hugging_face(exported[1]), "b")):
        oracle.save_pretrained(tmp_path / name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
        assert_same_logits(oracle, tmp_path / name)
        next((tmp_path / name).glob("*.safetensors")).unlink()
        with pytest.raises(UserError, match=r"model-\d.*\.safetensors is not there"):
            GPT.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_key_value_heads": 2},
        {"head_dim": 16},
        {"intermediate_size": 96},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-6},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "mistral"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_gpt_does_not_compute_is_refused_by_name(llama, keys):
    (key, value), folder = next(iter(keys.items())), llama[1]
    change_config(folder, **keys)
    with pytest.raises(UserError) as refusal:
        GPT.from_pretrained(folder)
    message = str(refusal.value)
    assert f"{key.replace('scaling', 'parameters')} is " in message and ", not " in message
    assert str(folder) in message and "\n" not in message
    wrong = value.values() if isinstance(value, dict) else [value]
    assert all(str(x) in message for x in wrong)


@pytest.mark.parametrize(
    "keys",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 24},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_gpt2_that_computes_something_else_is_refused_by_name(shared_folder, tmp_path, keys):
    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, **keys)
    [(key, value)] = keys.items()
    with pytest.raises(UserError, match=f"is not what GPT computes: {key} is {value}, not "):
        GPT.from_pretrained(tmp_path)


def test_a_llama_without_some_of_its_tensors_or_with_more_is_refused(llama):
    folder = llama[1]
    for layers in (4, 2):
        change_config(folder, num_hidden_layers=layers)
        with pytest.raises(UserError, match="is not a GPT-2 or Llama that can be read") as refusal:
            GPT.from_pretrained(folder)
        assert "model.layers." in str(refusal.value)


@pytest.mark.parametrize(
    "name, repository",
    [("gpt2-medium", "openai-community/gpt2-medium"), ("someone/a_gpt-2.1", "someone/a_gpt-2.1")],
)
def test_names_are_fetched_from_the_hub(shared_folder, monkeypatch, name, repository):
    import huggingface_hub

    def serve(repo, file):
        assert repo == repository
        return str(shared_folder / file)

    def fail(*_):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    assert GPT.from_pretrained(name).cfg.n_embd == 8
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        UserError, match=f"{name} could not be downloaded: check .*\n *TimeoutError"
    ):
        GPT.from_pretrained(name)


def test_what_the_hub_s_client_warns_of_is_not_shown(shared_folder, monkeypatch, caplog):
    """It has a line for each of its tries; what stops a command is told once, at its end."""
    import huggingface_hub

    def serve(_, file):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        return str(shared_folder / file)

    caplog.set_level(logging.WARNING, "huggingface_hub")  # as it is at first
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    GPT.from_pretrained("someone/gpt2")
    assert not caplog.records


def test_weights_in_several_files_are_fetched_from_the_hub_too(tmp_path, monkeypatch):
    import huggingface_hub
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_layer=1, n_head=1, n_embd=8, n_positions=16)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu_pytorch_tanh")).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    def serve(repo, file):
        if not (tmp_path / file).exists():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    idx = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        ours = GPT.from_pretrained("someone/gpt2")(idx)
        torch.testing.assert_close(ours, theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../out", "gpt3"])
def test_what_is_no_name_of_the_hub_is_not_asked_there(name):
    with pytest.raises(UserError, match=rf"{name} is not a \.pt file, not a folder, none of gpt2"):
        GPT.from_pretrained(Path(name))


@pytest.mark.parametrize("name", ["gpt2", "someone/gpt2"])
@pytest.mark.parametrize("kind", ["EntryNotFoundError", "LocalEntryNotFoundError"])
def test_a_model_where_the_command_runs_is_not_taken_for_one_of_the_hub(
    shared_folder, monkeypatch, name, kind
):
    import huggingface_hub

    def fail(_, file):
        raise getattr(huggingface_hub.errors, kind)(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.chdir(shared_folder)
    with pytest.raises(UserError, match=f"{name} could not be downloaded: check the") as told:
        GPT.from_pretrained(name)
    assert ("config.json is not there" in str(told.value)) == (kind == "EntryNotFoundError")
    with pytest.raises(UserError, match=r"an empty name is not a .pt file, not a folder"):
        GPT.from_pretrained("")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_of_its_own_is_not_tied_whatever_the_config_says(shared_folder, tmp_path, equal):
    from safetensors.torch import load_file, save_file

    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + (0 if equal else 1)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    model, idx = GPT.from_pretrained(tmp_path), torch.tensor([[3, 1, 4, 1, 5]])
    assert model.cfg.tie_embeddings == equal
    with torch.no_grad():
        theirs = hugging_face(tmp_path)(idx).logits
        torch.testing.assert_close(model(idx)[..., : theirs.size(-1)], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("keys", [{"n_head": 3}, {"n_head": "2"}, {"n_layer": "2"}, {"n_embd": -8}])
def test_impossible_sizes_are_one_error(shared_folder, tmp_path, keys):
    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, **keys)
    with pytest.raises(UserError, match="is not a GPT-2 or Llama that can be read"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a GPT-2 or Llama that can be read"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_text_is_not_given_to_a_model_of_other_tokens(shared_folder, tmp_path, file):
    shutil.copytree(shared_folder, tmp_path, dirs_exist_ok=True)
    ids = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").unlink()

    def write(ids):
        content = ids if file == "vocab.json" else {"model": {"vocab": ids}}
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")

    write(ids | {"[PAD]": 50257})
    load_text_model(tmp_path)
    write(ids | {"hello": ids["world"], "world": ids["hello"]})
    with pytest.raises(UserError, match=r"has a vocabulary of its own: it was trained on other"):
        load_text_model(tmp_path)
    with pytest.raises(UserError, match=r"has a vocabulary of its own, not GPT-2's: take it as"):
        export.export(str(tmp_path), tmp_path / "exported")  # which would have GPT-2's
    assert not (tmp_path / "exported").exists()
    write([["hello", 0.0]])  # as another kind of tokenizer has it
    with pytest.raises(UserError, match=r"has a vocabulary of its own: it was trained on other"):
        load_text_model(tmp_path)
    (tmp_path / file).write_text("{}" if file == "tokenizer.json" else "{", encoding="utf-8")
    load_text_model(tmp_path)  # nothing to compare with
    assert GPT.from_pretrained(tmp_path).cfg.vocab_size == 50257  # its weights are good


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_tokens_of_a_model_of_the_hub_are_looked_at_too(shared_folder, tmp_path, monkeypatch, file):
    import huggingface_hub

    def snapshot(repository, allow_patterns):
        for name in {file}.intersection(allow_patterns):
            vocabulary = {"hello": 0, "world": 1}
            content = vocabulary if name == "vocab.json" else {"model": {"vocab": vocabulary}}
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda _, name: str(shared_folder / name)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UserError, match=r"has a vocabulary of its own: it was trained on other"):
        load_text_model("someone/gpt2")


def test_tokens_that_are_known_are_not_asked_for(monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: asked.append(_))
    assert not has_other_tokens("log/best.pt") and not has_other_tokens("gpt2")
    assert asked == []


def test_a_runs_folder_is_told_its_checkpoint(checkpoint):
    folder = Path(checkpoint()).parent
    (folder / "config.toml").touch()
    with pytest.raises(UserError, match=r"is a run's folder: name a checkpoint, .*best\.pt"):
        load_model(folder)


def test_a_file_that_is_there_is_not_looked_for_on_the_hub(shared_folder, monkeypatch):
    monkeypatch.chdir(shared_folder.parent)
    with pytest.raises(UserError, match=r"config\.json is not a \.pt file, not a folder"):
        GPT.from_pretrained(f"{shared_folder.name}/config.json")


def test_edited_defaults_do_not_change_what_a_folder_holds(shared_folder, monkeypatch):
    @dataclass(frozen=True)
    class Edited(Config):
        bias: bool = False
        qkv_bias: bool = False
        qk_norm: bool = True
        logit_softcap: float = 30.0
        norm: str = "rmsnorm"

    expected = GPT.from_pretrained(shared_folder)
    monkeypatch.setattr(train_gpt2, "Config", Edited)
    model, idx = GPT.from_pretrained(shared_folder), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        assert torch.equal(model(idx), expected(idx))


# ---------------------------------------------------------------- EleutherAI's harness


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_harness_computes_the_same_likelihoods(checkpoint, tmp_path, runtime, name):
    """Given hellaswag.py's strings, acc is the same; its acc_norm is a mean over characters."""
    lm_eval = pytest.importorskip("lm_eval")
    path = checkpoint(block_size=128, **EXPORTABLE[name])
    export.export(path, tmp_path / "exported")
    files = {"data_files": {"validation": str(OWN_TASKS)}, "cache_dir": str(tmp_path / "cache")}
    task = {
        "task": "hellaswag_raw",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    arguments = f"pretrained={tmp_path / 'exported'},dtype=float32"
    results = lm_eval.simple_evaluate("hf", arguments, [task], device="cpu", bootstrap_iters=0)
    theirs = results["results"]["hellaswag_raw"]
    samples = sorted(results["samples"]["hellaswag_raw"], key=lambda sample: sample["doc_id"])

    model, tasks = load_model(path), hellaswag.load(OWN_TASKS)
    with torch.no_grad():
        for task, sample in zip(tasks, samples, strict=True):
            nll, _ = hellaswag.surprise(model, [hellaswag.pack(task, model.cfg.block_size)])
            likelihoods = [x[0] for x in sample["filtered_resps"]]
            assert (-nll).tolist() == pytest.approx(likelihoods, abs=1e-3)
        scores = hellaswag.score(model, tasks, runtime)
    assert theirs["acc,none"] == scores["acc"]
    assert theirs["acc_norm,none"] == scores["acc_norm_chars"]


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


def test_config_tells_dropout_and_the_dtype_by_both_of_its_names(checkpoint, tmp_path):
    for name in ("gpt2", "llama"):
        export.export(checkpoint(**EXPORTABLE[name], dropout=0.25), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert {config[key] for key in KINDS[name].dropouts} == {0.25}
        assert config["dtype"] == config["torch_dtype"] == "float32"  # transformers 5; before


def test_model_card_tells_the_run_and_no_path_of_its_machine(checkpoint, tmp_path):
    keys = {"data_dir": "my_shards", "log_dir": "log", "init_from": "a.pt", "hellaswag_path": "h"}
    path = checkpoint(**{key: f"/home/someone/{name}" for key, name in keys.items()})
    export.export(path, tmp_path / "my_model")
    card = (tmp_path / "my_model" / "README.md").read_text(encoding="utf-8")
    parameters = sum(p.numel() for p in GPT.from_pretrained(tmp_path / "my_model").parameters())
    for fact in (f"| {parameters:,} |", "| 1,000 |", "lowest validation loss of the run | 3.2500 |",
                 "# my_model", "| my_shards |", "n_embd = 32"):  # fmt: skip
        assert fact in card
    assert "someone" not in card


def test_model_card_has_the_hellaswag_score_of_the_checkpoint(checkpoint, tmp_path):
    log = "500 hella 0.25\n1000 val 3.25\n1000 hella 0.2704\n1000 hella 0.2801\n"
    cards = {}
    for name, lines in {
        "same_step": log,
        "earlier": "500 hella 0.2604\n750 val 3.3\n1500 hella 0.31\n",
        "torn": "500 hella 0.2604\n1000 hella 0.2",
        "later": "1500 hella 0.31\n",
    }.items():
        (tmp_path / "log.txt").write_text(lines, "utf-8")
        export.export(checkpoint(hellaswag_examples=40), tmp_path / name)
        cards[name] = (tmp_path / name / "README.md").read_text("utf-8")
    assert "| 0.2801 (step 1,000, hellaswag_examples=40) |" in cards["same_step"]
    assert "| 0.2604 (step 500, " in cards["earlier"] and "0.31" not in cards["earlier"]
    assert "| 0.2604 (step 500, " in cards["torn"]
    assert "HellaSwag" not in cards["later"] and "0.31" not in cards["later"]


def test_model_card_has_the_loss_and_the_tokens_of_the_checkpoint(checkpoint, tmp_path):
    """A run's best loss is another step's, and a resume may have changed its batch."""
    log = "0 batch 128\n500 val 3.25\n900 batch 1280\n1000 val 7.5\n1100 val 7\n1100 batch 9\n"
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    export.export(checkpoint(), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "| validation loss | 7.5000 (perplexity 1808.04, step 1,000) |" in card
    assert "3.25" not in card
    assert f"| training tokens | {900 * 128 + 100 * 1280:,} |" in card


@pytest.mark.parametrize("name", EXPORTABLE)
def test_model_card_s_example_runs_in_a_short_context(checkpoint, tmp_path, monkeypatch, name):
    export.export(checkpoint(block_size=16, **EXPORTABLE[name]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    [example] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    told = []
    exec(example.replace("path/to/", ""), {"print": told.append})
    assert told[0].startswith("Hello, I'm a language model,")


def test_model_card_names_the_model_of_the_hub_that_the_run_began_from(checkpoint, tmp_path):
    for i, name in enumerate(("someone/gpt2", "/home/me/gpt2")):
        export.export(checkpoint(init_from=name), tmp_path / str(i))
    first, second = ((tmp_path / x / "README.md").read_text("utf-8") for x in "01")
    assert 'init_from = "someone/gpt2"' in first and 'init_from = "gpt2"' in second


def test_model_card_of_a_run_that_went_wrong_is_written(checkpoint, tmp_path):
    path = checkpoint()
    content = torch.load(path)
    torch.save(content | {"best": 1e4}, path)
    (tmp_path / "log.txt").write_text("x hella 0.3\n3 hella abc\n9 hella 0.28\n", encoding="utf-8")
    export.export(str(path), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| 10000.0000 |" in card and "0.2800 (step 9" in card


def test_model_card_names_the_architecture(checkpoint, tmp_path):
    for name in ("gpt2", "llama"):
        export.export(checkpoint(**EXPORTABLE[name]), tmp_path / name)
        assert f"| {KINDS[name].name} |" in (tmp_path / name / "README.md").read_text("utf-8")


def test_model_card_claims_nothing_that_is_not_known(shared_folder, checkpoint, tmp_path):
    export.export(str(shared_folder), tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "parameters" in card
    assert "validation loss" not in card and "HellaSwag" not in card
    assert "learning_rate" not in card
    path = checkpoint()
    export.export(path, tmp_path / "unknown_batch")
    assert "training tokens" not in (tmp_path / "unknown_batch/README.md").read_text("utf-8")
    content = torch.load(path)
    torch.save({key: content[key] for key in ("model", "config")}, path)
    export.export(path, tmp_path / "weights_alone")
    card = (tmp_path / "weights_alone/README.md").read_text("utf-8")
    assert "optimizer steps" not in card and "learning_rate" in card


# ---------------------------------------------------------------- refusals


NEITHER = {  # settings: (the nearer kind, what is in its way)
    "relu2": ({"mlp": "relu2"}, "GPT2LMHeadModel", ["mlp=relu2"]),
    "rope": ({"pos_embedding": "rope"}, "GPT2LMHeadModel", ["pos_embedding=rope"]),
    "other ids": ({"vocab_size": 512}, "GPT2LMHeadModel", ["vocab_size=512"]),
    "llama with biases": (LLAMA | {"bias": True}, "LlamaForCausalLM", ["bias=True"]),
    "llama with more": (
        LLAMA | {"bias": True, "qk_norm": True, "logit_softcap": 5.0},
        "LlamaForCausalLM", ["qk_norm=True", "logit_softcap=5.0", "bias=True"],
    ),
    "gpt2 with more": (
        {"pos_embedding": "rope", "mlp": "relu2", "qk_norm": True, "logit_softcap": 5.0},
        "GPT2LMHeadModel",
        ["pos_embedding=rope", "mlp=relu2", "qk_norm=True", "logit_softcap=5.0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "nearer", "toggles"), NEITHER.values(), ids=NEITHER)
def test_all_toggles_in_the_way_are_named_at_once(checkpoint, tmp_path, settings, nearer, toggles):
    with pytest.raises(UserError) as refusal:
        export.export(checkpoint(**settings), tmp_path / "exported")
    first_line = str(refusal.value).splitlines()[0]
    assert first_line == (
        "neither GPT2LMHeadModel nor LlamaForCausalLM: "
        f"the nearer, {nearer}, has no {', '.join(toggles)}"
    )
    assert names(tmp_path) == ["best.pt"]


@pytest.mark.parametrize(
    ("name", "irrelevant"), [("gpt2", {"bias", "qkv_bias", "rope_theta"}), ("llama", {"qkv_bias"})]
)
def test_no_key_of_the_architecture_is_overlooked(name, irrelevant):
    kind = KINDS[name]
    assert {*kind.sizes, *kind.toggles, *irrelevant} == set(ARCHITECTURE)


def test_setting_that_an_edit_added_is_in_the_way_unless_it_is_off(monkeypatch):
    edited = make_dataclass("Edited", [("parallel", bool, False)], bases=(Config,), frozen=True)
    monkeypatch.setattr(export, "ARCHITECTURE", [*ARCHITECTURE, "parallel"])
    assert export.find_kind(edited()) == "gpt2"
    with pytest.raises(UserError, match="GPT2LMHeadModel, has no parallel=True"):
        export.find_kind(edited(parallel=True))


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


def test_every_file_is_synced_before_the_folder_gets_its_name(shared_folder, tmp_path, synced):
    export.export(str(shared_folder), tmp_path / "exported")
    assert {path.stat().st_ino for path in (tmp_path / "exported").iterdir()} <= synced


def test_a_full_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"exported needs 6\.\d\dMB more, 1\.00kB are free"):
        export.export(checkpoint(), tmp_path / "exported")
    assert names(tmp_path) == ["best.pt"]


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["export.py", "--model=x.pt", "--out_dir=y"])
    with pytest.raises(UserError, match="start it without torchrun"):
        export.main()


def test_command_says_what_it_wrote(checkpoint, tmp_path, run_cli):
    path = checkpoint(**LLAMA)
    done = run_cli("export.py", f"--model={path}", "--out_dir=exported")
    assert done.returncode == 0, done.stderr
    assert "wrote exported/" in done.stdout
    folder = tmp_path / "exported"
    assert all(name in done.stdout for name in names(folder))
    assert json.loads((folder / "config.json").read_text("utf-8"))["hidden_size"] == 32
    assert type(hugging_face(folder)).__name__ == "LlamaForCausalLM"
