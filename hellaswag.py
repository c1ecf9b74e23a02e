"""HellaSwag: which of four endings does the model find likeliest after a context?

    python hellaswag.py --model=log/gpt2_124m/best.pt
    python hellaswag.py --model=gpt2 --examples=1000         # 1,000 tasks spread over the file
    python hellaswag.py --model=gpt2 --data=my_tasks.jsonl --json=scores.json

Completion style, as in build-nanogpt: the context, a space, an ending. acc takes the ending with
the largest sum of token log-probabilities, acc_norm the one with the largest mean a token: of GPT-2
(124M) they are 0.2859 and 0.2955 (build-nanogpt). acc_norm_chars divides by the ending's characters
instead, as EleutherAI's harness does in what it calls acc_norm; it also cleans the texts, and
reports 0.2892 and 0.3114. Chance is 0.25, and one standard error over all 10,042 tasks is 0.0046.
"""

import contextlib
import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import hardware
from common import UserError, check_json, command_line, replacing, run, write_json
from fineweb import tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
CACHE = Path(__file__).parent / "hellaswag" / "hellaswag_val.jsonl"


# ---------------------------------------------------------------- tasks


class Task(NamedTuple):
    context: list  # token ids
    endings: list  # of token ids, four of them
    characters: list  # how many each ending has
    label: int  # which ending is right


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
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read HellaSwag tasks from {path}: {error.strerror}") from None
    tasks = [parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise UserError(f"{path} is empty: expected one JSON object a line")
    # Evenly spaced, not the first ones: the file holds 3,243 video captions and then 6,799 WikiHow
    # passages, which are twice as long. The choice is the same in every run.
    count = min(examples, len(tasks)) if examples > 0 else len(tasks)
    return [render(tasks[i * len(tasks) // count]) for i in range(count)]


@functools.cache
def shared(path, examples, runtime):
    """`load` on every rank, or none with one warning: what cannot be had must not stop a run."""
    if not examples:
        return []
    tasks, why = [], "another machine has no tasks"
    try:
        path = runtime.agree(lambda: find(path))  # one rank downloads
        tasks = load(path, examples)
    except UserError as error:
        why = error
    if runtime.all(bool(tasks)):  # or none: the score is a sum over them
        return tasks
    runtime.print(f"HellaSwag is skipped: {why}")
    return []


def parse(line, where):
    """One line of the file as a dict with a context, four endings and an integer label."""
    try:
        task = json.loads(line)
        # some copies of the data write it as a string
        task["label"] = ["0", "1", "2", "3"].index(str(task["label"]))
        texts = [task["ctx"], *task["endings"]]
        whole = len(texts) == 5 and all(isinstance(text, str) and text for text in texts)
        whole = whole and isinstance(task["endings"], list)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{where}: expected a JSON object with ctx, 4 endings and a label 0 to 3")
    return task


def render(task):
    """Tokenize one parsed line; an ending starts with a space, as GPT-2's words do."""
    encode = tokenizer().encode_ordinary
    endings = [encode(" " + ending) for ending in task["endings"]]
    return Task(encode(task["ctx"]), endings, [*map(len, task["endings"])], task["label"])


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


def predictions(model, tasks, device="cpu", rank=0, world=1, batch_tokens=0):
    """Yield (index, its picks by METRICS) of the tasks that fall to this rank.

    model.features(tokens (R, T), position (R, T), mask (R, 1, T, T)) -> (R, T, C), and
    model.text_logits((n, C)) -> (n, V). Eval mode, no_grad and autocast are the caller's.
    batch_tokens, 0 for what suits the device, only affects speed and memory.
    """
    from tqdm import tqdm

    cuda = torch.device(device).type == "cuda"
    batch_tokens = batch_tokens or (32_768 if cuda else 2048)
    # Of like length, so little is padding; longest first, so that lack of memory shows at once.
    packed = {i: pack(task, model.cfg.block_size) for i, task in enumerate(tasks)}
    order = sorted(packed, key=lambda i: -packed[i].inputs.shape[1])
    batches, first = [], 0
    while first < len(order):
        rows = max(1, batch_tokens // padded(packed[order[first]].inputs.shape[1]))
        batches.append(order[first : first + rows])
        first += rows
    batches, hidden = batches[rank::world], rank > 0 or None
    for batch in tqdm(batches, "HellaSwag", delay=5, mininterval=1, leave=False, disable=hidden):
        nll, tokens = surprise(model, [packed[i] for i in batch], device)
        characters = torch.tensor([tasks[i].characters for i in batch]).flatten()
        yield from zip(batch, pick(nll, tokens, characters), strict=True)


def surprise(model, packed, device="cpu"):
    """Sums over the four endings of each packed task, on the CPU: nats, and tokens."""
    inputs, row, column, targets, ending = collate(packed, device)
    x = model.features(*inputs)[row, column]  # (n, C), only where an ending's token is next
    parts = zip(x.split(512), targets.split(512), strict=True)  # 100 MB of logits at a time
    nll = [F.cross_entropy(model.text_logits(x).float(), t, reduction="none") for x, t in parts]
    nll, ending = torch.cat(nll).cpu().double(), ending.cpu()  # MPS has no float64
    return torch.zeros(4 * len(packed)).double().index_add_(0, ending, nll), ending.bincount()


METRICS = ("acc", "acc_norm", "acc_norm_chars")


def pick(nll, tokens, characters):
    """Sums of four endings each -> the endings that METRICS take, a list of three a task.

    Where a sum is not a number none is taken, -1: of a broken model no task is right.
    """
    by_metric = torch.stack([nll, nll / tokens, nll / characters], -1).view(-1, 4, 3)
    return by_metric.argmin(1).masked_fill(by_metric.isnan().any(1), -1).tolist()


class Packed(NamedTuple):
    """A task as one row, which reads the context once: its tokens, then those of each ending.

    An ending's last token predicts nothing and is left out. Each ending stands at the positions
    after the context and sees the context and itself, so all is as if it were the only one.
    """

    inputs: np.ndarray  # (3, n): token ids, positions, segments: 0 the context, 1 to 4 the endings
    scored: np.ndarray  # (3, m): where an ending's token is predicted, its id, its ending 0 to 3


def pack(task, block_size):
    """What is too long loses the context's left end, for all its endings alike."""
    endings = [ending[:block_size] for ending in task.endings]
    context = task.context[-(block_size + 1 - max(map(len, endings))) :]
    c = len(context)
    tokens, position, segment, places = list(context), [*range(c)], [0] * c, []
    for i, ending in enumerate(endings):
        places += [c - 1, *range(len(tokens), len(tokens) + len(ending) - 1)]
        tokens += ending[:-1]
        position += range(c, c + len(ending) - 1)
        segment += [i + 1] * (len(ending) - 1)
    scored = places, np.concatenate(endings), np.repeat(range(4), [*map(len, endings)])
    return Packed(np.array((tokens, position, segment)), np.array(scored))


def padded(length):
    """A width that holds it: few are in use, which is what compilers and allocators want."""
    return -(-length // 32) * 32


def collate(rows, device):
    """Packed tasks as (tokens (R, T), position (R, T), mask (R, 1, T, T)), and what is scored.

    That is row, column, target and ending (0 to 4R - 1), each (n,).
    """
    filled = np.zeros((3, len(rows), padded(max(row.inputs.shape[1] for row in rows))), np.int64)
    for r, row in enumerate(rows):  # padding: at the right, seen by no token, sees the context
        filled[:, r, : row.inputs.shape[1]] = row.inputs
    r = np.repeat(range(len(rows)), [row.scored.shape[1] for row in rows])
    column, target, ending = np.concatenate([row.scored for row in rows], axis=1)
    scored = torch.from_numpy(np.stack((r, column, target, 4 * r + ending))).to(device)
    tokens, position, segment = torch.from_numpy(filled).to(device)
    key, query = segment[:, None], segment[:, :, None]
    mask = ((key == query) | (key == 0)).tril()[:, None]
    return (tokens, position, mask), *scored


def evaluate(model, tasks, device="cpu", rank=0, world=1, batch_tokens=0):
    """Counts [tasks, right ones by each of METRICS] of this rank, int64 on `device`: to be summed.

    Arguments as for `predictions`. Every task is counted on exactly one rank, and the batches are
    the same for any world size, so the picks are too.
    """
    counts = torch.zeros(1 + len(METRICS), dtype=torch.int64)
    for index, picks in predictions(model, tasks, device, rank, world, batch_tokens):
        counts += torch.tensor([1, *(taken == tasks[index].label for taken in picks)])
    return counts.to(device)


def score(model, tasks, runtime):
    """METRICS over all ranks, with standard errors sqrt(p (1 - p) / n), as a dict."""
    counts = evaluate(model, tasks, runtime.device, runtime.rank, runtime.world)
    n, *correct = runtime.sum(counts).tolist()
    scores = {"tasks": n}
    for name, p in zip(METRICS, (right / n for right in correct), strict=True):
        scores |= {name: p, f"{name}_stderr": (p * (1 - p) / n) ** 0.5}
    return scores


# ---------------------------------------------------------------- command


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder or owner/name, gpt2[-medium|-large|-xl]
    examples: int = 0  # score this many tasks, spread evenly over the file; 0: all
    data: str = ""  # a .jsonl file of tasks; empty: the original, fetched once (12 MB)
    json: str = ""  # also write the scores to this file
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products


def main():
    options = command_line(Options, __doc__)
    from sample import load_text_model  # here, as train_gpt2 imports this file
    from train_gpt2 import Runtime, evaluating

    if options.examples < 0:
        raise UserError(f"--examples={options.examples} is not possible: 0 scores all tasks")
    check_json(options.json)
    telling = hardware.telling_memory("hellaswag.py", "take --device=cpu, or --dtype=bfloat16")
    with telling, contextlib.closing(Runtime(options.device, options.dtype)) as runtime:
        path = runtime.agree(lambda: find(options.data))  # one rank downloads
        tasks = load(path, options.examples)
        model = load_text_model(options.model, runtime.device)
        begin = time.perf_counter()
        with evaluating(model, runtime):
            scores = score(model, tasks, runtime)
        if runtime.rank == 0:
            report(scores, time.perf_counter() - begin, options)


def report(scores, seconds, options):
    print(f"HellaSwag, {scores['tasks']:,} tasks in {seconds:.0f} s (chance is 0.25)")
    by = ("likeliest ending", "by the mean a token, as peers quote", "by the mean a character")
    for name, what in zip(METRICS, by, strict=True):
        print(f"{name:15} {scores[name]:.4f} +- {scores[name + '_stderr']:.4f}  {what}")
    print("GPT-2 (124M) has acc_norm 0.2955 over all 10,042 tasks (build-nanogpt)")
    if options.json:
        named = {"model": options.model, "data": options.data or CACHE.name}
        write_json(options.json, named | scores)


if __name__ == "__main__":
    run(main)
