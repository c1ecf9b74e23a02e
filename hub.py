"""Files of a Hugging Face dataset, fetched once: a download that was cut off is resumed.

huggingface_hub's own download starts a file over after a kill (its issue 4196). This one appends
to the part that is there, then compares the whole file's checksum with the hub's.
"""

import contextlib
import functools
import hashlib
import os
import time
from pathlib import Path

from common import DISK, UserError, check_disk, first_rank, move

PAUSES = 1, 10, 60, 300  # seconds to wait for a failing network, as long as nothing comes


class Dataset:
    """A dataset at one commit. Its `files` have an rfilename, size, blob_id and, if large, lfs."""

    def __init__(self, name, revision):
        from huggingface_hub import HfApi

        self.name = name
        what = f"the list of files of {name} at {revision}"
        how = dict(revision=revision, files_metadata=True, timeout=60)  # by default it has no end
        ask = functools.partial(HfApi().dataset_info, name, **how)
        with fetching(what):
            info = patiently(what, ask, lambda error: status(error) and may_pass(error))
        self.commit, self.files = info.sha, sorted(info.siblings, key=lambda file: file.rfilename)
        for path in (Path(file.rfilename) for file in self.files):
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{name} has a file outside itself, {path}: do not trust it")

    def folder(self):
        from huggingface_hub.file_download import repo_folder_name

        return cache() / repo_folder_name(repo_id=self.name, repo_type="dataset")

    def path(self, file):
        """Where huggingface_hub's cache has a file under its name."""
        return self.folder() / "snapshots" / self.commit / file.rfilename

    def place(self, file):
        """Where the cache keeps its bytes: by checksum, or under its name if links do not work."""
        from huggingface_hub.file_download import are_symlinks_supported

        links = are_symlinks_supported(cache())
        return self.folder() / "blobs" / checksum(file) if links else self.path(file)

    def missing(self, files):
        """The bytes of these files that the cache lacks."""
        files = [file for file in files if size_of(self.path(file)) != file.size]
        return sum(file.size - held(file.size, self.place(file)) for file in files)

    def download(self, file):
        """Fetch a file into the cache, unless it is there; return its path."""
        from huggingface_hub.utils import WeakFileLock

        path = self.path(file)
        if size_of(path) == file.size:
            return path
        # the lock that huggingface_hub takes, too
        lock = cache() / ".locks" / self.folder().name / f"{checksum(file)}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            place = self.place(file)
            self.fetch(file, place)
            if size_of(path) != file.size:  # there is no link yet, or something else
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.symlink_to(os.path.relpath(place, path.parent))
        return path

    def fetch(self, file, path):
        """Fetch a file to `path`, unless it is there, going on from what is there of it."""
        if size_of(path) == file.size:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(incomplete(path), "ab+") as part:
            begun = part.tell()
            with fetching(f"{file.rfilename} of {self.name}"):
                self.receive(file, part)
            part.flush()
            os.fsync(part.fileno())
            part.seek(0)
            digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
            found = hashlib.file_digest(part, lambda: digest).hexdigest()
        if found != checksum(file):
            incomplete(path).unlink(missing_ok=True)
            if begun:  # with another file's bytes, or on a disk that lost power
                return self.fetch(file, path)
            wrong = f"of {self.name} came with another checksum than {checksum(file)}"
            raise UserError(f"{file.rfilename} {wrong}: try again, one run at a time")
        move(incomplete(path), path)

    def receive(self, file, part):
        """Append to `part` what it lacks of a file; wait where the network fails, and go on."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name, file.rfilename, repo_type="dataset", revision=self.commit)
        # a range of compressed bytes would be of no use
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}

        def size():
            if part.seek(0, os.SEEK_END) > file.size:  # it is no part of this file
                part.truncate(0)
            return part.seek(0, os.SEEK_END)

        def fetch():
            http_get(url, part, headers=headers, resume_size=size(), expected_size=file.size)

        patiently(file.rfilename, fetch, may_pass, size)


def patiently(what, fetch, passes, size=lambda: 0):
    """fetch(); where its error `passes`, again after PAUSES, anew with each growth of `size`."""
    from tqdm import tqdm

    pauses, most = iter(PAUSES), -1
    while True:
        if (there := size()) > most:
            pauses, most = iter(PAUSES), there
        try:
            return fetch()
        except Exception as error:
            if not passes(error) or not (pause := next(pauses, 0)):
                raise
            tqdm.write(f"{what}: {reason(error)}: trying again in {pause} s")
        time.sleep(pause)


def checksum(file):
    """What the hub says of a file's bytes: sha256 of a large one, git's sha1 of a small one."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def cache():
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def incomplete(path):
    return path.with_name(f"{path.name}.incomplete")


def size_of(path):
    """Bytes of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def held(size, *paths):
    """The bytes that are there of a file of `size`, whole or in part, at any of these paths."""
    sizes = [size_of(p) for path in paths for p in (path, incomplete(path))]
    return max((n for n in sizes if 0 <= n <= size), default=0)


def check_room(folder, size):
    """Say what is to be fetched into a folder, and that its disk has room; a UserError if not."""
    from tqdm import tqdm

    free = check_disk(folder, size)
    if size and first_rank():
        size, free = (tqdm.format_sizeof(n, "B") for n in (size, free))
        print(f"to fetch: {size} into {folder}; {free} are free", flush=True)


def status(error):
    """The HTTP status of what a server answered; None if none did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def may_pass(error):
    """Whether it is worth waiting: not for a wrong name, a login, a full disk or a bug."""
    if answer := status(error):
        return answer >= 500 or answer in (408, 429)
    network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
    return network and getattr(error, "errno", None) not in DISK


@contextlib.contextmanager
def fetching(what):
    """Make a UserError of what goes wrong inside."""
    try:
        yield
    except Exception as error:  # its types differ between the versions of huggingface_hub
        if getattr(error, "errno", None) in DISK:
            error.filename = error.filename or what
            raise
        remedy = "check its name, the network and, if it is gated, your login (hf auth login)"
        again = "and run the same command again"
        raise UserError(f"cannot fetch {what} ({reason(error)}): {remedy}, {again}") from None


def reason(error):
    """What an error of huggingface_hub says, without its advice: its first line or two."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 1 + ("Request ID" in "".join(lines[:1]))]) or type(error).__name__
