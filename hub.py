"""Files of a Hugging Face dataset, fetched once: what was cut off goes on where it was.

huggingface_hub's own download begins a file anew after a kill (its issue 4196). This one keeps the
part, in huggingface_hub's cache, and checks the sha256 of what came.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from common import DISK, UserError, check_disk

PAUSES = 1, 10, 60, 300  # seconds to wait for a network that fails before each further try


class Dataset:
    """A dataset at one commit, and its `files`, with rfilename, size and lfs (sha256 or None)."""

    def __init__(self, name, revision):
        from huggingface_hub import HfApi

        self.name = name
        with fetching(f"the list of files of {name} at {revision}"):
            info = HfApi().dataset_info(name, revision=revision, files_metadata=True)
        self.commit, self.files = info.sha, sorted(info.siblings, key=lambda file: file.rfilename)

    def cached(self, file):
        """Where huggingface_hub's cache has a file: (under its name, under its hash)."""
        from huggingface_hub.file_download import repo_folder_name

        folder = cache() / repo_folder_name(repo_id=self.name, repo_type="dataset")
        by_hash = folder / "blobs" / (file.lfs.sha256 if file.lfs else file.blob_id)
        return folder / "snapshots" / self.commit / file.rfilename, by_hash

    def missing(self, files):
        """The bytes of these files that the cache lacks."""
        places = ((file, *self.cached(file)) for file in files)
        return sum(file.size - held(blob) for file, path, blob in places if not path.exists())

    def download(self, file):
        """Fetch a file into huggingface_hub's cache; return its path there."""
        from huggingface_hub.file_download import are_symlinks_supported
        from huggingface_hub.utils import WeakFileLock

        path, blob = self.cached(file)
        lock = cache() / ".locks" / blob.parts[-3] / f"{blob.name}.lock"  # huggingface_hub's own
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not path.exists():
                self.fetch(file, blob)
                path.parent.mkdir(parents=True, exist_ok=True)
                if are_symlinks_supported(cache()):
                    path.unlink(missing_ok=True)  # a link to a file that was deleted
                    path.symlink_to(os.path.relpath(blob, path.parent))
                else:
                    os.replace(blob, path)
        return path

    def fetch(self, file, path):
        """Fetch a file to `path`, unless it is there, going on from what is there of it."""
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(incomplete(path), "ab+") as part:
            begun = part.tell()
            with fetching(f"{file.rfilename} of {self.name}"):
                self.receive(file, part)
            part.flush()
            os.fsync(part.fileno())
            part.seek(0)
            sha256 = hashlib.file_digest(part, "sha256").hexdigest()
        if file.lfs and sha256 != file.lfs.sha256:
            incomplete(path).unlink(missing_ok=True)
            if begun:  # by another file, or a disk that lost power
                return self.fetch(file, path)
            wrong = f"came with another sha256 than {file.lfs.sha256}"
            raise UserError(f"{file.rfilename} of {self.name} {wrong}: try again")
        os.replace(incomplete(path), path)

    def receive(self, file, part):
        """Append to `part` what it lacks of a file; wait where the network fails, and go on."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers
        from tqdm import tqdm

        url = hf_hub_url(self.name, file.rfilename, repo_type="dataset", revision=self.commit)
        # of what is packed on the way no part can be asked for
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        for pause in (*PAUSES, None):
            if part.seek(0, os.SEEK_END) > file.size:  # it is of no use
                part.truncate(0)
            size = dict(resume_size=part.seek(0, os.SEEK_END), expected_size=file.size)
            try:
                return http_get(url, part, headers=headers, **size)
            except Exception as error:  # its types differ between the versions of huggingface_hub
                status = getattr(getattr(error, "response", None), "status_code", 500)
                if not pause or status < 500 or getattr(error, "errno", None) in DISK:
                    raise
                tqdm.write(f"{file.rfilename}: {reason(error)}: trying again in {pause} s")
                time.sleep(pause)


def cache():
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def incomplete(path):
    return path.with_name(f"{path.name}.incomplete")  # as huggingface_hub names it, too


def held(path):
    """The bytes that are there of a file to be fetched."""
    there = [p.stat().st_size for p in (path, incomplete(path)) if p.exists()]
    return max(there, default=0)


def check_room(folder, size):
    """Say what is to be fetched into a folder, and that its disk has room; a UserError if not."""
    from tqdm import tqdm

    free = check_disk(folder, size)
    if size and os.environ.get("RANK", "0") == "0":
        size, free = (tqdm.format_sizeof(n, "B") for n in (size, free))
        print(f"to fetch: {size} into {folder}; {free} are free", flush=True)


@contextlib.contextmanager
def fetching(what):
    """Make a UserError of whatever the network does inside."""
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
