"""What a place for artifacts can do: keep bytes under names, put there at once or not at all.

There are two: a local folder (`local.py`) and a bucket (`remote.py`); `urls.open_store` finds the
right one. What the bytes mean, and the rule by which a shard becomes finished, is the business of
`artifacts.artifact`.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

import xxhash

from deepspec.errors import DamagedData, StoreError
from deepspec.storage.s3_errors import scrub

Buffer = bytes | memoryview
# whether a file published with a checksum is read back from a bucket, or only its size compared
Uploads = Literal["read_back", "size_only"]


class Entry(NamedTuple):
    """One file of a folder; `modified` in unix seconds."""

    name: str
    num_bytes: int
    modified: float


class FolderListing(NamedTuple):
    """What lies directly in a folder."""

    files: list[Entry]
    folders: list[str]


class Upload(NamedTuple):
    """A multipart upload that is neither complete nor aborted; `started` in unix seconds."""

    key: str
    upload_id: str
    started: float


class Store(Protocol):
    """A place for artifacts, which may be sent to other processes.

    Names are relative to the store; one that leads outside raises DamagedData. A name without a
    file raises FileNotFoundError where a method does not promise otherwise. A remote store tries
    again for about 40 s while the server is away, then raises TransientError; wrong keys, a missing
    bucket and the like raise StoreError at once.
    """

    url: str
    root: str  # the folder, or "bucket/prefix"
    is_local: bool
    scratch: Path  # local folder for copies of remote files, both ways
    spool: Path  # where staged files lie: on the store's own disk, or in `scratch`

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str) -> bytes:
        """The whole content of a file."""

    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The contents in the order of the names, None where there is no file (any more)."""
        return list(map(self.read_if_there, names))

    def read_if_there(self, name: str) -> bytes | None:
        """The whole content of a file, None where there is none."""
        with suppress(FileNotFoundError):
            return self.read(name)
        return None

    def read_range(self, name: str, start: int, end: int) -> Buffer:
        """Exactly the bytes [start, end), without a copy where the client can.

        Raises:
            DamagedData: the file ends before `end`.
        """

    def checksum(self, name: str) -> str:
        """xxh3_128 of what is stored now, as 32 hex digits; never that of a local copy."""

    def listing(self, folder: str) -> FolderListing:
        """What lies directly in the folder now; nothing where there is no such folder."""

    def remove(self, name: str) -> None:
        """Neither a file nor a folder of this name is left."""

    def write(self, name: str, data: bytes) -> None:
        """Replace the file's content at once or not at all."""

    def write_new(self, name: str, data: bytes) -> bool:
        """True if this call created the file, False if there was one already.

        Of any number of racing writers exactly one gets True.
        """

    def publish(self, local: Path, name: str, *, checksum: str | None = None) -> None:
        """Put a staged file in its place: fsync and rename in a folder, an upload elsewhere.

        An upload is compared with `checksum` (xxh3_128) afterwards.

        Raises:
            DamagedData: what arrived in the bucket is not what was sent, twice.
        """

    def fetch(self, name: str, checksum: str | None = None) -> Path:
        """A local file with the content: the file itself, or a copy kept in `scratch`.

        The copy is of the current version; with a `checksum` (xxh3_128), of the version that has
        it, and a copy made once is used again without a request.

        Raises:
            DamagedData: the remote file has another checksum.
        """

    def probe(self) -> None:
        """Create and remove one small file.

        Raises:
            OSError, StoreError: nothing can be written.
            TransientError: the server does not answer.
        """
        name = f".probe-{uuid.uuid4().hex}"
        self.write(name, b"deepspec")
        self.remove(name)

    def unfinished_uploads(self) -> list[Upload]:
        """Multipart uploads that are neither complete nor aborted: S3 only."""
        return []

    def abort_upload(self, upload: Upload) -> None:
        """The parts of the upload are gone, unless it was completed meanwhile."""
        return

    def path(self, name: str) -> str:
        """The name below `root`.

        Raises:
            DamagedData: it leads outside the store.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise DamagedData(
                f"the path {name!r} leads outside the store",
                where=self.url,
                fix="remove the file that names it",
            )
        return f"{self.root}/{name}"

    def names(self, folder: str) -> list[str]:
        """What lies directly in the folder now, files and folders, sorted."""
        files, folders = self.listing(folder)
        return sorted([*(entry.name for entry in files), *folders])

    def entries(self, folder: str) -> list[Entry]:
        """The files directly in the folder now, sorted by name."""
        return sorted(self.listing(folder).files)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local file name to write to before `publish`; what is not published is removed."""
        self.spool.mkdir(parents=True, exist_ok=True)
        # `gc` reads from the name which process wrote the file.
        local = self.spool / f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex}"
        try:
            yield local
        finally:
            local.unlink(missing_ok=True)

    def check_writable(self, min_free_gb: float = 0.0) -> None:
        """Find out now, rather than after hours of work, whether anything can be written.

        A remote store gets 10 s for the first check of a process; once one went well, a server that
        is away is waited for.

        Raises:
            StoreError: nothing can be written, or less than `min_free_gb` is free.
            TransientError: the server does not answer.
        """
        where = f"store {self.url}"
        try:
            with self.staged() as local:
                local.write_bytes(b"deepspec")
            self.probe()
        except OSError as error:
            raise StoreError(
                f"cannot write: {error.strerror or scrub(str(error))}",
                where=where,
                fix="choose another with --store",
            ) from None
        free_gb = self.free_bytes() / 1e9
        if free_gb < min_free_gb:
            raise StoreError(
                f"only {free_gb:.2f} GB are free, resources.storage.min_free_gb is {min_free_gb:g}",
                where=where,
                fix="free some space, choose another --store, or lower the setting",
            )

    def free_bytes(self) -> float:
        """Room on the disk that files are staged on."""
        folder = self.spool.parent
        return shutil.disk_usage(folder).free if folder.exists() else float("inf")


def file_checksum(local: Path) -> str:
    """xxh3_128 of a file's bytes as 32 hex digits."""
    with local.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value that is hashed: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def pretty_json(value: object) -> bytes:
    """JSON for files that people read: sorted keys, a line each."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
