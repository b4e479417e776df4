"""What a client of a bucket must do for the store.

Three fit: s3fs (always there, `s3_fsspec.py`), obstore (faster, optional, `s3_obstore.py`), and any
other file system of fsspec (`FsspecBucket`). None of them retries by itself: how long an outage may
last is decided in `retries.py` alone.
"""

import threading
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from typing_extensions import override

from deepspec.storage.s3_errors import Problem, problem_of
from deepspec.storage.store import Buffer, Entry, FolderListing, Upload

CONNECT_S, READ_S = 5, 60
PART_BYTES, MAX_PARTS = 8 << 20, 10_000
PARTS_AT_ONCE = 4
OWNER = "deepspec-owner"  # user metadata of an object: the one call that created it


class Head(NamedTuple):
    """Which version of an object is there; `owner` is what `put_new` left on it."""

    num_bytes: int
    etag: str
    owner: str = ""


class Bucket(Protocol):
    """One client of one process; keys are relative to the store.

    Every method is one try and may raise any of `errors`.
    """

    errors: tuple[type[Exception], ...]

    def problem(self, error: Exception) -> Problem:
        """What one of `errors` means."""

    def read(self, key: str) -> bytes:
        """The whole object."""

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        """The bytes [start, end), or as many of them as came."""

    def head(self, key: str) -> Head:
        """The object's version."""

    def listing(self, folder: str) -> FolderListing:
        """What lies directly below the prefix."""

    def remove(self, key: str) -> None:
        """There is no object of this key afterwards, as there may have been none before."""

    def put(self, key: str, data: bytes) -> None:
        """Write in one request; the server compares the bytes with their hash where it can."""

    def put_new(self, key: str, data: bytes, owner: str) -> None:
        """Write in one request with `If-None-Match: *`.

        Never in a multipart upload: servers ignore the condition there.
        """

    def upload(self, local: Path, key: str) -> None:
        """Write a file in concurrent parts; a failed upload is aborted, its error raised."""

    def uploads(self) -> list[Upload]:
        """Every unfinished multipart upload below the store's prefix; only s3fs can list them."""
        return []

    def abort(self, upload: Upload) -> None:
        """The upload's parts are gone, unless it was completed or aborted meanwhile."""
        return


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


class FsspecBucket(Bucket):
    """A file system of fsspec; only the threads of this process are kept apart by `put_new`."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, fs: Any, root: str) -> None:
        self.fs, self.root = fs, root
        self._lock = threading.Lock()

    @override
    def problem(self, error: Exception) -> Problem:
        if isinstance(error, FileNotFoundError):
            return Problem("missing", "not found")
        if isinstance(error, FileExistsError):
            return Problem("exists", "exists already")
        return problem_of(error, transient=isinstance(error, ConnectionError | TimeoutError))

    def path(self, key: str) -> str:
        """The key as the file system names it."""
        return f"{self.root}/{key}"

    @override
    def read(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(key)))

    @override
    def read_range(self, key: str, start: int, end: int) -> Buffer:
        return bytes(self.fs.cat_file(self.path(key), start=start, end=end))

    @override
    def head(self, key: str) -> Head:
        info = self.fs.info(self.path(key))
        if info["type"] == "directory":
            raise FileNotFoundError(key)
        return Head(
            int(info["size"]), str(info.get("ETag") or info.get("created") or info.get("mtime"))
        )

    @override
    def listing(self, folder: str) -> FolderListing:
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

    @override
    def remove(self, key: str) -> None:
        if self.fs.isfile(self.path(key)):
            self.fs.rm_file(self.path(key))

    @override
    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(self.path(key), data)

    @override
    def put_new(self, key: str, data: bytes, owner: str) -> None:
        with self._lock:
            if self.fs.exists(self.path(key)):
                raise FileExistsError(key)
            self.put(key, data)

    @override
    def upload(self, local: Path, key: str) -> None:
        self.fs.put_file(str(local), self.path(key))
