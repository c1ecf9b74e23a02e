"""A model as a Hugging Face folder, which transformers loads.

    python export.py --model=log/gpt2_124m/best.pt --out_dir=my_gpt2

GPT-2's architecture becomes a GPT2LMHeadModel: biases that the model was trained without are zeros,
which is the same function. RoPE, SwiGLU and RMSNorm without biases, as configs/gpt2_124m_llama.toml
has them, become a LlamaForCausalLM. All else is refused. GPT.from_pretrained("my_gpt2") is the way
back.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from common import (
    UserError,
    alone,
    check_disk,
    command,
    command_line,
    move,
    read_log,
    run,
    to_toml,
    tokens_at,
)
from fineweb import END_OF_TEXT, TABLE
from pretrained import KINDS, has_other_tokens, on_hub
from train_gpt2 import ARCHITECTURE, VOCABULARY, load_model, read_checkpoint

EITHER_WAY = ("bias", "qkv_bias", "rope_theta")  # absent ones are zeros; or the kind decides


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder or owner/name, gpt2[-medium|-large|-xl]
    out_dir: str  # the folder to make: new, or empty


def differing(cfg, only):
    """What a Config has that is not as in the dict `only`, as `key=value`."""
    return [f"{key}={getattr(cfg, key)}" for key in only if getattr(cfg, key) != only[key]]


def find_kind(cfg):
    """The model_type that computes the same; else a UserError with what the nearer one lacks."""
    wrong = {}
    for model_type, kind in KINDS.items():
        known = {*kind.sizes, *kind.toggles, *EITHER_WAY}
        new = {key: getattr(type(cfg), key) for key in ARCHITECTURE if key not in known}
        wrong[model_type] = differing(cfg, kind.toggles | new)
        if cfg.vocab_size < VOCABULARY:
            wrong[model_type].append(f"vocab_size={cfg.vocab_size}")
    nearest = min(wrong, key=lambda model_type: len(wrong[model_type]))
    if wrong[nearest]:
        raise UserError(
            f"neither {' nor '.join(kind.name for kind in KINDS.values())}: the nearer, "
            f"{KINDS[nearest].name}, has no {', '.join(wrong[nearest])}\n"
            "       keep the checkpoint: --model and --init_from take it as it is"
        )
    return nearest


def tensors(model, kind):
    """The parameters under transformers' names, for GPT-2's ids alone."""
    own = dict(model.named_parameters())  # a tied head has no name of its own
    for key in own.keys() & {"transformer.wte.weight", "lm_head.weight"}:
        own[key] = own[key][:VOCABULARY]
    theirs = kind.to_theirs(own, model.cfg.n_layer)
    return {key: p.detach().contiguous() for key, p in theirs.items()}


def configs(cfg, model_type):
    """{file name: content} of the folder's JSON files."""
    kind, ends = KINDS[model_type], {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    sizes = asdict(replace(cfg, vocab_size=VOCABULARY))
    model = {
        "architectures": [kind.name],
        "model_type": model_type,
        **{theirs: sizes[ours] for ours, theirs in kind.sizes.items()},
        **kind.computed(sizes),
        **dict.fromkeys(kind.dropouts, cfg.dropout),
        **dict.fromkeys(("dtype", "torch_dtype"), "float32"),  # from transformers 5 on; before
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


def run_rows(name):
    """What a checkpoint, and log.txt beside it, tell of the run: rows of the model card."""
    cfg, checkpoint = read_checkpoint(name)
    if not checkpoint.keys() >= {"step", "best"}:
        return {}  # someone kept weights and config alone
    steps, best = checkpoint["step"], checkpoint["best"]
    log = read_log(Path(name).with_name("log.txt"))

    def last(stream):
        """(step, value) of a stream's last line up to this checkpoint, or None."""
        return max((at for at in log.get(stream, {}).items() if at[0] <= steps), default=None)

    rows = {"data": Path(cfg.data_dir).name, "optimizer steps": f"{steps:,}"}
    if "batch" in log:
        rows["training tokens"] = f"{tokens_at(steps, log['batch']):,.0f}"
    if at := last("val"):
        perplexity = math.exp(min(at[1], 99))
        rows["validation loss"] = f"{at[1]:.4f} (perplexity {perplexity:.2f}, step {at[0]:,})"
    elif math.isfinite(best):
        rows["lowest validation loss of the run"] = f"{best:.4f}"
    if at := last("hella"):
        row, examples = "HellaSwag acc_norm", f"hellaswag_examples={cfg.hellaswag_examples}"
        rows[f"{row}, as build-nanogpt scores it"] = f"{at[1]:.4f} (step {at[0]:,}, {examples})"
    return rows


def model_card(title, name, cfg, kind, parameters):
    """README.md of the model `name`: a pretrained one does not tell how it was trained."""
    rows = {
        "architecture": kind.name,
        "parameters": f"{parameters:,}",
        "layers, heads, width": f"{cfg.n_layer}, {cfg.n_head}, {cfg.n_embd}",
        "context": f"{cfg.block_size:,} tokens",
    }
    settings, length = "", max(1, min(64, cfg.block_size // 2))  # beyond its context GPT-2 crashes
    if name.endswith(".pt"):
        rows |= run_rows(name)
        # the names of folders, not where they lie on the machine that trained
        paths = ("data_dir", "log_dir", "init_from", "hellaswag_path")
        names = {key: Path(getattr(cfg, key)).name for key in paths}
        if on_hub(cfg.init_from):  # whole, as its last part may name another model
            names["init_from"] = cfg.init_from
        public = replace(cfg, **names)
        settings = f"\nThe run's settings (train_gpt2.py):\n\n```toml\n{to_toml(public)}```\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

A language model: it continues text.

| | |
|---|---|
{table}

```python
from transformers import pipeline

complete = pipeline("text-generation", "path/to/{title}")
told = complete("Hello, I'm a language model,", max_new_tokens={length})
print(told[0]["generated_text"])
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
        move(temporary, path)
    except OSError as error:
        raise UserError(f"out_dir={path} could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(name, out_dir):
    """Write the model as the folder `out_dir`, whole or not at all."""
    model = load_model(name)
    model_type = find_kind(model.cfg)
    if has_other_tokens(name):
        raise UserError(f"{name} has a vocabulary of its own, not GPT-2's: take it as it is")
    kind = KINDS[model_type]
    with new_folder(out_dir) as folder:
        weights = tensors(model, kind)
        check_disk(out_dir, sum(p.nbytes for p in weights.values()))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        parameters = sum(p.numel() for p in weights.values())
        card = model_card(Path(out_dir).resolve().name, name, model.cfg, kind, parameters)
        (folder / "README.md").write_text(card, encoding="utf-8")
        # safetensors lets nobody else read what it writes; here the umask decides, as it does above
        shutil.copymode(folder / "README.md", folder / "model.safetensors")
        for file, content in configs(model.cfg, model_type).items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(TABLE.parent / file, folder / file)


def main():
    options = command_line(Options, __doc__)
    alone("export.py")
    export(options.model, options.out_dir)
    files = sorted(Path(options.out_dir).iterdir())
    print(f"wrote {options.out_dir}/ ({sum(f.stat().st_size for f in files) / 1e6:,.0f} MB):")
    print(f"  {', '.join(f.name for f in files)}")
    print(f'read it with AutoModelForCausalLM.from_pretrained("{options.out_dir}")')
    print("or here:", command("sample.py", f"--model={options.out_dir}"))


if __name__ == "__main__":
    run(main)
