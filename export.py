"""A model as a Hugging Face folder, which transformers loads as GPT2LMHeadModel.

    python export.py --model=log/gpt2_124m/best.pt --out_dir=my_gpt2

Biases that the model was trained without are written as zeros, which is the same function. Variants
that GPT-2 has no name for are refused. GPT.from_pretrained("my_gpt2") is the way back.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from fineweb import END_OF_TEXT, TABLE, UserError, command_line, run, to_toml
from train_gpt2 import GPT, VOCABULARY, Config, load_model, read_checkpoint


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    out_dir: str  # the folder to make: new, or empty


def check(cfg):
    """UserError with every setting that GPT2LMHeadModel has no counterpart for."""
    gpt2, toggles = Config(), ("pos_embedding", "mlp", "norm", "qk_norm", "logit_softcap")
    values = [(key, getattr(cfg, key)) for key in toggles]
    wrong = [f"{key}={value}" for key, value in values if value != getattr(gpt2, key)]
    if cfg.vocab_size < VOCABULARY:
        wrong.append(f"vocab_size={cfg.vocab_size}")
    if wrong:
        raise UserError(
            f"GPT2LMHeadModel has no {', '.join(wrong)}: such a model cannot be exported\n"
            "       keep the checkpoint: --model and --init_from take it as it is"
        )


def gpt2_weights(model):
    """The tensors under OpenAI's names, for GPT-2's ids alone, with zeros for absent biases."""
    own = model.state_dict()
    with torch.device("meta"):  # names and shapes; a tied head has no name of its own
        full = GPT(replace(model.cfg, bias=True, qkv_bias=True)).named_parameters()
    weights = {}
    for key, like in full:
        p = own[key] if key in own else torch.zeros(like.shape)
        if key in ("transformer.wte.weight", "lm_head.weight"):
            p = p[:VOCABULARY]
        elif p.dim() == 2 and ".h." in key:
            p = p.t()  # OpenAI's linear layers are stored transposed
        weights[key] = p.contiguous()
    return weights


def configs(cfg):
    """{file name: content} of the folder's JSON files."""
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    model = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_positions": cfg.block_size,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "activation_function": "gelu_new",  # GELU's tanh form
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), cfg.dropout),
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": "float32",
    }
    tokens = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": cfg.block_size,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    }
    return {
        "config.json": model | ends,
        "generation_config.json": ends | {"pad_token_id": END_OF_TEXT},
        "tokenizer_config.json": tokens,
    }


def model_card(name, cfg, parameters, checkpoint):
    """README.md. A pretrained model ({} for checkpoint) does not know how it was trained."""
    rows = {
        "parameters": f"{parameters:,}",
        "layers, heads, width": f"{cfg.n_layer}, {cfg.n_head}, {cfg.n_embd}",
        "context": f"{cfg.block_size:,} tokens",
    }
    settings = ""
    if checkpoint:
        steps, best = checkpoint["step"], checkpoint["best"]
        rows["data"] = Path(cfg.data_dir).name
        rows["optimizer steps"] = f"{steps:,}"
        if not cfg.grad_accum_steps:  # else tokens depend on the number of ranks
            rows["training tokens"] = f"{steps * cfg.total_batch_size:,}"
        if math.isfinite(best):
            rows["best validation loss"] = f"{best:.4f} (perplexity {math.exp(best):.2f})"
        # the names of folders, not where they lie on the machine that trained
        paths = ("data_dir", "log_dir", "init_from", "hellaswag_path")
        public = replace(cfg, **{key: Path(getattr(cfg, key)).name for key in paths})
        settings = f"\nThe run's settings (train_gpt2.py):\n\n```toml\n{to_toml(public)}```\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A GPT-2 language model: it continues text.

| | |
|---|---|
{table}

```python
from transformers import pipeline

complete = pipeline("text-generation", "path/to/{name}")
print(complete("Hello, I'm a language model,")[0]["generated_text"])
```
{settings}"""


@contextlib.contextmanager
def new_folder(path):
    """Yield a temporary folder beside `path`; fsync and rename it there if the block succeeds."""
    path = Path(path).resolve()
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"out_dir={path} is there already and not empty: name a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rmdir()  # Windows renames over nothing, not even over an empty folder
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"out_dir={path} could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(name, out_dir):
    """Write the model as the folder `out_dir`, whole or not at all."""
    with new_folder(out_dir) as folder:
        model = load_model(name)
        check(model.cfg)
        checkpoint = read_checkpoint(name)[1] if name.endswith(".pt") else {}
        weights = gpt2_weights(model)
        needed, free = sum(p.nbytes for p in weights.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"out_dir={out_dir} needs {needed:,} bytes of disk, {free:,} are free")
        parameters = sum(p.numel() for p in weights.values())
        card = model_card(Path(out_dir).resolve().name, model.cfg, parameters, checkpoint)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text(card, encoding="utf-8")
        # safetensors lets nobody else read what it writes; here the umask decides, as it does above
        shutil.copymode(folder / "README.md", folder / "model.safetensors")
        for file, content in configs(model.cfg).items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(TABLE.parent / file, folder / file)


def main():
    options = command_line(Options, __doc__)
    export(options.model, options.out_dir)
    files = sorted(Path(options.out_dir).iterdir())
    print(f"wrote {options.out_dir}/ ({sum(f.stat().st_size for f in files) / 1e6:,.0f} MB):")
    print(f"  {', '.join(f.name for f in files)}")
    print(f'read it with AutoModelForCausalLM.from_pretrained("{options.out_dir}")')
    print(f"or here: python sample.py --model={options.out_dir}")


if __name__ == "__main__":
    run(main)
