import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

import trackers
import train_gpt2
from common import UserError

TEXT = "Hello <b> & *args\n    def __init__(self):\n\n# the end"


@pytest.fixture
def config(tiny):
    return replace(tiny, run_name="run", wandb_run_name="")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without a network and an account, and with settings that are read anew."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no key in ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def stub_wandb(**parts):
    """A module that stands in for wandb, whose run does what `parts` say."""
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=print, finish=print)
    vars(run).update(parts)
    return SimpleNamespace(init=lambda **settings: run, Html=str)


def read_tensorboard(folder):
    """{stream: {step: value}} and {name: {step: text}} as TensorBoard shows them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars, tensors = events.Tags()["scalars"], events.Tags()["tensors"]
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in scalars}
    for points in values.values():
        assert len(points) == len(dict(points)), "a step appears twice"
    texts = {
        tag.removesuffix("/text_summary"): {
            e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)
        }
        for tag in tensors
    }
    return {tag: dict(points) for tag, points in values.items()}, texts


def read_wandb(path):
    """The records of a .wandb file: protocol buffers in the frames of LevelDB's log format."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the file is whole when the service has ended
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # a frame's head does not cross a block's end
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_rows(records):
    """The rows of a run's history, without what W&B adds of its own."""
    history = [record.history.item for record in records if record.HasField("history")]
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row}
        for row in history
    ]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]


# ---------------------------------------------------------------- flags and packages


def test_nothing_is_imported_and_nothing_opened_unless_a_flag_asks(tmp_path):
    code = (
        "import sys; from pathlib import Path; import trackers; from train_gpt2 import Config;"
        "trackers.check(Config()); print(trackers.open_trackers(Config(), Path('x'), 0));"
        "print([name for name in ('wandb', 'tensorboard') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(Path(trackers.__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["[]", "[]", ""], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", [None, ModuleSpec("x", None)], ids=["absent", "a mere folder"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"wandb_project": "p"}, "wandb is missing: pip install wandb, or leave --wandb_project"),
        ({"tensorboard": True}, "tensorboard is missing: pip install tensorboard, or leave"),
    ],
)
def test_missing_package_is_named_before_the_run(config, monkeypatch, flags, message, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    trackers.check(config)
    with pytest.raises(UserError, match=message) as error:
        trackers.check(replace(config, **flags))
    assert "\n" not in str(error.value)


def test_missing_package_ends_the_command_before_a_folder_is_made(monkeypatch, tmp_path):
    argv = ["train_gpt2.py", "--wandb_project=p", f"--log_dir={tmp_path / 'log'}"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is missing"):
        train_gpt2.main()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_what_was_logged(config, tmp_path):
    pytest.importorskip("tensorboard")
    [tracker] = trackers.open_trackers(replace(config, tensorboard=True), tmp_path, 0)
    tracker.log(0, {"val": 10.8})
    for step in range(30):
        tracker.log(step, {"train": 10 / (1 + step), "lr": 1e-5 * step})
    tracker.log(30, {"train": math.nan, "lr": math.inf})
    tracker.text(30, "samples", TEXT)
    tracker.close()
    values, texts = read_tensorboard(tmp_path)
    assert values["val"] == {0: pytest.approx(10.8)}
    assert [values["train"][s] for s in range(30)] == pytest.approx(
        [10 / (1 + s) for s in range(30)]
    )
    assert math.isnan(values["train"][30]) and values["lr"][30] == math.inf
    lines = texts["samples"][30].split("\n")
    assert [line.removeprefix("    ") for line in lines] == TEXT.split("\n")


def test_tensorboard_has_the_streams_of_log_txt_and_repeated_steps_once(tiny_run, train):
    pytest.importorskip("tensorboard")
    cfg = replace(tiny_run, tensorboard=True, checkpoint_interval=3, eval_interval=2)
    folder, _ = train(cfg)
    (folder / "step_000008.pt").unlink()
    _, log = train(replace(cfg, resume=True))  # repeats steps 6 and 7
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    values, _ = read_tensorboard(folder)
    assert values.keys() == log.keys() >= {"train", "lr", "norm", "tps", "val"}
    assert values["train"].keys() == set(range(8)) and values["val"].keys() == {0, 2, 4, 6, 8}
    for stream, points in log.items():
        assert values[stream] == pytest.approx(points, rel=1e-6), stream


# ---------------------------------------------------------------- W&B


def test_wandb_offline_keeps_what_was_logged(config, tmp_path, offline):
    cfg = replace(config, wandb_project="gpt2", wandb_run_name="first")
    [tracker] = trackers.open_trackers(cfg, tmp_path, 0)
    logged = [{"step": s, "train": 10 / (1 + s), "lr": 1e-5 * s} for s in range(100)]
    for row in logged:
        tracker.log(row["step"], {"train": row["train"], "lr": row["lr"]})
    tracker.log(100, {"train": math.nan, "lr": math.inf})
    tracker.text(100, "samples", TEXT)
    tracker.close()
    [path] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = read_wandb(path)
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name) == ("gpt2", "first")
    assert run.run_id == (tmp_path / "wandb_id").read_text()
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["n_layer"] == 2 and config["learning_rate"] == 1e-2
    rows = wandb_rows(records)
    assert rows[:100] == logged
    assert math.isnan(rows[100]["train"]) and rows[100]["lr"] == math.inf
    assert rows[101]["step"] == 100
    [page] = path.parent.glob("files/media/html/samples*.html")
    assert "Hello &lt;b&gt; &amp; *args\n    def __init__(self):\n\n# the end" in page.read_text()


def test_wandb_goes_on_in_the_same_run_and_keeps_repeated_steps(config, tmp_path, offline):
    cfg = replace(config, wandb_project="gpt2")
    for steps in (range(6), range(4, 8)):  # killed after step 5, resumed from step 4
        [tracker] = trackers.open_trackers(cfg, tmp_path, steps[0])
        for step in steps:
            tracker.log(step, {"train": step / 4})
        tracker.close()
        time.sleep(1)  # W&B names its folders by the second
    paths = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2 and len({path.name for path in paths}) == 1  # the name holds the id
    for path, steps in zip(paths, (range(6), range(4, 8)), strict=True):
        records = read_wandb(path)
        assert wandb_rows(records) == [{"step": step, "train": step / 4} for step in steps]
        metrics = [record.metric for record in records if record.HasField("metric")]
        assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["step"]


def test_wandb_disabled_leaves_nothing(config, tmp_path, offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    [tracker] = trackers.open_trackers(replace(config, wandb_project="gpt2"), tmp_path, 0)
    tracker.log(0, {"train": 1.0})
    tracker.text(0, "samples", TEXT)
    tracker.close()
    assert tracker.target is not None and not (tmp_path / "wandb").exists()


def test_training_goes_on_without_a_wandb_login(tiny_run, train, offline, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    _, log = train(replace(tiny_run, wandb_project="gpt2"))
    assert log["train"].keys() == set(range(8))
    assert capfd.readouterr().out.count("Wandb is off: ") == 1


def test_training_goes_on_without_a_wandb_server(tiny_run, train, offline, monkeypatch, capfd):
    settings = {"MODE": "online", "API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9"}
    for key, value in (settings | {"INIT_TIMEOUT": "0.1"}).items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    _, log = train(replace(tiny_run, wandb_project="gpt2"))
    assert log["train"].keys() == set(range(8))
    assert capfd.readouterr().out.count("Wandb is off: ") == 1


def test_wandb_waits_as_long_as_the_user_has_set(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", stub_wandb())
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    trackers.open_trackers(replace(config, wandb_project="p"), tmp_path, 0)
    assert os.environ["WANDB_INIT_TIMEOUT"] == "7"
    assert os.environ["WANDB_FINISH_TIMEOUT"] == trackers.PATIENCE["WANDB_FINISH_TIMEOUT"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_error_of_a_tracker_is_one_warning(config, tmp_path, monkeypatch, capsys, broken):
    def fail(*args, **settings):
        raise ConnectionError(f"{broken} failed\nand much more")

    wandb = stub_wandb(**{broken: fail})
    if broken == "init":
        wandb.init = fail
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    [tracker] = trackers.open_trackers(replace(config, wandb_project="p"), tmp_path, 0)
    for step in range(3):
        tracker.log(step, {"train": 1.0})
    tracker.text(3, "samples", TEXT)
    tracker.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if " is off" in line]
    assert warnings == [f"Wandb is off: {broken} failed; log.txt has everything"]


def test_full_disk_ends_tensorboard_and_not_the_run(config, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    [tracker] = trackers.open_trackers(replace(config, tensorboard=True), tmp_path, 0)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker.target.writer, "add_scalar", full)
    for step in range(3):
        tracker.log(step, {"train": 1.0})
    tracker.close()
    assert capsys.readouterr().out == (
        "TensorBoard is off: [Errno 28] No space left on device; log.txt has everything\n"
    )


def test_wandb_shows_a_run_that_raised_as_failed(config, tmp_path, monkeypatch):
    codes = []
    stub = stub_wandb(finish=lambda exit_code: codes.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    [tracker] = trackers.open_trackers(replace(config, wandb_project="p"), tmp_path, 0)
    tracker.close()
    try:
        raise UserError("10 steps in a row had a non-finite loss")
    except UserError:
        tracker.close()
    assert codes == [0, 1]
