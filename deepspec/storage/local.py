"""A store in a local folder: what is visible under a name is whole and on the disk."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from deepspec.errors import DamagedData
from deepspec.storage.s3_errors import DAMAGED_FIX
from deepspec.storage.store import Buffer, Entry, FolderListing, Store, file_checksum


class LocalStore(Store):
    """A folder; its files are its users' own, so `fetch` copies nothing."""

    is_local = True

    def __init__(self, url: str, root: str, *, scratch: Path) -> None:
        self.url, self.root, self.scratch = url, root, scratch
        self.spool = Path(root) / ".staged"

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        return self._file(name).exists()

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._file(name).stat().st_size

    def read(self, name: str) -> bytes:
        """The whole content of a file."""
        return self._file(name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> Buffer:
        """Exactly the bytes [start, end)."""
        room = memoryview(bytearray(max(0, end - start)))
        with self._file(name).open("rb", buffering=0) as file:
            count = read_into(file.fileno(), room, start)
        if count != len(room):
            raise DamagedData(
                f"the file ends before byte {end}", where=self.path(name), fix=DAMAGED_FIX
            )
        return room

    def checksum(self, name: str) -> str:
        """xxh3_128 of what is stored now, as 32 hex digits."""
        return file_checksum(self._file(name))

    def listing(self, folder: str) -> FolderListing:
        """What lies directly in the folder now."""
        found = FolderListing([], [])
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.path(folder)) as items,
        ):
            for item in items:
                if item.is_dir():
                    found.folders.append(item.name)
                    continue
                with suppress(FileNotFoundError):  # removed since the folder was read
                    status = item.stat()
                    found.files.append(Entry(item.name, status.st_size, status.st_mtime))
        return found

    def remove(self, name: str) -> None:
        """Neither a file nor a folder of this name is left."""
        path = self._file(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Replace the file's content at once or not at all."""
        with self.staged() as local:
            local.write_bytes(data)
            self.publish(local, name)

    def write_new(self, name: str, data: bytes) -> bool:
        """True if this call created the file, False if there was one already."""
        target = self._file(name)
        with self.staged() as local:
            local.write_bytes(data)
            _fsync(local)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(local, target)  # a rename would replace what is there; a link refuses
            except FileExistsError:
                return False
        _fsync(target.parent)
        return True

    def publish(self, local: Path, name: str, *, checksum: str | None = None) -> None:
        """Put a staged file in its place; nothing is compared, a rename changes no byte."""
        target = self._file(name)
        _fsync(local)
        target.parent.mkdir(parents=True, exist_ok=True)
        local.replace(target)
        _fsync(target.parent)

    def fetch(self, name: str, checksum: str | None = None) -> Path:
        """The file itself."""
        return self._file(name)

    def _file(self, name: str) -> Path:
        return Path(self.path(name))


def read_into(descriptor: int, room: memoryview, offset: int) -> int:
    """Fill `room` from the file's bytes at `offset`; returns how many there were."""
    done = 0
    # One call of the system ends at 2 GiB.
    while done < len(room) and (count := os.preadv(descriptor, [room[done:]], offset + done)):
        done += count
    return done


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
