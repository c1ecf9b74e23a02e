import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fineweb import UserError
from plots import plot

SCRIPT = Path(plot.__file__)


def read(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text, encoding="utf-8")
    return {s: [x.tolist() for x in pair] for s, pair in plot.read_log(path).items()}


def write_run(folder, steps=40, hella=False, config="total_batch_size = 4096\n"):
    folder.mkdir(parents=True)
    lines = [f"{step} train {11 / (1 + step) + 3!r}" for step in range(steps)]
    lines += [f"{step} val {11 / (1 + step) + 3.1!r}" for step in range(0, steps + 1, 10)]
    lines += [f"{step} hella 0.26" for step in range(10, steps + 1, 10) if hella]
    (folder / "log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config:
        (folder / "config.toml").write_text(config, encoding="utf-8")
    return str(folder)


def run_plot(*args, cwd):
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


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
        plot.read_run(write_run(tmp_path / "a", config="total_batch_size =\n"))


def test_batch_is_unknown_where_the_config_does_not_settle_it(tmp_path):
    assert plot.read_run(write_run(tmp_path / "a")).batch == 4096
    assert plot.read_run(write_run(tmp_path / "b", config="")).batch == 0
    config = "total_batch_size = 4096\ngrad_accum_steps = 2\n"
    assert plot.read_run(write_run(tmp_path / "c", config=config)).batch == 0


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
