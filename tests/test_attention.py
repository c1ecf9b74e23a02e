import errno
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from common import UserError
from fineweb import tokenizer
from plots import attention
from plots.attention import attention_weights, label

CAT = "The cat sat on the mat."


@pytest.fixture
def model(tiny, make_model):
    return make_model(replace(tiny, vocab_size=50304, n_layer=3))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, model):
    """Run plots/attention.py in this process on `model`; returns what it prints."""
    torch.save({"model": model.state_dict(), "config": asdict(model.cfg)}, tmp_path / "best.pt")

    def run(*flags):
        flags = [f"--model={tmp_path / 'best.pt'}", *flags]
        monkeypatch.setattr(sys, "argv", ["attention.py", *flags])
        attention.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    return figures


# ---------------------------------------------------------------- the weights


@torch.inference_mode()
def test_weights_times_values_projected_are_the_output_of_the_module(tiny, toggles, make_model):
    model = make_model(replace(tiny, **toggles))
    idx = torch.randint(512, (1, 16), generator=torch.Generator().manual_seed(0))
    weights, seen = attention_weights(model, idx), []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda attn, args, out: seen.append((attn, args, out)))
    model(idx)
    assert len(seen) == len(weights) == 2
    for (attn, (x, rope, *_), out), layer in zip(seen, weights, strict=True):
        _, _, v = attn.qkv(x, rope)
        by_hand = attn.c_proj((layer @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(by_hand, out, atol=1e-5, rtol=1e-5)


def test_rows_sum_to_one_and_no_weight_falls_on_the_future(model):
    weights = attention_weights(model, torch.tensor([tokenizer().encode_ordinary(CAT)]))
    assert weights.shape == (3, 2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7))
    assert not weights.triu(1).any()
    uniform = 1 / torch.arange(1, 8.0)[:, None]
    assert (weights - uniform).tril().abs().max() > 0.1


def test_looking_leaves_the_model_as_it_was(model):
    attention_weights(model, torch.tensor([[1, 2, 3]]))
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)


# ---------------------------------------------------------------- the picture


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" cat", "·cat"),
        ("\n", "\\n"),
        ("é", "é"),
        ("の", "\\u306e"),
        ("-" * 16, "-----------…"),
        ("$$", "$$"),
    ],
)
def test_labels_are_short_and_show_what_cannot_be_seen(text, expected):
    [token] = tokenizer().encode_ordinary(text)
    assert label(token) == expected


def test_a_token_of_a_part_of_a_character_is_labelled_by_its_bytes():
    tokens = tokenizer().encode_ordinary("🎉")
    assert [label(token) for token in tokens] == ["\\xf0\\x9f", "\\x8e", "\\x89"]


def test_default_is_the_last_layer_beside_the_checkpoint(command, tmp_path, drawn):
    printed = command(f"--text={CAT}")
    assert printed == f"wrote {tmp_path / 'attention.png'}\n"
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    assert "layer 2" in figure.get_suptitle()


def test_each_head_has_its_panel_with_its_weights_and_the_tokens(command, model, tmp_path, drawn):
    out = tmp_path / "new" / "a.svg"
    assert command(f"--text={CAT}", "--layer=1", f"--out={out}") == f"wrote {out}\n"
    assert out.exists()
    [figure] = drawn
    panels = [ax for ax in figure.axes if ax.get_title().startswith("head")]
    tokens = tokenizer().encode_ordinary(CAT)
    weights = attention_weights(model, torch.tensor([tokens]))[1]
    past = torch.ones(7, 7, dtype=torch.bool).tril()
    for ax, head in zip(panels, weights, strict=True):
        image = torch.from_numpy(ax.images[0].get_array().filled(-1.0))
        torch.testing.assert_close(image[past], head[past])
        assert (image[~past] == -1).all()  # masked: nothing is painted
        assert [text.get_text() for text in ax.get_yticklabels()] == [*map(label, tokens)]


def test_the_overview_has_a_row_for_each_layer_and_a_column_for_each_head(command, model, drawn):
    command(f"--text={CAT}", "--overview=True")
    [figure] = drawn
    ax = figure.axes[0]
    mosaic = ax.images[0].get_array()
    tokens = tokenizer().encode_ordinary(CAT)
    weights = attention_weights(model, torch.tensor([tokens]))
    for layer, y in enumerate(ax.get_yticks()):
        for head, x in enumerate(ax.get_xticks()):
            tile = mosaic[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4]
            torch.testing.assert_close(torch.from_numpy(tile.filled(0)), weights[layer, head])
    assert (len(ax.get_yticks()), len(ax.get_xticks())) == (3, 2)


def test_text_is_cut_to_what_model_and_picture_hold_and_that_is_said(command, drawn):
    printed = command(f"--text={'cat ' * 100}").splitlines()
    assert printed[0] == "the text has 101 tokens; only the first 16 are drawn"
    assert drawn[0].axes[0].images[0].get_array().shape == (16, 16)


def test_picture_is_whole_or_as_before(command, tmp_path, monkeypatch):
    out = tmp_path / "keep.png"
    out.write_bytes(b"old")

    def savefig(figure, path, **how):
        Path(path).write_bytes(b"half")
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(UserError, match=r"keep\.png cannot be written: .*File too large"):
        command("--text=cat", f"--out={out}")
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


def test_text_that_looks_like_a_formula_is_drawn_as_text(command, tmp_path):
    command("--text=costs $$ x $ y_1^$ \x00 \t end")
    assert (tmp_path / "attention.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=cat", "--layer=3"], "layers 0 to 2"),
        (["--text=cat", "--layer=-2"], "layers 0 to 2"),
        (["--text="], "text is empty"),
        (
            ["--text=cat", "--out=picture.doc"],
            r"picture\.doc is not a picture: its name should end in",
        ),
    ],
)
def test_mistakes_are_named(command, flags, message):
    with pytest.raises(UserError, match=message):
        command(*flags)
