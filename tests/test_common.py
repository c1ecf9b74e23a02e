"""What every command shares: locks, commands to copy, output."""

import errno
import os
import shutil
import subprocess
import sys
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


def test_only_what_a_shell_would_change_is_quoted():
    for word in ("log/tiny/best.pt", "--model=log/t\u00fcr/x_1.pt", "--lr=1e-3"):
        assert common.quoted(word) == word
    assert common.quoted("--prompt=It's $5") == '--prompt="It\'s \\$5"'
