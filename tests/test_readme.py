"""What the README says: its commands run, its flags exist, its line counts are the files'."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:python|torchrun) .+?)(?:  +#.*)?$", README, re.MULTILINE)
OWN_TASKS = ROOT / "tests" / "data" / "hellaswag_own.jsonl"
SHORT = {  # what makes a command short enough for a test
    "train_gpt2.py": ["--max_steps=2", "--n_layer=1", "--n_embd=32", "--device=cpu",
                      "--eval_tokens=256", "--compile_model=False"],
    "hellaswag.py": [f"--data={OWN_TASKS}"],
    "sample.py": ["--max_new_tokens=4"],
    "bench.py": ["--steps=1", "--n_layer=1", "--n_embd=32", "--compile_model=False"],
}  # fmt: skip
NOT_HERE = r"torchrun|fineweb\.py$|pretokenized|my_texts|--subset|--dataset|edu_fineweb10B"
NOT_HERE += r"|small_card|finetune|eval_gpt2|train_gpt2\.py$|bench\.py (memory|all)"


def local(command):
    """Whether a test can run it: without the hub, a GPU, and texts of the reader's."""
    return not re.search(NOT_HERE, command)


def test_readme_has_commands():
    assert len([c for c in COMMANDS if local(c)]) >= 8


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_readme_names_flags_and_files_that_exist(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    source = (ROOT / script).read_text(encoding="utf-8")
    source += (ROOT / "train_gpt2.py").read_text(encoding="utf-8") * (script == "bench.py")
    for word in words[words.index(script) + 1 :]:
        if word.startswith("--"):
            assert re.search(rf"^    {word[2:].split('=')[0]}: ", source, re.MULTILINE), word
        elif word.endswith(".toml") and "<" not in word and not word.startswith("log/"):
            assert (ROOT / word).exists(), word


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("configs", "plots", "assets"))]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    for command in filter(local, COMMANDS):
        _, script, *args = shlex.split(command)
        more = [] if args[:1] == ["tokenize"] else SHORT.get(script, [])
        words = [sys.executable, script, *args, *more]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_readme_tells_how_long_the_files_are():
    rows = re.findall(r"^\| (`[^|]+\.py`) \| ([\d, ]+) \|", README, re.MULTILINE)
    assert rows
    for names, counts in rows:
        files = re.findall(r"`([^`]+)`", names)
        for file, told in zip(files, counts.split(", "), strict=True):
            lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
            assert abs(lines - int(told)) < max(60, lines / 10), (file, lines)
