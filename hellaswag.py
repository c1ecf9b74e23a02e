"""HellaSwag: which of four endings does the model find likeliest after a context?

    python hellaswag.py --model=log/gpt2_124m/best.pt
    python hellaswag.py --model=gpt2 --examples=1000         # 1,000 tasks spread over the file
    python hellaswag.py --model=gpt2 --data=my_tasks.jsonl --json=scores.json

Completion style, as in build-nanogpt: the context, a space, an ending. acc takes the ending with
the largest sum of token log-probabilities, acc_norm the one with the largest mean. GPT-2 (124M)
scores 0.2859 and 0.2955 this way (build-nanogpt); EleutherAI's harness renders the tasks
differently and reports 0.2892 and 0.3114. Chance is 0.25, and one standard error over all 10,042
tasks is 0.0045.
"""

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from fineweb import UserError, command_line, replacing, run, tokenizer, write_json

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
CACHE = Path(__file__).parent / "hellaswag" / "hellaswag_val.jsonl"


# ---------------------------------------------------------------- tasks


class Task(NamedTuple):
    rows: list  # 4 uint16 arrays: the context's tokens, then one ending's
    start: int  # where the ending starts in every row
    label: int  # which row is right


def find(path=""):
    """The file of tasks: `path`, or else the original, which is fetched if it is not here yet."""
    path = Path(path) if path else CACHE
    if path == CACHE and not path.exists():
        download()
    return path


def load(path="", examples=0):
    """Read tasks from a .jsonl file (default: the original, fetched once) as a list of Task.

    `examples` > 0 takes that many. Tokenized here, as a training run scores the same tasks often.
    """
    path = find(path)
    try:
        lines = [line for line in enumerate(path.read_bytes().split(b"\n"), 1) if line[1].strip()]
    except OSError as error:
        raise UserError(f"cannot read HellaSwag tasks from {path}: {error.strerror}") from None
    tasks = [parse(line, f"{path}, line {number}") for number, line in lines]
    if not tasks:
        raise UserError(f"{path} is empty: expected one JSON object a line")
    # Evenly spaced, not the first ones: the file holds 3,243 video captions and then 6,799 WikiHow
    # passages, which are twice as long. The choice is the same in every run.
    count = min(examples, len(tasks)) if examples > 0 else len(tasks)
    return [render(tasks[i * len(tasks) // count]) for i in range(count)]


@functools.cache
def shared(path, examples, runtime):
    """`load` on every rank, or none with one warning: what cannot be had must not stop a run."""
    try:
        path = runtime.agree(lambda: find(path))  # one rank downloads
        tasks = load(path, examples)
    except UserError as error:
        runtime.print(f"HellaSwag is skipped: {error}")
        tasks = []
    # all ranks or none: the score is a sum over them
    ready = runtime.sum(torch.tensor(float(bool(tasks)))).item()
    return tasks if ready == runtime.world else []


def parse(line, where):
    """One line of the file as a dict with a context, four endings and an integer label."""
    try:
        task = json.loads(line)
        task["label"] = int(task["label"])  # some copies of the data write it as a string
        texts = [task["ctx"], *task["endings"]]
        whole = len(texts) == 5 and all(isinstance(text, str) and text for text in texts)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or task["label"] not in range(4):
        raise UserError(f"{where}: expected a JSON object with ctx, 4 endings and a label 0 to 3")
    return task


def render(task):
    """Tokenize one parsed line; an ending starts with a space, as GPT-2's words do."""
    encode = tokenizer().encode_ordinary
    context = encode(task["ctx"])
    rows = [np.array(context + encode(" " + end), dtype=np.uint16) for end in task["endings"]]
    return Task(rows, len(context), task["label"])


def download():
    """Fetch the original validation file; what is cut or altered never gets CACHE's name."""
    try:
        CACHE.parent.mkdir(exist_ok=True)
        with replacing(CACHE) as temporary:
            size, digest = fetch(temporary)
            if (size, digest) != (SIZE, SHA256):
                raise UserError(
                    f"{URL} gave {size:,} bytes, sha256 {digest[:8]}, not {SIZE:,}, {SHA256[:8]}\n"
                    "try again later, or name a file at hand (--data, hellaswag_path)"
                )
    except OSError as error:  # requests' errors are OSErrors too
        raise UserError(
            f"could not fetch HellaSwag ({error.strerror or type(error).__name__})\n"
            f"fetch {URL} elsewhere and put it at {CACHE}"
        ) from None


def fetch(path):
    """Stream URL into `path`; returns (bytes, sha256)."""
    import requests
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        requests.get(URL, stream=True, timeout=30) as response,
        tqdm(total=SIZE, desc=CACHE.name, unit="B", unit_scale=True) as bar,
        open(path, "wb") as file,
    ):
        response.raise_for_status()
        for chunk in response.iter_content(1 << 16):
            digest.update(chunk)
            bar.update(file.write(chunk))
        return file.tell(), digest.hexdigest()


# ---------------------------------------------------------------- scoring


def predictions(logits_at, tasks, block_size, device="cpu", rank=0, world=1, batch_rows=64):
    """Yield (index, pick by sum, pick by mean) of the tasks that fall to this rank.

    logits_at(tokens (R, T) int64, mask (R, T) bool) -> (n, V) logits at the masked positions in
    row-major order: a vocabulary-wide row only where an ending's token is predicted. Rows longer
    than block_size lose their left end. Eval mode, inference_mode and autocast are the caller's.
    """
    from tqdm import tqdm

    # Of like length, so little is padding; longest first, so that lack of memory shows at once.
    order = sorted(range(len(tasks)), key=lambda i: -max(map(len, tasks[i].rows)))
    per_batch = max(1, batch_rows // 4)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)][rank::world]
    bar = tqdm(batches, "HellaSwag", delay=5, mininterval=1, leave=False, disable=rank != 0)
    for batch in bar:
        tokens, targets, mask = collate([tasks[i] for i in batch], block_size, device)
        logits = logits_at(tokens, mask)
        nll = torch.zeros(mask.shape, device=device)
        nll[mask] = F.cross_entropy(logits.float(), targets[mask], reduction="none")
        total = nll.sum(1)
        mean = total / mask.sum(1)
        picks = torch.stack([total, mean]).view(2, -1, 4).argmin(-1).tolist()
        yield from zip(batch, *picks, strict=True)


def collate(tasks, block_size, device):
    """Tasks as tokens, targets (R, T) int64 and mask (R, T) bool, four rows a task.

    The mask is where the target is an ending's token. Padding is on the right, where causal
    attention cannot see it, up to a multiple of 32: few shapes, which is what compilers want.
    """
    rows = []
    for task in tasks:
        for row in task.rows:
            cut = max(0, len(row) - (block_size + 1))
            rows.append((row[cut:], max(1, task.start - cut)))
    longest = max(len(row) - 1 for row, _ in rows)
    width = min(-(-longest // 32) * 32, block_size)
    tokens = np.zeros((len(rows), width + 1), dtype=np.int64)
    mask = np.zeros((len(rows), width + 1), dtype=bool)
    for r, (row, start) in enumerate(rows):
        tokens[r, : len(row)] = row
        mask[r, start : len(row)] = True
    tokens, mask = torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
    return tokens[:, :-1], tokens[:, 1:], mask[:, 1:]


def evaluate(logits_at, tasks, block_size, device="cpu", rank=0, world=1, batch_rows=64):
    """Counts [right by sum, right by mean, tasks] of this rank, int64 on `device`: to be summed.

    Arguments as for `predictions`. Every task is counted on exactly one rank, and the batches are
    the same for any world size, so the picks are too.
    """
    counts = [0, 0, 0]
    picks = predictions(logits_at, tasks, block_size, device, rank, world, batch_rows)
    for index, by_sum, by_mean in picks:
        label = tasks[index].label
        counts = [counts[0] + (by_sum == label), counts[1] + (by_mean == label), counts[2] + 1]
    return torch.tensor(counts, device=device)


def score(logits_at, tasks, block_size, runtime):
    """acc and acc_norm over all ranks, with standard errors sqrt(p (1 - p) / n), as a dict."""
    counts = evaluate(logits_at, tasks, block_size, runtime.device, runtime.rank, runtime.world)
    correct, correct_norm, n = runtime.sum(counts).tolist()
    scores = {"tasks": n}
    for name, p in (("acc", correct / n), ("acc_norm", correct_norm / n)):
        scores |= {name: p, f"{name}_stderr": (p * (1 - p) / n) ** 0.5}
    return scores


# ---------------------------------------------------------------- command


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    examples: int = 0  # score this many tasks, spread evenly over the file; 0: all
    data: str = ""  # a .jsonl file of tasks; empty: the original, fetched once (12 MB)
    json: str = ""  # also write the scores to this file
    device: str = "auto"  # auto, cuda, mps or cpu


def main():
    options = command_line(Options, __doc__)
    from sample import load_text_model  # here, as train_gpt2 imports this file
    from train_gpt2 import Runtime

    tasks = load(options.data, options.examples)
    runtime = Runtime(device=options.device, dtype="auto")
    model = load_text_model(options.model, runtime.device)
    begin = time.perf_counter()
    with torch.inference_mode(), runtime.autocast():
        scores = score(model.logits_at, tasks, model.cfg.block_size, runtime)
    seconds = time.perf_counter() - begin
    print(f"HellaSwag, {len(tasks):,} tasks in {seconds:.0f} s (chance is 0.25)")
    for name, what in (("acc", "likeliest ending by sum"), ("acc_norm", "by mean, as peers quote")):
        print(f"{name:8}  {scores[name]:.4f} +- {scores[name + '_stderr']:.4f}  {what}")
    print("GPT-2 (124M) has acc_norm 0.2955 over all 10,042 tasks (build-nanogpt)")
    if options.json:
        scores = {"model": options.model, "data": options.data or CACHE.name} | scores
        write_json(options.json, scores)


if __name__ == "__main__":
    run(main)
