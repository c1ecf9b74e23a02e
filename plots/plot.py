"""One picture of one or several runs: the losses, and HellaSwag where it was scored.

    python plots/plot.py log/gpt2_124m                       # -> plots/loss_hellaswag.png
    python plots/plot.py log/a log/b --out=compare.png       # several runs, one picture

Reads what a run leaves in its folder: log.txt, and config.toml where there is one.
"""

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # fineweb.py is one folder up
import fineweb

# Okabe and Ito's colours, which colour-blind readers can tell apart (their yellow is too pale).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GPT2_LOSS = 3.2924  # OpenAI's GPT-2 (124M) on FineWeb-Edu's validation shard (build-nanogpt)
GPT2_HELLASWAG = 0.2955  # acc_norm of the same model (build-nanogpt)
GPT3_HELLASWAG = 0.337  # of GPT-3 (124M), in its paper
GPT2_LINE = {"color": "0.3", "linestyle": "--", "linewidth": 1}
GPT3_LINE = {"color": "0.3", "linestyle": ":", "linewidth": 1.3}


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of runs, such as log/gpt2_124m
    out: str = ""  # picture to write (.png, .svg, .pdf); empty: plots/loss_hellaswag.png


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    name: str
    streams: dict  # stream -> (steps, values)
    batch: int  # tokens an optimizer step; 0: not known
    edu: bool  # validated on FineWeb-Edu: only there can a loss be compared with GPT2_LOSS


def read_log(path):
    """A log.txt, lines of `step stream value`, as {stream: (steps, values)} in the order of steps.

    Where a step repeats (a resumed run) its last line counts. What a kill has torn is left out: a
    last line without its newline, and a line that has no such three parts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError as error:
        raise fineweb.UserError(
            f"cannot read {path}: {error.strerror}; name the folder of a run"
        ) from None
    streams = {}
    for line in lines:
        try:
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
        except ValueError:
            continue
    return {
        stream: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for stream, points in streams.items()
    }


def read_run(folder):
    folder = Path(folder)
    log, config = folder / "log.txt", folder / "config.toml"
    streams = read_log(log)
    if not streams.keys() & {"train", "val"}:
        raise fineweb.UserError(f"{log} holds no loss yet: expected lines such as `0 train 10.95`")
    try:
        settings = tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise fineweb.UserError(f"{config} is not TOML: {error}") from None
    # With grad_accum_steps the batch also depends on the number of ranks, which nothing records.
    batch = 0 if settings.get("grad_accum_steps") else settings.get("total_batch_size", 0)
    return Run(folder.resolve().name, streams, batch, "edu_fineweb" in settings.get("data_dir", ""))


# ---------------------------------------------------------------- drawing


def draw(runs, out):
    """Write the picture: one panel, or two if any run was scored on HellaSwag."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    hella = any("hella" in run.streams for run in runs)
    key = legend(runs, hella)
    size = (10 if hella else 7, 4 + 0.2 * len(key))
    fig, axes = plt.subplots(
        1, 1 + hella, figsize=size, dpi=150, layout="constrained", sharex=True, squeeze=False
    )
    axes = axes[0]

    in_tokens = all(run.batch for run in runs)  # else steps, the one thing that all runs have
    for i, run in enumerate(runs):
        color, scale = COLORS[i % len(COLORS)], run.batch if in_tokens else 1
        plot_losses(axes[0], run, color, scale)
        if "hella" in run.streams:
            steps, values = run.streams["hella"]
            axes[1].plot(steps * scale, values, "o-", color=color, markersize=3)
    label_axes(axes[0], "Loss: validation (dots) and training", "loss (nats per token)", in_tokens)
    axes[0].set_ylim(*loss_range(runs))
    if any(run.edu for run in runs):
        axes[0].axhline(GPT2_LOSS, **GPT2_LINE)
    if hella:
        label_axes(axes[1], "HellaSwag", "acc_norm (chance is 0.25)", in_tokens)
        axes[1].axhline(GPT2_HELLASWAG, **GPT2_LINE)
        axes[1].axhline(GPT3_HELLASWAG, **GPT3_LINE)
    # Under the panels, where it can cover no curve.
    fig.legend(handles=key, loc="outside lower center", frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out)
    plt.close(fig)


def plot_losses(ax, run, color, scale):
    if "train" in run.streams:
        steps, values = run.streams["train"]
        smoothed = smooth(values)
        if smoothed is not values:
            ax.plot(steps * scale, values, color=color, alpha=0.12, linewidth=0.5)
        ax.plot(steps * scale, smoothed, color=color, alpha=0.5, linewidth=1)
    if "val" in run.streams:
        steps, values = run.streams["val"]
        ax.plot(steps * scale, values, "o", color=color, markersize=3)
        trained = steps > 0  # a line from the untrained model's loss would cut the corner
        ax.plot(steps[trained] * scale, values[trained], color=color, linewidth=1.4)


def smooth(values):
    """A long stream's running mean over 2% of it, centred; a short stream as it is."""
    if len(values) <= 300:
        return values
    finite, window = np.isfinite(values), np.ones(len(values) // 50)
    total = np.convolve(np.where(finite, values, 0), window, "same")
    with np.errstate(invalid="ignore"):  # nan where a whole window is
        return total / np.convolve(finite, window, "same")


def loss_range(runs):
    """Bottom and top of the loss axis, which holds every value but a long run's first 5%.

    Those fall from 11: shown in full, they would flatten all that follows.
    """
    shown = [[GPT2_LOSS]] if any(run.edu for run in runs) else []
    for run in runs:
        for steps, values in (run.streams[s] for s in ("train", "val") if s in run.streams):
            shown.append(smooth(values)[steps >= (steps[-1] // 20 if steps[-1] > 1000 else 0)])
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
        Line2D([], [], color=COLORS[i % len(COLORS)], marker="o", markersize=4, label=describe(run))
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


def main():
    options = fineweb.command_line(Options, __doc__)
    if not options.runs:
        raise fineweb.UserError("no run is named: python plots/plot.py log/gpt2_124m")
    out = Path(options.out or Path(__file__).parent / "loss_hellaswag.png")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise fineweb.UserError(
            f"--out={out} is no picture: its name should end in .png, .svg or .pdf"
        )
    draw([read_run(folder) for folder in options.runs], out)
    print(f"wrote {out}")


if __name__ == "__main__":
    fineweb.run(main)
