"""Where artifacts live: bytes under names, put there at once or not at all.

Everything goes through fsspec: a local folder, `s3://bucket/prefix` or `memory://`. What the bytes mean, and the rule by
which a shard becomes finished, is in `artifact.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from deepspec.errors import DamagedData, StoreError

COPY_BYTES = 16 << 20


class Store:
    """A place for artifacts; knows bytes and names, nothing of what they mean."""

    def __init__(self, url: str, *, scratch: str | None = None, uploads: str = "read_back") -> None:
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"{error}", where=f"store {url}", fix="give a local folder or s3://bucket/prefix") from None
        self.url = url
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise DamagedData(f"the path {relative!r} leads outside the store", where=self.url, fix="remove the file that names it")
        return f"{self.root}/{relative}"

    def check_writable(self, min_free_gb: float = 0.0) -> None:
        """Raise StoreError now, rather than after hours of work, if nothing can be written here."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"deepspec")
            self.remove(probe)
        except (OSError, PermissionError) as error:
            raise StoreError(f"cannot write: {error}", where=f"store {self.url}", fix="choose another with --store") from None
        free_gb = self.free_bytes() / 1e9
        if free_gb < min_free_gb:
            what = f"{free_gb:.2f} GB are free, resources.min_free_gb asks for {min_free_gb:g}"
            raise StoreError(what, where=f"store {self.url}", fix="free some space, choose another --store, or lower the setting")

    def free_bytes(self) -> float:
        return shutil.disk_usage(self.root).free if self.is_local and Path(self.root).exists() else float("inf")

    def exists(self, relative: str) -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def read(self, relative: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(relative)))

    def read_many(self, relatives: Sequence[str]) -> list[bytes | None]:
        return [self.read(r) if self.exists(r) else None for r in relatives]

    scratch = Path.home() / ".cache" / "deepspec"

    def checksum(self, relative):
        return file_checksum(Path(self.path(relative)))

    def size(self, relative):
        return self.fs.size(self.path(relative))

    def read_range(self, relative: str, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path(relative), start=start, end=end))

    def write_new(self, relative: str, data: bytes) -> bool:
        if self.exists(relative):
            return False
        self.write(relative, data)
        return True

    def names(self, folder: str) -> list[str]:
        try:
            self.fs.invalidate_cache(self.path(folder))
            return sorted(PurePosixPath(entry).name for entry in self.fs.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []

    def remove(self, relative: str) -> None:
        if self.exists(relative):
            self.fs.rm(self.path(relative), recursive=True)

    def write(self, relative: str, data: bytes) -> None:
        """Put `data` there at once or not at all."""
        with self.staged() as local:
            local.write_bytes(data)
            self.publish(local, relative)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local file name to write to, on the store's own disk where it has one; removed if nobody published it."""
        folder = Path(self.root) / ".staged" if self.is_local else Path(tempfile.gettempdir()) / "deepspec-staged"
        folder.mkdir(parents=True, exist_ok=True)
        local = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            yield local
        finally:
            local.unlink(missing_ok=True)

    def publish(self, local: Path, relative: str, *, checksum: str | None = None) -> None:
        """Move a staged file to its place: fsync and rename locally, one PUT or a completed multipart upload elsewhere."""
        target = self.path(relative)
        if not self.is_local:
            self.fs.put_file(str(local), target)
            return
        with local.open("rb+") as file:
            os.fsync(file.fileno())
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        local.replace(target)
        _fsync_folder(Path(target).parent)

    def fetch(self, relative: str, checksum: str | None = None) -> Path:
        """A local file with the contents of a stored one: the file itself in a local store, a cached copy otherwise."""
        if self.is_local:
            return Path(self.path(relative))
        cached = Path.home() / ".cache" / "deepspec" / xxhash.xxh3_64_hexdigest(self.url.encode()) / relative
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_name(f"{cached.name}.{uuid.uuid4().hex}")
            self.fs.get_file(self.path(relative), str(partial))
            partial.replace(cached)
        return cached


def file_checksum(local: Path) -> str:
    """xxh3_128 of a file's bytes as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with local.open("rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def pretty_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
