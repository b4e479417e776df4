"""A store in a local folder: what is visible under a name is whole and on the disk, or it is
not there.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

import xxhash

from deepspec.errors import DamagedData
from deepspec.storage.s3_client import Buffer, Entry, FolderListing

STAGED = ".staged"
COPY_BYTES = 16 << 20


class Disk:
    """A folder; `remote.Remote` is its counterpart for everything else."""

    def __init__(self, root: str, *, spool: Path) -> None:
        self.root, self.spool = Path(root), spool

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def read_many(self, keys: list[str]) -> list[bytes | None]:
        return [_read_if_there(self.root / key) for key in keys]

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        descriptor, data = (
            os.open(self.root / key, os.O_RDONLY),
            memoryview(bytearray(max(0, end - start))),
        )
        try:
            count = read_into(descriptor, data, start)
        finally:
            os.close(descriptor)
        if count != len(data):
            what = f"the file ends before byte {end}"
            raise DamagedData(
                what,
                where=str(self.root / key),
                fix="run `python -m deepspec verify`, then the stage again",
            )
        return data

    def size(self, key: str) -> int:
        return (self.root / key).stat().st_size

    def checksum(self, key: str) -> str:
        return file_checksum(self.root / key)

    def exists(self, key: str) -> bool:
        return (self.root / key).exists()

    def listing(self, folder: str) -> FolderListing:
        files: list[Entry] = []
        folders: list[str] = []
        try:
            with os.scandir(self.root / folder) as found:
                for item in found:
                    _list_item(item, files, folders)
        except (FileNotFoundError, NotADirectoryError):
            return FolderListing([], [])
        return FolderListing(files, folders)

    def remove(self, key: str) -> None:
        path = self.root / key
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def write(self, key: str, data: bytes) -> None:
        staged = self._written(data)
        try:
            self.publish(staged, key)
        finally:
            staged.unlink(missing_ok=True)

    def write_new(self, key: str, data: bytes) -> bool:
        staged, target = self._written(data), self.root / key
        _fsync(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(staged, target)  # a rename would replace what is there; a link refuses
        except FileExistsError:
            return False
        finally:
            staged.unlink(missing_ok=True)
        _fsync(target.parent)
        return True

    def publish(self, local: Path, key: str, *, checksum: str | None = None) -> None:
        target = self.root / key
        _fsync(local)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            local.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            what = "a file from another disk cannot be moved there in one step"
            raise OSError(
                errno.EXDEV, f"{what}; write it to a name from `staged()`", str(local)
            ) from None
        _fsync(target.parent)

    def fetch(self, key: str, checksum: str | None = None) -> Path:
        return self.root / key

    def check_writable(self) -> None:
        """Raise OSError if nothing can be put in place."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"deepspec")
        self.remove(probe)

    def _written(self, data: bytes) -> Path:
        self.spool.mkdir(parents=True, exist_ok=True)
        staged = self.spool / staged_name()
        staged.write_bytes(data)
        return staged


def read_into(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` from the file's bytes at `offset`; returns how many there were. One call of
    the system ends at 2 GiB.
    """
    done = 0
    while done < len(room) and (count := os.preadv(descriptor, [room[done:]], offset + done)):
        done += count
    return done


def file_checksum(local: Path) -> str:
    """xxh3_128 of a file's bytes as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with local.open("rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def staged_name() -> str:
    """A name nobody else has, from which `gc` sees who was writing."""
    return f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex}"


def _read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _list_item(item: os.DirEntry[str], files: list[Entry], folders: list[str]) -> None:
    if item.is_dir():
        folders.append(item.name)
        return
    try:
        status = item.stat()
    except FileNotFoundError:  # removed since the folder was read
        return
    files.append(Entry(item.name, status.st_size, status.st_mtime))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
