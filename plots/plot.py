"""One picture of one or several runs: the losses, and HellaSwag where it was scored.

    python plots/plot.py log/gpt2_124m                       # -> plots/loss_hellaswag.png
    python plots/plot.py log/a log/b --out=compare.png       # several runs, one picture
    python plots/plot.py log/gpt2_124m --watch               # again and again while the run goes on

Reads what a run leaves in its folder: log.txt, and config.toml where there is one. Of runs with
log_norms=True there is a second picture, `<out>_norms`: gradients and updates by group of weights.
"""

import contextlib
import functools
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # common.py is one folder up
from common import UserError, check_picture, command_line, read_log, run, save_picture, tokens_at

# Okabe and Ito's colours, which colour-blind readers can tell apart (their yellow is too pale).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GPT2_LOSS = 3.2924  # OpenAI's GPT-2 (124M) on FineWeb-Edu's validation shard (build-nanogpt)
GPT2_HELLASWAG = 0.2955  # acc_norm of the same model (build-nanogpt)
GPT3_HELLASWAG = 0.337  # of GPT-3 Small (125M), in its paper
GPT2_LINE = {"color": "0.3", "linestyle": "--", "linewidth": 1}
GPT3_LINE = {"color": "0.3", "linestyle": ":", "linewidth": 1.3}
GROUPS = dict(zip(("embedding", "attention", "mlp", "norm", "other"), COLORS, strict=False))
WHOLE = "#000000"
NORM_RUNS = 4  # rows of the second picture at most
WATCH = 10  # seconds from one look at the logs to the next


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, such as log/gpt2_124m
    out: str = ""  # picture to write (.png, .svg, .pdf); empty: plots/loss_hellaswag.png
    watch: bool = False  # draw again whenever a log has grown, until Ctrl-C


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    name: str
    streams: dict  # stream -> (steps, values)
    batch: dict  # step -> tokens per optimizer step from there on; empty: not known
    edu: bool  # validated on FineWeb-Edu: only there can a loss be compared with GPT2_LOSS


class NoLoss(UserError):
    """A log in which the first loss is still to come."""


def read_streams(path):
    """A log.txt as {stream: (steps, values)} in the order of steps."""
    if not path.exists():
        raise UserError(f"cannot read {path}: there is no such file; name the folder of a run")
    return {
        stream: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for stream, points in read_log(path).items()
    }


def read_run(folder):
    folder = Path(folder)
    log, config = folder / "log.txt", folder / "config.toml"
    streams = read_streams(log)
    if not streams.keys() & {"train", "val"}:
        raise NoLoss(f"{log} holds no loss yet: expected lines such as `0 train 10.95`")
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is not TOML: {error}") from None
    name = folder.resolve().name.replace("$", r"\$")  # else matplotlib reads it as a formula
    edu = re.search("edu_fineweb|fineweb-edu", str(settings.get("data_dir"))) is not None
    batch = dict(zip(*streams.get("batch", ((), ())), strict=True))
    return Run(name, streams, batch, edu)


# ---------------------------------------------------------------- drawing


def draw(runs, out):
    """Draw the losses, and the norms of the runs that have them -> what was written, in words."""
    draw_losses(runs, out)
    logged = [run for run in runs if any(f"norm_{group}" in run.streams for group in GROUPS)]
    if not logged:
        return f"wrote {out}"
    beside = out.with_stem(f"{out.stem}_norms")
    draw_norms(logged, beside)
    return f"wrote {out} and {beside}"


@contextlib.contextmanager
def picture(out, rows, columns, size):
    """Yield a figure and its panels (rows, columns); write it whole, so that none sees a half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shared = {"sharex": True, "sharey": "col", "squeeze": False}
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **shared)
    yield fig, axes
    save_picture(fig, out)
    plt.close(fig)


def draw_losses(runs, out):
    """One panel, or two if any run was scored on HellaSwag."""
    hella = any("hella" in run.streams for run in runs)
    key = legend(runs, hella)
    size = (10 if hella else 7, 4 + 0.2 * len(key))
    in_tokens = all(run.batch for run in runs)  # else steps, the one thing that all runs have
    with picture(out, 1, 1 + hella, size) as (fig, [axes]):
        for i, run in enumerate(runs):
            x = place(run, in_tokens)
            plot_losses(axes[0], run, look(i), x)
            if "hella" in run.streams:
                steps, values = run.streams["hella"]
                axes[1].plot(x(steps), values, marker="o", markersize=3, **look(i))
        title = "Loss: validation (dots) and training"
        label_axes(axes[0], title, "loss (nats per token)", in_tokens)
        axes[0].set_ylim(*loss_range(runs))
        if any(run.edu for run in runs):
            axes[0].axhline(GPT2_LOSS, **GPT2_LINE)
        if hella:
            label_axes(axes[1], "HellaSwag", "acc_norm (chance is 0.25)", in_tokens)
            axes[1].axhline(GPT2_HELLASWAG, **GPT2_LINE)
            axes[1].axhline(GPT3_HELLASWAG, **GPT3_LINE)
        # Under the panels, where it can cover no curve.
        fig.legend(handles=key, loc="outside lower center", frameon=False, fontsize=9)


def look(i):
    """How run i is drawn: COLORS in turn, then again in other strokes."""
    strokes = ("-", "--", "-.", ":")
    style = strokes[i // len(COLORS) % len(strokes)]
    return {"color": COLORS[i % len(COLORS)], "linestyle": style}


def draw_norms(runs, out):
    """A row a run: the gradient's norm and the relative size of updates, by group of weights."""
    from matplotlib.lines import Line2D

    shown, in_tokens = runs[:NORM_RUNS], all(run.batch for run in runs)
    names = {"norm": "gradient norm, before clipping", "update": "norm of update / of weights"}
    there = {stream for run in shown for stream in run.streams}
    groups = {group: color for group, color in GROUPS.items() if f"norm_{group}" in there}
    with picture(out, len(shown), 2, (10, 0.8 + 3.4 * len(shown))) as (fig, axes):
        for i, kind in enumerate(names):
            lines = {f"{kind}_{group}": color for group, color in groups.items()}
            if kind == "norm":
                lines["norm"] = WHOLE  # the one stream that a run has without log_norms, too
            for run, ax in zip(shown, axes[:, i], strict=True):
                plot_norms(ax, run, lines, place(run, in_tokens))
                label_axes(ax, run.name, names[kind], in_tokens)
            axes[0, i].set_ylim(*norm_range(shown, lines))
        for ax in axes[:-1].flat:
            ax.set_xlabel("")  # the lowest row's is theirs too
        key = [Line2D([], [], color=c, label=f"{group} weights") for group, c in groups.items()]
        key.append(Line2D([], [], color=WHOLE, label="whole gradient"))
        title = f"the first {len(shown)} of {len(runs)} runs" if len(shown) < len(runs) else None
        where = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
        fig.legend(handles=key, title=title, ncols=len(key), **where)


def plot_norms(ax, run, lines, x):
    """Streams on a logarithmic axis, where what is not above 0 is a gap; lines: {stream: color}."""
    ax.set_yscale("log")
    for stream, color in lines.items():
        steps, values = run.streams.get(stream, (np.zeros(0), np.zeros(0)))
        logs = logarithms(values)
        smoothed = smooth(logs)
        if smoothed is not logs:
            ax.plot(x(steps), np.exp(logs), color=color, alpha=0.12, linewidth=0.5)
        ax.plot(x(steps), np.exp(smoothed), color=color, linewidth=1.2)


def norm_range(runs, lines):
    """Bottom and top of an axis of norms, without the 0.5% of each stream that are lowest.

    The first updates of a warm-up are next to nothing: shown in full, they would flatten the rest.
    """
    logs = [logarithms(run.streams[s][1]) for run in runs for s in lines if s in run.streams]
    logs = [values[np.isfinite(values)] for values in logs if np.isfinite(values).any()]
    if not logs:
        return 0.1, 1
    low, high = min(np.quantile(v, 0.005) for v in logs), max(v.max() for v in logs)
    margin = 0.05 * (high - low) + 0.1
    return np.exp(low - margin), np.exp(high + margin)


def logarithms(values):
    return np.log(np.where(np.isfinite(values) & (values > 0), values, np.nan))


def place(run, in_tokens):
    """A function: steps -> where they stand on the x axis."""
    return functools.partial(tokens_at, batch=run.batch) if in_tokens else np.asarray


def plot_losses(ax, run, look, x):
    if "train" in run.streams:
        steps, values = run.streams["train"]
        smoothed = smooth(values)
        if smoothed is not values:
            ax.plot(x(steps), values, **look, alpha=0.12, linewidth=0.5)
        ax.plot(x(steps), smoothed, **look, alpha=0.5, linewidth=1)
        finite = np.isfinite(np.array([np.nan, *smoothed, np.nan]))
        lone = finite[1:-1] & ~finite[:-2] & ~finite[2:]  # no line leads to it
        ax.plot(x(steps[lone]), smoothed[lone], ".", color=look["color"], alpha=0.5)
    if "val" in run.streams:
        steps, values = run.streams["val"]
        ax.plot(x(steps), values, "o", color=look["color"], markersize=3)
        trained = steps > 0  # a line from the untrained model's loss would cut the corner
        ax.plot(x(steps[trained]), values[trained], **look, linewidth=1.4)


def smooth(values):
    """A long stream's running mean over 2% of it, centred; a short stream as it is."""
    if len(values) <= 300:
        return values
    finite, window = np.isfinite(values), np.ones(len(values) // 50)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    with np.errstate(invalid="ignore"):  # nan where a whole window is
        return total / np.convolve(finite, window, "same")


def loss_range(runs):
    """Bottom and top of the loss axis, which holds all that came after 5% of the longest run.

    Losses fall from 11: shown in full, a long run's start would flatten the rest. Of a run that
    was shorter than that, the last value is held.
    """
    shown = [[GPT2_LOSS]] if any(run.edu for run in runs) else []
    streams = [run.streams[s] for run in runs for s in ("train", "val") if s in run.streams]
    longest = max(steps[-1] for steps, _ in streams)
    start = longest // 20 if longest > 1000 else 0
    for steps, values in streams:
        shown.append(smooth(values)[steps >= min(start, steps[-1])])
    shown = np.concatenate(shown)
    shown = shown[np.isfinite(shown)]
    low, high = (shown.min(), shown.max()) if shown.size else (0, 1)
    margin = 0.05 * (high - low) + 0.01
    return low - margin, high + margin


def label_axes(ax, title, ylabel, in_tokens):
    ax.set_title(title, fontsize=11)
    ax.set_ylabel(ylabel)
    ax.set_xlabel("training tokens" if in_tokens else "optimizer steps")
    ax.xaxis.set_major_formatter(short)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def short(number, _position=None):
    """2.5e9 -> 2.5B, 80000 -> 80K"""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def legend(runs, hella):
    """Handles of the figure's legend: each run with its last values, then the reference lines."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **look(i), marker="o", markersize=4, label=describe(run))
        for i, run in enumerate(runs)
    ]
    scores = [f"validation {GPT2_LOSS:.4f}"] * any(run.edu for run in runs)
    scores += [f"HellaSwag {GPT2_HELLASWAG:.4f}"] * hella
    if scores:
        handles.append(Line2D([], [], label="GPT-2 (124M): " + ", ".join(scores), **GPT2_LINE))
    if hella:
        label = f"GPT-3 (124M): HellaSwag {GPT3_HELLASWAG:.3f}"
        handles.append(Line2D([], [], label=label, **GPT3_LINE))
    return handles


def describe(run):
    """A run's name and its last values."""
    names = {"val": "validation", "train": "training", "hella": "HellaSwag"}
    last = {s: smooth(run.streams[s][1])[-1] for s in names if s in run.streams}
    return f"{run.name}: " + ", ".join(f"{names[s]} {value:.4f}" for s, value in last.items())


# ---------------------------------------------------------------- command


def watch(folders, out):
    """Draw, and again whenever a log has changed; a run counts from its first loss on."""
    logs, seen, said = [Path(folder, "log.txt") for folder in folders], None, None
    while True:
        sizes = [log.stat().st_size for log in logs if log.exists()]
        if sizes != seen:
            runs, seen = [], sizes
            for folder in folders:
                with contextlib.suppress(NoLoss):
                    runs.append(read_run(folder))
            news = draw(runs, out) + ", again when a log grows" if runs else "no loss yet: waiting"
            if news != said:
                print(news, flush=True)
            said = news
        time.sleep(WATCH)


def main():
    options = command_line(Options, __doc__)
    if not options.runs:
        raise UserError("no run is named: python plots/plot.py log/gpt2_124m")
    out = Path(options.out or Path(__file__).parent / "loss_hellaswag.png")
    check_picture(out)
    if options.watch:
        watch(options.runs, out)
    else:
        print(draw([read_run(folder) for folder in options.runs], out))


if __name__ == "__main__":
    run(main)
