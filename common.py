"""What every command here shares: its errors, its command line, and how it writes files."""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import time
import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import tyro


class UserError(Exception):
    """A mistake the user can fix: one or two lines that say what, where and what to do."""


IN_THE_WAY = PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError
# seconds of pauses: on Windows a virus scanner may hold a file for a moment
RETRIES = (0.02, 0.1, 0.5) if os.name == "nt" else ()
DISK = [getattr(errno, name, 0) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS")]
BAD_NAMES = [errno.ENAMETOOLONG, errno.ELOOP]
PROJECT = Path(__file__).parent
TEXTS = ("--prompt", "--text", "--sample_prompt")  # in which ~ is a character like any other


def in_short(error, most=200):
    """An error of another's making as one line of at most so many characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", most, placeholder=" ...")


def first_rank():
    """Whether this process is torchrun's first one, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run(main):
    """Call a command's main; a UserError ends it with its message and exit code 2."""
    with contextlib.suppress(AttributeError):  # it may be closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character of a text
    try:
        main()
    except (UserError, *IN_THE_WAY) as error:
        if not first_rank():
            # if all ranks erred, rank 0 tells; torchrun ends this one before it repeats that
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK + BAD_NAMES:
            raise
        print(f"error: {error}: fix that and run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)  # below a progress bar
        sys.exit(130)


def say(*words):
    """Print at once; output to a full disk is lost and does not end a run."""
    try:
        print(*words, flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads it any more
            raise
        with contextlib.suppress(AttributeError):  # who flushed what it still holds would fail, too
            raw = sys.stdout.buffer.raw
            sys.stdout = io.TextIOWrapper(raw, "utf-8", "replace", write_through=True)


def command_line(options, description, args=None, prog=None):
    """Parse `--key=value` (or `--key value`) into a dataclass; its comments are the help.

    A switch may stand alone, for True. ~ after = is the home folder, but in a text.
    """
    args = sys.argv[1:] if args is None else args
    args = [re.sub("^--[^=]+", lambda flag: f"--{flag[0][2:].replace('-', '_')}", x) for x in args]
    given = [arg.partition("=")[0] for arg in args]
    switches = [f"--{field.name}" for field in fields(options) if field.type is bool]
    for field in fields(options):
        if isinstance(field.default, tuple) and given.count(flag := f"--{field.name}") > 1:
            raise UserError(f"{flag} is given twice: name all of them after one {flag}")
    for i, (arg, following) in enumerate(itertools.pairwise([*args, ""])):
        if arg in switches and following not in ("True", "False"):
            args[i] = f"{arg}=True"
        elif "=~" in arg and given[i] not in TEXTS:  # which a shell leaves as it is
            args[i] = f"{given[i]}={os.path.expanduser(arg.partition('=')[2])}"
    return tyro.cli(
        options,
        prog=prog,
        args=args,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        console_outputs=first_rank(),
    )


def check_types(options):
    """A UserError unless a dataclass's values are of its types, wherever they come from."""
    for field in fields(options):
        kind, value = get_origin(field.type) or field.type, getattr(options, field.name)
        if kind is Literal:
            right = value in get_args(field.type)
            expected = " or ".join(map(str, get_args(field.type)))
        elif kind not in (int, float, bool, str, tuple):
            raise UserError(f"{field.name}: make it int, float, bool, str, tuple or Literal")
        else:
            right = isinstance(value, (int, float) if kind is float else kind)
            right = right and (kind is bool or not isinstance(value, bool))  # which is an int, too
            expected = f"of type {kind.__name__}"
        if not right:
            raise UserError(f"{field.name}={value!r} must be {expected}")


def toml_flags(path, options):
    """The TOML file's `key = value` lines as --key=value flags."""
    if path.is_dir():
        raise UserError(f"config {path} is a folder: name a file, such as {path / 'config.toml'}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    tuples = {field.name for field in fields(options) if isinstance(field.default, tuple)}
    args = []
    for key, value in values.items():
        if isinstance(value, dict) or (isinstance(value, list) and key not in tuples):
            raise UserError(f"config {path}: {key} is not a plain value; write key = value")
        args += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    try:
        command_line(options, "", args)
    except SystemExit:
        raise UserError(f"that is in {path}") from None
    return args


def to_toml(options):
    """A dataclass of plain values as TOML; `resume` is a command, not a setting."""
    values = {key: value for key, value in asdict(options).items() if key != "resume"}
    # JSON writes strings, numbers and booleans as TOML does, but for one character
    lines = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")


def move(source, target):
    """os.replace; where another program holds a file for a moment, again."""
    for pause in RETRIES:
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(pause)
    os.replace(source, target)


def lock(file):
    """Lock an open file, or return False where another process holds it.

    The system lets go when this one ends, even killed.
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # others may read what is there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_END)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of any other kind: this file system has no locks
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; fsync and rename it there if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        move(temporary, path)
    except OSError as error:
        if error.errno in DISK:
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_json(path):
    """A UserError where --json, if given, could not be written: before the work, not after it."""
    if path and Path(path).is_dir():
        raise UserError(f"--json={path} is a folder: name a file")
    if path:
        check_disk(Path(path).parent, 0)


def write_json(path, content):
    """Write a command's figures, and say where."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def check_disk(folder, size):
    """The bytes free on the disk of a folder; a UserError where `size` more have no room."""
    from tqdm import tqdm

    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder} cannot be written: {there} is no folder, or not yours to change")
    free = shutil.disk_usage(there).free
    if size > free:
        room = f"{tqdm.format_sizeof(size, 'B')} more, {tqdm.format_sizeof(free, 'B')} are free"
        raise UserError(f"{folder} needs {room}: free some, or take another folder")
    return free


def read_log(path):
    """A log.txt, lines of `step stream value`, as {stream: {step: value}}; {} where there is none.

    Of a run that was resumed at a step, what it had logged from there on is left out; where a step
    repeats, its last line counts. What a kill has torn is left out, too: a last line without its
    newline, and a line that has no such three parts.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    streams = {}
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            step, stream, value = line.split()
            if stream == "resumed":
                for name, points in streams.items():
                    end = int(step) + (name in ("val", "hella"))  # of the same weights
                    streams[name] = {k: x for k, x in points.items() if k < end}
            else:
                streams.setdefault(stream, {})[int(step)] = float(value)
    return {stream: points for stream, points in streams.items() if points}


def tokens_at(steps, batch):
    """Tokens that a run had seen before each of `steps`, from its log's stream `batch`.

    That is {step: tokens per step from there on}: a resume may change them. What came before the
    first is taken to be the same.
    """
    starts = sorted(batch)
    spans = zip([0, *starts[1:]], [*starts[1:], np.inf], strict=True)
    parts = zip(spans, (batch[start] for start in starts), strict=True)
    return sum(tokens * np.clip(steps - a, 0, b - a) for (a, b), tokens in parts)


def quoted(word):
    """A word of a command to copy, in double quotes where a shell would not take it as it is."""
    flag, value = re.fullmatch(r"(--\w+=)?(.*)", str(word), re.DOTALL).groups(default="")
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return flag + value
    value = value if os.name == "nt" else re.sub(r'([\\"$`])', r"\\\1", value)
    return f'{flag}"{value}"'


def command(script, *words):
    """A command that calls a script of this project, to copy; a Path in it is named from here."""
    here, python = Path.cwd(), Path(sys.executable)
    words = [python if python.is_relative_to(here) else "python", PROJECT / script, *words]
    for i, word in enumerate(words):
        if isinstance(word, Path) and word.is_relative_to(here):
            words[i] = word.relative_to(here)
    return " ".join(map(quoted, words))


def check_picture(path):
    """A UserError where --out does not end as a picture that matplotlib can write."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out={path} is not a picture: its name should end in .png, .svg or .pdf")


def save_picture(fig, path):
    """Write a matplotlib figure, whole or as it was before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            fig.savefig(temporary, format=path.suffix[1:], dpi=150)
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error}") from None


def alone(script):
    """A UserError under torchrun, for a script that is one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{script} runs as one process: start it without torchrun")
