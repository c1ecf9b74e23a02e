"""What every command shares: locks, commands to copy, output."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common

ROOT = Path(__file__).parents[1]


def test_a_file_is_held_by_one_until_it_is_closed(tmp_path):
    with open(tmp_path / "x", "w") as first, open(tmp_path / "x", "w") as second:
        assert common.hold(first) and not common.hold(second)
        first.close()
        assert common.hold(second)


def test_file_system_without_locks_is_no_other_run(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "x", "w") as file:
        assert common.hold(file)


def test_a_killed_process_holds_nothing(tmp_path):
    code = f"import common, sys; f = open({str(tmp_path / 'x')!r}, 'w'); print(common.hold(f)); "
    code += "sys.stdout.flush(); sys.stdin.read()"
    how = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=common.Path(common.__file__).parent
    )
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        assert process.stdout.readline() == b"True\n"
        with open(tmp_path / "x", "w") as file:
            assert not common.hold(file)
            process.kill()
            process.wait()
            assert common.hold(file)


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
