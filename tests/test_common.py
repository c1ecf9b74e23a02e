"""What every command shares: locks, commands to copy, output."""

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common

ROOT = Path(__file__).parents[1]


def test_a_file_is_held_by_one_until_it_is_closed(tmp_path):
    with open(tmp_path / "x", "w") as first, open(tmp_path / "x", "w") as second:
        assert common.lock(first) and not common.lock(second)
        first.close()
        assert common.lock(second)


def test_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "x", "w") as file:
        assert common.lock(file)


def test_on_windows_the_lock_lies_beyond_what_is_written(tmp_path, monkeypatch):
    """Where it lies nobody else may read."""
    at = []

    def locking(fd, mode, size):
        at.append((os.lseek(fd, 0, os.SEEK_CUR), mode, size))

    stand_in = SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", stand_in)
    path = tmp_path / "log.txt"
    for mode in ("x", "a"):
        with open(path, mode, buffering=1) as file:
            with monkeypatch.context() as patch:
                patch.setattr(os, "name", "nt")
                assert common.lock(file)
            file.write("a line\n")
    assert path.read_text() == 2 * "a line\n"
    assert at == 2 * [(1 << 30, 2, 1)]


def test_a_killed_process_holds_nothing(tmp_path):
    code = f"import common, sys; f = open({str(tmp_path / 'x')!r}, 'w'); print(common.lock(f)); "
    code += "sys.stdout.flush(); sys.stdin.read()"
    how = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=common.Path(common.__file__).parent
    )
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        assert process.stdout.readline() == b"True\n"
        with open(tmp_path / "x", "w") as file:
            assert not common.lock(file)
            process.kill()
            process.wait()
            assert common.lock(file)


@pytest.mark.skipif(not shutil.which("sh"), reason="needs a POSIX shell")
@settings(max_examples=25, deadline=None, database=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_commands_to_copy_mean_what_they_were_made_of(text):
    for word in (text, f"--prompt={text}"):
        command = ["sh", "-c", f"printf %s {common.quoted(word)}"]
        assert subprocess.run(command, capture_output=True).stdout == word.encode()


@dataclass(frozen=True)
class Switches:
    bare: bool = False
    path: str = ""
    some_text: str = ""
    prompt: str = ""


@pytest.mark.parametrize("words", [["--bare"], ["--bare=True"], ["--bare", "True"]])
@pytest.mark.parametrize("after", [[], ["--path=x"]])
def test_a_switch_may_stand_alone(words, after):
    assert common.command_line(Switches, "", words + after).bare
    assert not common.command_line(Switches, "", [*after, "--bare", "False"]).bare


def test_the_home_folder_is_found_in_a_value(monkeypatch, tmp_path):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    home = str(tmp_path)
    paths = {"~/x": f"{home}/x", "~": home, "a~/x": "a~/x", "~x-": "~x-", "/~/x": "/~/x"}
    for word, meant in paths.items():
        assert common.command_line(Switches, "", [f"--path={word}"]).path == meant
    assert common.command_line(Switches, "", ["--some-text=~/x"]).some_text == f"{tmp_path}/x"
    assert common.command_line(Switches, "", ["--prompt=~/x is"]).prompt == "~/x is"


def test_what_a_resumed_run_had_logged_beyond_counts_no_more(tmp_path):
    lines = ["0 val 11", "0 train 11", "3 val 9", "3 train 9", "5 hella 0.25", "3 resumed 1"]
    path = tmp_path / "log.txt"
    path.write_text("\n".join([*lines, "3 train 8", ""]))
    assert common.read_log(path) == {"val": {0: 11, 3: 9}, "train": {0: 11, 3: 8}}


def test_json_that_cannot_be_written_is_refused(tmp_path):
    common.check_json("")
    common.check_json(tmp_path / "new" / "x.json")
    with pytest.raises(common.UserError, match=r"--json=.* is a folder: name a file"):
        common.check_json(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(common.UserError, match="file is no folder"):
        common.check_json(tmp_path / "file" / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_to_copy_names_files_from_where_it_is_copied(monkeypatch, tmp_path):
    script, config = common.PROJECT / "sample.py", common.PROJECT / "configs" / "tiny.toml"
    monkeypatch.chdir(tmp_path)
    assert common.command("sample.py", config) == f"python {script} {config}"
    monkeypatch.chdir(common.PROJECT)
    assert common.command("sample.py", config).endswith(f" sample.py {Path('configs/tiny.toml')}")


def test_only_what_a_shell_would_change_is_quoted():
    for word in ("log/tiny/best.pt", "--model=log/t\u00fcr/x_1.pt", "--lr=1e-3"):
        assert common.quoted(word) == word
    assert common.quoted("--prompt=It's $5") == '--prompt="It\'s \\$5"'
