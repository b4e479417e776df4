"""Objects in a file system of fsspec other than S3, such as `memory://` in the tests."""

import threading
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from typing_extensions import override

from deepspec.storage.s3_client import Bucket, Head
from deepspec.storage.s3_errors import Problem, problem_of
from deepspec.storage.store import Buffer, Entry, FolderListing


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
