"""OpenAI's GPT-2 and Hugging Face folders of its kind, in this project's names.

train_gpt2.py reads them by `GPT.from_pretrained`; export.py writes such folders.
"""

import json
from pathlib import Path

from fineweb import UserError

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}  # fmt: skip


def read(name):
    """One of OPENAI or a folder -> (its sizes, as in Config; its tensors, as in GPT).

    UserError where it is neither, cannot be fetched, or is another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_path, weights_path = files(name)
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        if foreign := [key for key, value in FIXED.items() if config.get(key, value) != value]:
            raise ValueError(f"{foreign[0]} is {config[foreign[0]]!r}")
        sizes = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        sizes["block_size"] = config["n_positions"]
        sizes["tie_embeddings"] = config.get("tie_word_embeddings", True)
        return sizes, from_openai(load_file(weights_path))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unreadable(name, error) from None


def unreadable(name, error):
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"{name} is no GPT-2 that can be read ({reason[:160]})")


def files(name):
    """The config.json and model.safetensors of a folder, or of OpenAI's GPT-2 on the hub."""
    names = ("config.json", "model.safetensors")
    if Path(name).is_dir():
        return [Path(name) / file for file in names]
    if name not in OPENAI:
        raise UserError(f"{name} is no .pt file, no folder, and none of gpt2[-medium|-large|-xl]")
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(f"openai-community/{name}", file)) for file in names]
    except Exception as error:  # the hub's, the network's, the disk's: all mean the same here
        raise UserError(f"{name} could not be downloaded: {str(error).splitlines()[0]}") from None


def from_openai(weights):
    """OpenAI's tensors by our names: prefixed, linear layers transposed, without mask buffers."""
    ours = {}
    for key, w in weights.items():
        if key != "lm_head.weight":
            key = f"transformer.{key.removeprefix('transformer.')}"
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            ours[key] = w.t() if w.dim() == 2 and ".h." in key else w
    ours.setdefault("lm_head.weight", ours["transformer.wte.weight"])  # tied
    return ours
