import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from plots import plot

SCRIPT = Path(plot.__file__)


def read(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text, encoding="utf-8")
    return {s: [x.tolist() for x in pair] for s, pair in plot.read_streams(path).items()}


def write_run(folder, steps=40, hella=False, norms=0, config="n_layer = 4\n", batch="4096"):
    folder.mkdir(parents=True)
    lines = [f"0 batch {batch}"] if batch else []
    lines += [f"{step} train {11 / (1 + step) + 3!r}" for step in range(steps)]
    lines += [f"{step} val {11 / (1 + step) + 3.1!r}" for step in range(0, steps + 1, 10)]
    lines += [f"{step} hella 0.26" for step in range(10, steps + 1, 10) if hella]
    for i, group in enumerate(list(plot.GROUPS)[:norms]):
        lines += [f"{step} norm_{group} {(1 + i) / (1 + step)!r}" for step in range(steps)]
        lines += [f"{step} update_{group} {1e-4 * (1 + i)!r}" for step in range(steps)]
    lines += [f"{step} norm {6 / (1 + step)!r}" for step in range(steps)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config:
        (folder / "config.toml").write_text(config, encoding="utf-8")
    return str(folder)


def run_plot(*args, cwd):
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, by the name of their file."""
    drawn, picture = {}, plot.picture

    @contextlib.contextmanager
    def keep(out, *args):
        with picture(out, *args) as (fig, axes):
            drawn[out.name] = fig
            yield fig, axes

    monkeypatch.setattr(plot, "picture", keep)
    return drawn


@pytest.fixture
def watch(monkeypatch):
    """Watch while files grow, by (path, text) or None after each look -> the runs it drew."""

    def run(folders, out, *events):
        looks, events, draw = [[]], list(events), plot.draw

        def sleep(seconds):
            if not events:
                raise KeyboardInterrupt
            looks.append([])
            if event := events.pop(0):
                path, text = event
                path.write_text(path.read_text() + text)

        def note(runs, out):
            looks[-1] += [run.name for run in runs]
            return draw(runs, out)

        monkeypatch.setattr(plot, "draw", note)
        monkeypatch.setattr(plot, "time", SimpleNamespace(sleep=sleep))
        with pytest.raises(KeyboardInterrupt):
            plot.watch(folders, out)
        return looks

    return run


def size_of_png(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


# ---------------------------------------------------------------- reading


def test_streams_are_apart_and_in_the_order_of_steps(tmp_path):
    text = "0 train 10.9\n0 lr 1e-05\n2 train 9.0\n1 train 9.5\n1 val 9.25\n"
    assert read(tmp_path, text) == {
        "train": [[0, 1, 2], [10.9, 9.5, 9.0]],
        "lr": [[0], [1e-05]],
        "val": [[1], [9.25]],
    }


def test_last_line_wins_where_a_step_repeats(tmp_path):
    text = "1 train 9.0\n2 train 8.0\n3 train 7.0\n2 train 8.5\n2 val 1.0\n"
    assert read(tmp_path, text)["train"] == [[1, 2, 3], [9.0, 8.5, 7.0]]


def test_torn_last_line_is_left_out(tmp_path):
    # "7.1" may be what was written of 7.1853: only the newline says that a number is whole.
    assert read(tmp_path, "1 train 9.0\n2 train 7.1") == {"train": [[1], [9.0]]}
    assert read(tmp_path, "1 train 9.0\n2 tra") == {"train": [[1], [9.0]]}


def test_line_torn_in_the_middle_is_left_out(tmp_path):
    assert read(tmp_path, "1 train 9.0\n2 tra\n2 train 8.0\n3 train 7.9 4 val\n") == {
        "train": [[1, 2], [9.0, 8.0]]
    }


def test_non_finite_values_are_kept(tmp_path):
    train = read(tmp_path, "1 train nan\n2 train 8.0\n3 train inf\n")["train"]
    assert train[0] == [1, 2, 3] and np.isnan(train[1][0]) and train[1][1:] == [8.0, np.inf]


def test_empty_log_has_no_stream(tmp_path):
    assert read(tmp_path, "") == {}


def test_missing_and_empty_logs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.log\.txt"):
        plot.read_run(tmp_path / "nowhere")
    (tmp_path / "log.txt").write_text("0 lr 0.1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"log\.txt holds no loss yet"):
        plot.read_run(tmp_path)


def test_broken_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml is not TOML"):
        plot.read_run(write_run(tmp_path / "a", config="data_dir =\n"))
    (tmp_path / "a" / "config.toml").write_bytes(b'data_dir = "\xff"\n')
    with pytest.raises(UserError, match=r"config\.toml is not TOML"):
        plot.read_run(tmp_path / "a")


def test_values_of_other_kinds_in_a_config_count_for_nothing(tmp_path):
    assert not plot.read_run(write_run(tmp_path / "a", config="data_dir = 5\n")).edu


def test_name_that_looks_like_a_formula_is_drawn_as_text(tmp_path, figures):
    run = plot.read_run(write_run(tmp_path / r"a$\bad$", norms=4))
    plot.draw([run], tmp_path / "x.png")
    assert set(figures) == {"x.png", "x_norms.png"}


def test_runs_stand_over_tokens_whatever_their_batches_or_over_steps(tmp_path, figures):
    folder = write_run(tmp_path / "a", hella=True)
    with open(tmp_path / "a" / "log.txt", "a", encoding="utf-8") as log:
        log.write("20 batch 1000\n")  # as a resume may
    run, other = plot.read_run(folder), plot.read_run(write_run(tmp_path / "b", batch="10"))
    unknown = plot.read_run(write_run(tmp_path / "c", batch=""))
    seen = [4096 * min(step, 20) + 1000 * max(0, step - 20) for step in range(41)]
    for runs, label, x in (
        ([run, other], "training tokens", seen),
        ([run, unknown], "optimizer steps", range(41)),
    ):
        plot.draw(runs, tmp_path / "x.png")
        losses, hella = figures["x.png"].axes
        assert losses.get_xlabel() == hella.get_xlabel() == label
        drawn = [line.get_xydata().tolist() for line in (*losses.lines, *hella.lines)]
        for stream in ("train", "val", "hella"):
            points = zip(*run.streams[stream], strict=True)
            assert [[x[step], value] for step, value in points] in drawn


# ---------------------------------------------------------------- drawing


def test_smoothing_keeps_a_constant_and_fills_holes():
    values = np.full(5000, 3.0)
    values[[0, 100, 4999]] = np.nan
    assert np.allclose(plot.smooth(values), 3.0)
    assert len(plot.smooth(values)) == 5000
    short = np.array([1.0, 5.0])
    assert plot.smooth(short) is short


def test_loss_axis_leaves_out_the_first_fall_of_a_long_run_only():
    def one(steps):
        values = np.where(np.arange(steps) < steps // 25, 11.0, 3.0)
        return plot.Run("a", {"train": (np.arange(steps), values)}, 0, False)

    assert plot.loss_range([one(10_000)])[1] < 3.1
    assert plot.loss_range([one(10_000), one(2000)])[1] < 3.1
    high = plot.Run("b", {"train": (np.arange(50), np.full(50, 5.0))}, 0, False)
    assert 5 < plot.loss_range([one(10_000), high])[1] < 5.5
    assert plot.loss_range([one(500)])[1] > 11


def test_numbers_are_short():
    shown = [plot.short(n) for n in (0, 250, 80_000, 1_200_000, 2_500_000_000)]
    assert shown == ["0", "250", "80K", "1.2M", "2.5B"]


def test_one_panel_without_hellaswag_and_two_with_it(tmp_path):
    plain = plot.read_run(write_run(tmp_path / "plain"))
    scored = plot.read_run(write_run(tmp_path / "scored", hella=True))
    plot.draw([plain], tmp_path / "one.png")
    plot.draw([plain, scored], tmp_path / "new" / "two.png")
    assert size_of_png(tmp_path / "one.png")[0] == 7 * 150
    assert size_of_png(tmp_path / "new" / "two.png")[0] == 10 * 150


def test_legend_tells_last_values_and_compares_only_what_can_be_compared(tmp_path):
    def labels(hella, config):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run = plot.read_run(write_run(folder, hella=hella, config=config))
        return run.name, [handle.get_label() for handle in plot.legend([run], hella)]

    name, shown = labels(hella=False, config='data_dir = "python_docs"\n')
    assert shown == [f"{name}: validation 3.3683, training 3.2750"]
    _, shown = labels(hella=False, config='data_dir = "data/edu_fineweb10B"\n')
    assert shown[1:] == ["GPT-2 (124M): validation 3.2924"]
    _, shown = labels(hella=True, config='data_dir = "python_docs"\n')
    assert shown[0].endswith("HellaSwag 0.2600")
    assert shown[1:] == ["GPT-2 (124M): HellaSwag 0.2955", "GPT-3 (124M): HellaSwag 0.337"]


def test_lines_stand_where_the_legend_says_and_only_where_they_can_be_compared(tmp_path, figures):
    def level_lines(ax):
        ends = [(line, set(line.get_ydata())) for line in ax.lines]
        return {(*y, line.get_linestyle()) for line, y in ends if list(line.get_xdata()) == [0, 1]}

    for name, edu in (("python_docs", False), ("edu_fineweb10B", True)):
        folder = Path(write_run(tmp_path / name, config=f'data_dir = "{name}"\n'))
        (folder / "log.txt").write_text("0 train 6\n1 val 6\n1 hella 0.26\n", encoding="utf-8")
        plot.draw([plot.read_run(folder)], tmp_path / "x.png")
        losses, hella = figures["x.png"].axes
        assert level_lines(losses) == ({(3.2924, "--")} if edu else set())
        assert level_lines(hella) == {(0.2955, "--"), (0.337, ":")}
        low, high = losses.get_ylim()
        assert (low < 3.2924 < high) == edu
        _, *keys = figures["x.png"].legends[0].legend_handles
        looks = [(line.get_label().split(":")[0], line.get_linestyle()) for line in keys]
        assert looks == [("GPT-2 (124M)", "--"), ("GPT-3 (124M)", ":")]


# ---------------------------------------------------------------- norms by group


def test_more_runs_than_colours_are_told_apart_and_a_lone_loss_is_seen(tmp_path, figures):
    folders = [write_run(tmp_path / f"run{i}") for i in range(9)]
    Path(folders[8], "log.txt").write_text("0 train nan\n1 train 5.0\n2 train nan\n")
    plot.draw([plot.read_run(folder) for folder in folders], tmp_path / "x.png")
    (ax,) = figures["x.png"].axes
    handles = figures["x.png"].legends[0].legend_handles
    looks = {(line.get_color(), line.get_linestyle()) for line in handles}
    assert len(looks) == 9
    lone = [line for line in ax.lines if line.get_marker() == "." and len(line.get_xdata())]
    assert [line.get_ydata().tolist() for line in lone] == [[5.0]]


def test_norms_get_a_picture_of_their_own_where_a_run_has_them(tmp_path, figures):
    plain = plot.read_run(write_run(tmp_path / "plain"))
    full = plot.read_run(write_run(tmp_path / "full", norms=4))
    assert plot.draw([plain], tmp_path / "a.png") == f"wrote {tmp_path / 'a.png'}"
    said = plot.draw([plain, full], tmp_path / "b.png")
    assert said == f"wrote {tmp_path / 'b.png'} and {tmp_path / 'b_norms.png'}"
    assert figures.keys() == {"a.png", "b.png", "b_norms.png"}
    assert size_of_png(tmp_path / "b_norms.png")[0] == 1500


@pytest.mark.parametrize("kinds", [4, 5], ids=["usual", "and-other"])
def test_norms_are_drawn_as_logged_and_in_the_colours_of_the_legend(tmp_path, figures, kinds):
    run = plot.read_run(write_run(tmp_path / "a", norms=kinds))
    plot.draw([run], tmp_path / "a.png")
    left, right = figures["a_norms.png"].axes
    color_of = {
        text.get_text(): line.get_color()
        for legend in figures["a_norms.png"].legends
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert len(set(color_of.values())) == kinds + 1
    for ax, kind in ((left, "norm"), (right, "update")):
        assert ax.get_yscale() == "log" and ax.get_xlabel() == "training tokens"
        drawn = {line.get_color(): line.get_data() for line in ax.lines}
        streams = {f"{group} weights": f"{kind}_{group}" for group in list(plot.GROUPS)[:kinds]}
        if kind == "norm":
            streams["whole gradient"] = "norm"
        assert len(drawn) == len(streams)
        for label, stream in streams.items():
            steps, values = run.streams[stream]
            x, y = drawn[color_of[label]]
            assert np.array_equal(x, steps * 4096) and np.allclose(y, values)
            assert ax.get_ylim()[0] < values.min() and values.max() < ax.get_ylim()[1]


def test_norms_of_at_most_four_runs_are_drawn_and_the_picture_says_so(tmp_path, figures):
    runs = [plot.read_run(write_run(tmp_path / f"run{i}", norms=4)) for i in range(5)]
    plot.draw(runs, tmp_path / "all.png")
    fig = figures["all_norms.png"]
    assert [ax.get_title() for ax in fig.axes[::2]] == ["run0", "run1", "run2", "run3"]
    assert fig.legends[0].get_title().get_text() == "the first 4 of 5 runs"


def test_norms_that_are_not_above_zero_or_not_finite_are_gaps(tmp_path, figures):
    folder = Path(write_run(tmp_path / "a", norms=4))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        log.write("3 norm_mlp inf\n4 norm_mlp nan\n5 norm_mlp 0.0\n")
        log.writelines(f"{step} update_norm 0.0\n" for step in range(40))
    plot.draw([plot.read_run(folder)], tmp_path / "a.png")
    [mlp] = [x for x in figures["a_norms.png"].axes[0].lines if x.get_color() == plot.GROUPS["mlp"]]
    assert np.flatnonzero(np.isnan(mlp.get_ydata())).tolist() == [3, 4, 5]


def test_first_updates_of_a_warm_up_do_not_flatten_the_rest():
    values = np.full(10_000, 1e-3)
    values[:20] = 1e-9
    run = plot.Run("a", {"update_mlp": (np.arange(10_000), values)}, 0, False)
    low, high = plot.norm_range([run], {"update_mlp": "black"})
    assert 5e-4 < low < 1e-3 < high < 2e-3


# ---------------------------------------------------------------- files and watching


def test_picture_is_whole_or_as_before(tmp_path, monkeypatch):
    run, out = plot.read_run(write_run(tmp_path / "a")), tmp_path / "a.png"
    plot.draw([run], out)
    before = out.read_bytes()
    from matplotlib.figure import Figure

    def torn(self, path, **settings):
        Path(path).write_bytes(before[:1000])
        assert out.read_bytes() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(KeyboardInterrupt):
        plot.draw([run], out)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png"]


def test_watch_waits_for_a_loss_and_draws_again_when_a_log_grows(tmp_path, watch, capsys):
    log, out = tmp_path / "young" / "log.txt", tmp_path / "out.png"
    log.parent.mkdir()
    log.touch()
    looks = watch(
        [log.parent],
        out,
        None,
        (log, "0 lr 0.1\n0 tra"),
        (log, "in 9.0\n"),
        None,
        (log, "1 val 8\n"),
    )
    assert looks == [[], [], [], ["young"], [], ["young"]]
    assert size_of_png(out)[0] == 7 * 150
    said = ["no loss yet: waiting", f"wrote {out}, again when a log grows"]
    assert capsys.readouterr().out.splitlines() == said


def test_watch_leaves_out_a_run_until_it_has_a_loss(tmp_path, watch):
    done, log = write_run(tmp_path / "done"), tmp_path / "young" / "log.txt"
    log.parent.mkdir()
    log.touch()
    looks = watch([done, log.parent], tmp_path / "out.png", None, (log, "0 train 9.0\n"))
    assert looks == [["done"], [], ["done", "young"]]


def test_watching_a_folder_that_holds_no_run_is_a_mistake(tmp_path):
    done = run_plot("nowhere", "--watch", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_watch_ends_on_ctrl_c(tmp_path):
    write_run(tmp_path / "a", norms=4)
    command = [sys.executable, str(SCRIPT), "a", "--out=a.png", "--watch"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "wrote a.png and a_norms.png, again when a log grows\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "\ninterrupted\n")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "a.png", "a_norms.png"]


# ---------------------------------------------------------------- command


def test_command_runs_from_anywhere_and_says_what_it_wrote(tmp_path):
    write_run(tmp_path / "log" / "a", hella=True)
    write_run(tmp_path / "log" / "b", config="")
    done = run_plot("log/a", "log/b", "--out=pictures/ab.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {Path('pictures/ab.png')}\n"
    assert size_of_png(tmp_path / "pictures" / "ab.png")[0] == 1500


@pytest.mark.parametrize("args", [[], ["nowhere"], ["nowhere", "--out=a.jpeg"]])
def test_mistakes_end_with_one_line_and_code_2(tmp_path, args):
    done = run_plot(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_torch_is_never_imported(tmp_path):
    folder = write_run(tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from plots import plot; "
        "plot.draw([plot.read_run(sys.argv[1])], Path(sys.argv[2])); "
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, folder, str(tmp_path / "a.png")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "a.png").exists()
