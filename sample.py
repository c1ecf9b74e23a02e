"""Text from a model: a prompt in, its continuation out, printed as it is made.

    python sample.py --model=log/gpt2_124m/best.pt --prompt="The capital of France"
    python sample.py --model=gpt2 --prompt="Once upon a time" --num_samples=4 --preset=conservative
    python sample.py --model=gpt2 --temperature=0.9 --top_k=100     # no prompt: a new document
    python sample.py --model=gpt2 --interactive                     # prompts typed, one a line

The model continues text; it was not taught to answer. It stops where the document ends, or after
max_new_tokens. Of a long prompt it reads the last block_size tokens.
"""

import codecs
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch.nn import functional as F

import hardware
from common import UserError, alone, command_line, run
from fineweb import END_OF_TEXT, tokenizer
from pretrained import has_other_tokens
from train_gpt2 import (
    VOCABULARY,
    Runtime,
    Sampling,
    complete,
    evaluating,
    generate,
    load_model,
    next_logits,
)

PRESETS = {
    "conservative": Sampling(temperature=0.6, top_k=40),
    "nucleus": Sampling(temperature=0.8, top_p=0.9),
    "greedy": Sampling(temperature=0),
}


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder or owner/name, gpt2[-medium|-large|-xl]
    prompt: str = ""  # the text to continue; "" = start a document
    preset: Literal["conservative", "nucleus", "greedy"] = "nucleus"  # sets the four below
    temperature: float | None = None  # 0 = always the likeliest token; 1 = the model's own odds
    top_k: int | None = None  # draw from the k likeliest tokens; 0 = all
    top_p: float | None = None  # draw from the fewest tokens whose odds reach p; 1 = all
    repetition_penalty: float | None = None  # above 1 makes tokens seen before less likely; 1 = off
    max_new_tokens: int = 256  # at most, for each sample
    num_samples: int = 1  # more than one are made as one batch
    seed: int = 1337  # the same seed gives the same text; interactive adds 1 for each prompt
    interactive: bool = False  # read prompts from the terminal until an empty one
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products


def sampling(options):
    """The preset with the fields that the options set themselves; impossible values are refused."""
    limits = {"max_new_tokens": (1, 2**31), "num_samples": (1, 2**31), "seed": (0, 2**63)}
    for key, (least, most) in limits.items():
        if not least <= (value := getattr(options, key)) < most:
            must = f"it must be {least} or more, and below {most}"
            raise UserError(f"{key}={value} is not possible: {must}")
    own = {key: getattr(options, key) for key in asdict(PRESETS["greedy"])}
    own = {key: value for key, value in own.items() if value is not None}
    return replace(PRESETS[options.preset], **own)


def load_text_model(name, device="cpu"):
    """`load_model` where text goes in or out: UserError if the ids are not GPT-2's."""
    model, own = load_model(name, device), None
    if model.cfg.vocab_size < VOCABULARY:
        own = f"vocab_size={model.cfg.vocab_size}"
    elif has_other_tokens(name):
        own = "a vocabulary of its own"
    if own:
        tokens = f"it was trained on other tokens than GPT-2's {VOCABULARY}"
        raise UserError(f"{name} has {own}: {tokens}, so text means nothing to it")
    return model


def by_columns(model, dtype):
    """Store the head transposed where MKL then multiplies one row by it up to four times as fast.

    That is in float32 on a CPU. In bfloat16 see `one_row`, for which it would be slow.
    """
    if (head := model.lm_head.weight).device.type == "cpu" and dtype == torch.float32:
        head.data = head.t().contiguous().t()
    return model


def one_row(model, idx, *where):
    """`next_logits`; on a CPU torch multiplies one row in bfloat16 twice as fast as oneDNN does."""
    mkldnn = torch.backends.mkldnn  # oneDNN by its former name
    was = mkldnn.enabled
    mkldnn.enabled = was and idx.numel() > 1
    try:
        return next_logits(model, idx, *where)
    finally:
        mkldnn.enabled = was


class GraphedStep:
    """`next_logits` on CUDA: a step of one token is replayed as a graph, without its launches."""

    def __init__(self, step=next_logits):
        self.step, self.graph = step, None

    def __call__(self, model, idx, position, mask, cache):
        if idx.size(1) > 1:
            return next_logits(model, idx, position, mask, cache)
        mask = F.pad(mask, (0, cache.size - mask.size(1)))  # a graph looks at all keys
        if self.graph is None:
            self.capture(model, cache, idx, position, mask)
        for held, new in zip(self.inputs, (idx, position, mask), strict=True):
            held.copy_(new)
        self.graph.replay()
        return self.logits

    def capture(self, model, cache, *inputs):
        self.inputs, side = [x.clone() for x in inputs], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # first calls set up what no graph may hold
            for _ in range(2):  # the second, compiled, meets the cache's tensors
                self.step(model, *self.inputs, cache)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(model, *self.inputs, cache)


def best_step(device, step=next_logits):
    """The step for one call of generate(): on CUDA a graph of `step`, which holds its cache."""
    return GraphedStep(step) if device.type == "cuda" else one_row


def stream(model, prompt, how, max_new_tokens, seed):
    """Yield a continuation in pieces of whole characters, though a token may end inside one."""
    device = next(model.parameters()).device
    tokens = tokenizer().encode_ordinary(prompt) or [END_OF_TEXT]
    generator = torch.Generator(device).manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    idx = torch.tensor([tokens], device=device)
    for new in generate(model, idx, max_new_tokens, how, generator, best_step(device)):
        if new.item() != END_OF_TEXT:
            yield decoder.decode(tokenizer().decode_single_token_bytes(new.item()))
    yield decoder.decode(b"", final=True)


def typed_prompt():
    try:
        return input("prompt> ")
    except (EOFError, RuntimeError):  # the latter where there is no stdin at all
        print()
        return ""


def show(model, prompt, how, options, seed):
    """Print one continuation as it grows, or several under a rule each."""
    if options.num_samples == 1:
        print(prompt, end="", flush=True)
        for piece in stream(model, prompt, how, options.max_new_tokens, seed):
            print(piece, end="", flush=True)
        print()
        return
    step = best_step(next(model.parameters()).device)
    texts = complete(model, prompt, how, options.num_samples, options.max_new_tokens, seed, step)
    for i, text in enumerate(texts, 1):
        rule = f"---- {i} of {len(texts)} ".ljust(72, "-")
        print(f"{rule}\n{prompt}{text}")


def main():
    options = command_line(Options, __doc__)
    how = sampling(options)
    alone("sample.py")
    if options.interactive and options.prompt:
        raise UserError("--interactive asks for prompts: leave --prompt out")
    runtime = Runtime(options.device, options.dtype)
    prompts = iter(typed_prompt, "") if options.interactive else [options.prompt]
    with hardware.telling_memory("sample.py", "lower --num_samples, or take --device=cpu"):
        model = by_columns(load_text_model(options.model, runtime.device), runtime.dtype)
        with evaluating(model, runtime):
            for i, prompt in enumerate(prompts):
                show(model, prompt, how, options, options.seed + i)


if __name__ == "__main__":
    run(main)
