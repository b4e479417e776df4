"""What a client of a bucket must do for the store.

Three fit: s3fs (always there, `s3_fsspec.py`), obstore (faster, optional, `s3_obstore.py`), and any
other file system of fsspec (`Bucket`). None of them retries by itself: how long an outage may
last is decided in `retries.py` alone.
"""

import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from deepspec.storage.s3_errors import Problem, problem_of
from deepspec.storage.store import Buffer, Entry, FolderListing, Upload

CONNECT_S, READ_S = 5, 60
PART_BYTES, MAX_PARTS = 8 << 20, 10_000
PARTS_AT_ONCE = 4
OWNER = "deepspec-owner"  # user metadata of an object: the one call that created it
Classes = type[Exception] | tuple[type[Exception], ...]


class Head(NamedTuple):
    """Which version of an object is there; `owner` is what `put_new` left on it."""

    num_bytes: int
    etag: str
    owner: str = ""


class Bucket:
    """One client of one process; keys are relative to the store.

    This one takes any file system of fsspec; those for S3 override what they do better. Every
    method is one try and may raise any of `errors`.
    """

    errors: tuple[type[Exception], ...] = (OSError,)
    meanings: Sequence[tuple[Classes, Problem]] = (
        (FileNotFoundError, Problem("missing", "not found")),
        (FileExistsError, Problem("exists", "exists already")),
    )
    transient: Classes = (ConnectionError, TimeoutError)

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root
        self._lock = threading.Lock()

    def problem(self, error: Exception) -> Problem:
        """What one of `errors` means."""
        for classes, problem in self.meanings:
            if isinstance(error, classes):
                return problem
        return problem_of(error, transient=isinstance(error, self.transient))

    def path(self, key: str) -> str:
        """The key as the file system names it."""
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes:
        """The whole object."""
        return bytes(self.fs.cat_file(self.path(key)))

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        """The bytes [start, end), or as many of them as came."""
        return bytes(self.fs.cat_file(self.path(key), start=start, end=end))

    def head(self, key: str) -> Head:
        """The object's version."""
        info = self.fs.info(self.path(key))
        if info["type"] == "directory":
            raise FileNotFoundError(key)
        return Head(
            int(info["size"]), str(info.get("ETag") or info.get("created") or info.get("mtime"))
        )

    def listing(self, folder: str) -> FolderListing:
        """What lies directly below the prefix."""
        path = self.path(folder)
        self.fs.invalidate_cache(path)
        found = FolderListing([], [])
        for info in self.fs.ls(path, detail=True):
            name = PurePosixPath(info["name"]).name
            if info["type"] == "directory":
                found.folders.append(name)
            elif info["name"].strip("/") != path.strip("/"):  # S3 lists an object under itself
                modified = info.get("LastModified") or info.get("created") or info.get("mtime") or 0
                seconds = modified.timestamp() if isinstance(modified, datetime) else modified
                found.files.append(Entry(name, int(info["size"]), float(seconds)))
        return found

    def remove(self, key: str) -> None:
        """There is no object of this key afterwards, as there may have been none before."""
        if self.fs.isfile(self.path(key)):
            self.fs.rm_file(self.path(key))

    def put(self, key: str, data: bytes) -> None:
        """Write in one request; the server compares the bytes with their hash where it can."""
        self.fs.pipe_file(self.path(key), data)

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        """Write in one request with `If-None-Match: *`, or with only the threads of this process
        kept apart.

        Never in a multipart upload: servers ignore the condition there.
        """
        with self._lock:
            if self.fs.exists(self.path(key)):
                raise FileExistsError(key)
            self.put(key, data)

    def upload(self, local: Path, key: str) -> None:
        """Write a file, in concurrent parts where the client can; a failed upload is aborted, its
        error raised.
        """
        self.fs.put_file(str(local), self.path(key))

    def uploads(self) -> list[Upload]:
        """Every unfinished multipart upload below the store's prefix; only s3fs can list them."""
        return []

    def abort(self, upload: Upload) -> None:
        """The upload's parts are gone, unless it was completed or aborted meanwhile."""


def part_bytes(num_bytes: int) -> int:
    """The size of a part with which the file stays below the number of parts that S3 allows."""
    return max(PART_BYTES, -(-num_bytes // MAX_PARTS))


def create(bucket: Bucket, key: str, data: bytes, *, owner: str) -> bool | None:
    """Whether this call put the object there; None if the server knows no conditional writes.

    If something is in the way, it may be our own: its answer got lost and the request was sent
    again. The owner tells that even from equal bytes of another process.
    """
    try:
        bucket.put_new(key, data, owner)
    except bucket.errors as error:
        kind = bucket.problem(error).kind
        if kind == "unsupported":
            return None
        if kind != "exists":
            raise
        try:
            return bucket.head(key).owner == owner
        except FileNotFoundError:
            raise ConnectionError("a conflict was reported, and nothing is there now") from None
    return True
