"""Hugging Face folders of GPT-2 and Llama models in this project's names, and the way back.

train_gpt2.py reads them by `GPT.from_pretrained`; export.py writes them.
"""

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common import UserError, in_short
from fineweb import TABLE

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


# ---------------------------------------------------------------- tensors

# Our tensor: those of Llama that it holds, one after the other. lm_head has one name in both.
LLAMA_NAMES = {
    "wte": ["embed_tokens"],
    "h.{i}.ln_1": ["layers.{i}.input_layernorm"],
    "h.{i}.attn.c_attn": [f"layers.{{i}}.self_attn.{x}_proj" for x in "qkv"],
    "h.{i}.attn.c_proj": ["layers.{i}.self_attn.o_proj"],
    "h.{i}.ln_2": ["layers.{i}.post_attention_layernorm"],
    "h.{i}.mlp.c_gate": ["layers.{i}.mlp.gate_proj"],
    "h.{i}.mlp.c_fc": ["layers.{i}.mlp.up_proj"],
    "h.{i}.mlp.c_proj": ["layers.{i}.mlp.down_proj"],
    "ln_f": ["norm"],
}


def llama_names(n_layer):
    """LLAMA_NAMES in full, for every layer."""
    return {
        f"transformer.{ours}.weight".format(i=i): [f"model.{x}.weight".format(i=i) for x in theirs]
        for i in range(n_layer)
        for ours, theirs in LLAMA_NAMES.items()
    }


def from_llama(weights, n_layer):
    """Llama's tensors by our names; what has none keeps its own, for load_state_dict to refuse."""
    weights = {key: w for key, w in weights.items() if not key.endswith("rotary_emb.inv_freq")}
    names = llama_names(n_layer).items()
    return {ours: torch.cat([weights.pop(x) for x in theirs]) for ours, theirs in names} | weights


def to_llama(weights, n_layer):
    """Our tensors by Llama's names."""
    names, llama = llama_names(n_layer), {}
    for key, w in weights.items():
        theirs = names.get(key, [key])
        llama |= zip(theirs, w.chunk(len(theirs)), strict=True)
    return llama


def transposed(key, w):
    """OpenAI's linear layers are stored as (inputs, outputs)."""
    return w.t() if w.dim() == 2 and ".h." in key else w


def from_gpt2(weights, n_layer):
    """OpenAI's tensors by our names: prefixed, and without the buffers of their masks."""
    ours = {}
    for key, w in weights.items():
        if key != "lm_head.weight":
            key = f"transformer.{key.removeprefix('transformer.')}"
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            ours[key] = transposed(key, w)
    return ours


def to_gpt2(weights, n_layer):
    """Our tensors by OpenAI's names, with zeros for absent biases: the same function."""
    gpt2 = {key: transposed(key, w) for key, w in weights.items()}
    for key, w in weights.items():
        if ".h." in key or ".ln_f." in key:
            gpt2.setdefault(key.replace(".weight", ".bias"), torch.zeros(len(w)))
    return gpt2


# ---------------------------------------------------------------- kinds


class Kind(NamedTuple):
    """An architecture of transformers, as far as GPT computes it too."""

    name: str  # its class
    sizes: dict  # keys of Config: their names in config.json
    toggles: dict  # what the other keys of Config have to be
    computed: Callable  # sizes -> what the other keys of config.json have to be
    defaults: dict  # what transformers assumes for keys that config.json lacks
    dropouts: list  # the names of dropout in config.json
    from_theirs: Callable  # (tensors, n_layer) -> the same by our names
    to_theirs: Callable  # the way back


def gpt2_computed(sizes):
    return {
        "activation_function": "gelu_new",  # GELU's tanh form
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_inner": 4 * sizes["n_embd"],
    }


def llama_computed(sizes):
    C, nh = sizes["n_embd"], sizes["n_head"]
    return {
        "num_key_value_heads": nh,
        "head_dim": C // nh,
        "intermediate_size": math.ceil(8 * C / 3 / 64) * 64,  # SwiGLU's in train_gpt2.py
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"]},
    }


KINDS = {
    "gpt2": Kind(
        name="GPT2LMHeadModel",
        sizes=dict(
            n_layer="n_layer", n_head="n_head", n_embd="n_embd", block_size="n_positions",
            vocab_size="vocab_size", tie_embeddings="tie_word_embeddings",
        ),
        toggles=dict(
            pos_embedding="learned", mlp="gelu", norm="layernorm", qk_norm=False, logit_softcap=0.0,
        ),
        computed=gpt2_computed,
        defaults=dict(tie_word_embeddings=True),
        dropouts=["embd_pdrop", "attn_pdrop", "resid_pdrop"],
        from_theirs=from_gpt2,
        to_theirs=to_gpt2,
    ),
    "llama": Kind(
        name="LlamaForCausalLM",
        sizes=dict(
            n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size",
            block_size="max_position_embeddings", vocab_size="vocab_size", rope_theta="rope_theta",
            tie_embeddings="tie_word_embeddings",
        ),
        toggles=dict(
            pos_embedding="rope", mlp="swiglu", norm="rmsnorm", qk_norm=False, logit_softcap=0.0,
            bias=False,
        ),
        computed=llama_computed,
        defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6),
        dropouts=["attention_dropout"],
        from_theirs=from_llama,
        to_theirs=to_llama,
    ),
}  # fmt: skip


# ---------------------------------------------------------------- reading


def read(name):
    """A folder, one of OPENAI, owner/name -> (what it decides of Config, its tensors as in GPT).

    UserError if it is none of these, cannot be fetched, or is not what GPT computes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config_path, weights_paths = files(name)
        kind, config = read_config(config_path)
        sizes = {ours: config[theirs] for ours, theirs in kind.sizes.items()}
        counts = [n for key, n in sizes.items() if key not in ("rope_theta", "tie_embeddings")]
        if min(counts) < 1 or sizes["n_embd"] % sizes["n_head"]:
            raise ValueError(f"impossible sizes: {sizes}")
        for key, value in kind.computed(sizes).items():
            if config.get(key, value) != value:
                raise UserError(
                    f"{name} is not what GPT computes: {key} is {config[key]}, not {value}"
                )
        weights = {}
        for path in weights_paths:
            weights |= load_file(path)
        weights = kind.from_theirs(weights, sizes["n_layer"])
        if sizes["tie_embeddings"]:  # but a head of its own stays so, as in transformers 5
            wte = weights["transformer.wte.weight"]
            sizes["tie_embeddings"] = torch.equal(weights.setdefault("lm_head.weight", wte), wte)
        # GPT-2 has these, whatever the defaults of Config were changed to
        return dict(bias=True, qkv_bias=True) | sizes | kind.toggles, weights
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise unreadable(name, error) from None


def has_other_tokens(name):
    """Whether the vocabulary beside a model, if any, has other ids than GPT-2's for its tokens."""
    if name in OPENAI or str(name).endswith(".pt"):
        return False
    folder = Path(name)
    with contextlib.suppress(Exception):  # what is not there, nor on the hub, cannot be compared
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            wanted = ["vocab.json", "tokenizer.json"]
            folder = Path(snapshot_download(str(name), allow_patterns=wanted))
        if (path := folder / "vocab.json").exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
        else:
            path = folder / "tokenizer.json"
            theirs = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        ours = json.loads(TABLE.with_name("vocab.json").read_text(encoding="utf-8"))
        known = isinstance(theirs, dict)  # a list is that of another kind of tokenizer
        return not known or any(theirs.get(token, i) != i for token, i in ours.items())
    return False


def unreadable(name, error):
    return UserError(f"{name} is not a GPT-2 or Llama that can be read ({in_short(error)})")


def read_config(path):
    """config.json -> (Kind, its keys as transformers understands them)."""
    config = json.loads(path.read_text(encoding="utf-8"))
    model_type = config.get("model_type", "gpt2")
    if model_type not in KINDS:
        raise ValueError(f"model_type is {model_type}, not {' or '.join(KINDS)}")
    kind = KINDS[model_type]
    config = kind.defaults | {key: value for key, value in config.items() if value is not None}
    if config.get("activation_function") == "gelu_pytorch_tanh":  # another name of the same
        config["activation_function"] = "gelu_new"
    # up to transformers 4 the base stands beside rope_scaling, from 5 on in rope_parameters
    rope = config.get("rope_scaling") or config.get("rope_parameters", {})
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)} | rope
    return kind, config | {"rope_theta": rope["rope_theta"], "rope_parameters": rope}


def files(name):
    """config.json and the safetensors files of a folder, or of a model on the Hugging Face hub."""
    if name and Path(name).is_dir():
        there = {path.name: path for path in sorted(Path(name).iterdir())}
        if "config.toml" in there and (saved := [file for file in there if file.endswith(".pt")]):
            raise UserError(f"{name} is a run's folder: name a checkpoint, {Path(name, saved[0])}")
        return find_files(there.get)
    if str(name).endswith(".pt"):
        raise UserError(f"{name} is a checkpoint, not a Hugging Face folder: see load_model")
    if not on_hub(name):
        known = "none of gpt2[-medium|-large|-xl], and no owner/name of the hub"
        raise UserError(f"{name or 'an empty name'} is not a .pt file, not a folder, {known}")
    from huggingface_hub import errors, hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each new try
    repository = f"openai-community/{name}" if name in OPENAI else str(name)

    def fetch(file):
        try:
            return Path(hf_hub_download(repository, file))
        except errors.LocalEntryNotFoundError:  # an EntryNotFoundError, too: there is no network
            raise
        except errors.EntryNotFoundError:
            return None

    try:
        return find_files(fetch)
    except Exception as error:  # the hub's, the network's, the disk's: all mean the same here
        remedy = f"check the name and the network, or name a folder\n       {in_short(error)}"
        raise UserError(f"{name} could not be downloaded: {remedy}") from None


def on_hub(name):
    """Whether it names a model on the Hugging Face hub, and nothing that lies here."""
    owner_and_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))
    return name in OPENAI or bool(owner_and_name and not Path(name).exists())


def find_files(get):
    """get(file's name) -> its path, or None. One file of weights, or an index of several."""

    def needed(file):
        if not (path := get(file)):
            raise FileNotFoundError(f"{file} is not there")
        return path

    config = needed("config.json")
    if weights := get("model.safetensors"):
        return config, [weights]
    if not (index := get("model.safetensors.index.json")):
        return config, [needed("model.safetensors")]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return config, [needed(shard) for shard in sorted(set(shards))]
