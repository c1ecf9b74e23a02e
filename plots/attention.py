"""Where the attention heads of one layer look in a text, or those of all layers in small.

    python plots/attention.py --model=log/gpt2_124m/best.pt --text="The cat sat on the mat."
    python plots/attention.py --model=gpt2 --text="The cat sat on the mat." --layer=5 --out=5.png
    python plots/attention.py --model=gpt2 --text="The cat sat on the mat." --overview=True

A row is the token that looks, a column one that it looks at; the weights of a row sum to 1.
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # train_gpt2.py is one folder up
import torch

from common import UserError, check_picture, command_line, run, save_picture
from fineweb import tokenizer
from sample import load_text_model

MAX_TOKENS = 64  # more would be too small to see
WIDTH = 7.8  # inches that the panels share


@dataclass(frozen=True)
class Options:
    model: str  # a checkpoint, a Hugging Face folder or owner/name, gpt2[-medium|-large|-xl]
    text: str  # what the model reads; up to 64 tokens of it
    layer: int = -1  # the layer to draw, from 0; -1 = the last
    overview: bool = False  # all layers in small, instead of one
    out: str = ""  # .png, .svg or .pdf; "" = attention.png, beside a checkpoint or right here


@torch.inference_mode()
def attention_weights(model, idx):
    """Token ids (1, T) -> weights (n_layer, n_head, T, T), float32, of the model's forward pass."""
    layers = []

    def look(attn, args):
        x, rope, *_ = args
        q, k, _ = attn.qkv(x, rope)
        scores = q.float() @ k.float().mT / math.sqrt(q.size(-1))
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        layers.append(scores.masked_fill(future, -math.inf).softmax(-1)[0])

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.transformer.h]
    model.features(idx)
    for hook in hooks:
        hook.remove()
    return torch.stack(layers)


@functools.cache
def font():
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties()))


def label(token):
    """A token as short text: spaces are dots, parts of a character are bytes."""
    text = tokenizer().decode_single_token_bytes(token).decode("utf-8", "backslashreplace")

    def seen(c):
        return c.isprintable() and font().get_char_index(ord(c))

    text = "".join(c if seen(c) else ascii(c)[1:-1] for c in text).replace(" ", "·")
    return text if len(text) <= 12 else f"{text[:11]}…"


def new_figure(height):
    """A figure as wide as a README and with `height` inches for panels; it opens no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH + 1.7, height + 0.8), layout="constrained")


def paint(ax, weights):
    """One hue, light to dark, suits every eye; a square-root scale shows small weights too."""
    from matplotlib.colors import PowerNorm

    ax.set_facecolor("0.9")  # what is not painted: the future, and the gaps of the overview
    return ax.imshow(weights.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))


def add_scale(fig, image, axes):
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
    fig.colorbar(image, ax=axes, label="attention weight", ticks=ticks, shrink=0.6, aspect=40)


def draw_layer(weights, tokens):
    """weights (n_head, T, T) -> a figure with a panel for each head."""
    heads, T = len(weights), len(tokens)
    columns = math.isqrt(heads)
    rows, panel = math.ceil(heads / columns), WIDTH / columns
    size = min(0.75 * 72 * panel / T, 9)  # points a token's label has room for
    fig = new_figure(panel * rows)
    axes = [fig.add_subplot(rows, columns, 1 + head) for head in range(heads)]
    for head, ax in enumerate(axes):
        image = paint(ax, weights[head])
        ax.set_title(f"head {head}", fontsize=9)
        ax.tick_params(length=2, labelleft=head % columns == 0, labelbottom=head + columns >= heads)
        if size >= 5:  # else matplotlib numbers the positions
            text = {"labels": [*map(label, tokens)], "fontsize": size, "parse_math": False}
            ax.set_yticks(range(T), **text)
            ax.set_xticks(range(T), rotation=90, **text)
    fig.supylabel("token that looks", fontsize=9)
    fig.supxlabel("token that it looks at", fontsize=9)
    add_scale(fig, image, axes)
    return fig


def draw_overview(weights):
    """weights (n_layer, n_head, T, T) -> a figure: a row for each layer, a column for each head."""
    layers, heads, T, _ = weights.shape
    panel, gap = min(WIDTH / heads, 2.0), max(1, T // 12)
    tiles = torch.nn.functional.pad(weights, (0, gap, 0, gap), value=math.nan)
    mosaic = tiles.transpose(1, 2).reshape(layers * (T + gap), heads * (T + gap))
    fig = new_figure(panel * layers)
    ax = fig.add_subplot()
    image = paint(ax, mosaic[:-gap, :-gap])
    middles = [(T - 1) / 2 + i * (T + gap) for i in range(max(layers, heads))]
    ax.set_yticks(middles[:layers], range(layers))
    ax.set_xticks(middles[:heads], range(heads))
    ax.set(ylabel="layer", xlabel="head")
    ax.tick_params(length=0, labelsize=8)
    add_scale(fig, image, [ax])
    return fig


def main():
    options = command_line(Options, __doc__)
    beside = Path(options.model).parent if options.model.endswith(".pt") else Path()
    out = Path(options.out or beside / "attention.png")
    check_picture(out)
    tokens = tokenizer().encode_ordinary(options.text)
    if not tokens:
        raise UserError('--text is empty: try --text="The cat sat on the mat."')
    model = load_text_model(options.model)
    layers, most = model.cfg.n_layer, min(MAX_TOKENS, model.cfg.block_size)
    if not -1 <= options.layer < layers:
        raise UserError(f"--layer={options.layer}: the model has layers 0 to {layers - 1}")
    if len(tokens) > most:
        print(f"the text has {len(tokens)} tokens; only the first {most} are drawn")
    weights = attention_weights(model, torch.tensor([tokens[:most]]))
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    weights = weights.masked_fill(future, math.nan)  # not zero: not to be looked at
    if options.overview:
        fig, title = draw_overview(weights), f"Attention, layers 0 to {layers - 1}"
    else:
        fig = draw_layer(weights[options.layer], tokens[:most])
        title = f"Attention in layer {options.layer % layers} (of 0 to {layers - 1})"
    fig.suptitle(title, fontsize=11)
    save_picture(fig, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
