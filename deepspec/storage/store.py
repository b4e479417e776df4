"""Where artifacts live: bytes under names, put there at once or not at all.

A local folder (`disk.py`), or `s3://bucket/prefix` and `memory://` (`remote.py`). What the bytes
mean, and the rule by which a shard becomes finished, is in `artifact.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deepspec.errors import DamagedData, StoreError
from deepspec.storage.local import STAGED, Disk, file_checksum, staged_name
from deepspec.storage.remote import Remote, Uploads
from deepspec.storage.retries import Calls
from deepspec.storage.s3_client import Buffer, Entry, Upload, scrub

__all__ = ["Entry", "Store", "Upload", "canonical_json", "file_checksum", "pretty_json"]


class Store:
    """A place for artifacts; knows bytes and names, nothing of what they mean. Goes to other
    processes as its URL.

    Names are relative to the store. A name that is not there is a FileNotFoundError, where nothing
    else is said. A remote store tries again for about 40 s while the server is away, then raises
    TransientError; keys that are wrong, a missing bucket and the like are a StoreError at once.

    Args:
        url: a local folder, `s3://bucket/prefix` (credentials and endpoint: as for every AWS tool)
            or `memory://name`.
        scratch: local folder for copies of remote files, both ways (None: ~/.cache/deepspec).
        uploads: whether a file published with a checksum is read back from the bucket, or only its
            size compared.
    """

    def __init__(
        self, url: str, *, scratch: str | None = None, uploads: Uploads = "read_back"
    ) -> None:
        self.url, self.uploads = url, uploads
        self.is_local, self.root = _resolve(url)
        self.scratch = Path(scratch) if scratch else Path.home() / ".cache" / "deepspec"
        self.spool = Path(self.root) / STAGED if self.is_local else self.scratch / "staged"
        self._place: Disk | Remote
        if self.is_local:
            self._place = Disk(self.root, spool=self.spool)
        else:
            self._place = Remote(
                Calls(url.rstrip("/"), self.root), scratch=self.scratch, uploads=uploads
            )

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        return _store, (self.url, str(self.scratch), self.uploads)

    @property
    def fs(self) -> Any:
        """Fsspec's view of the store, made for this process; `path` gives its names."""
        return self._place.fs if isinstance(self._place, Remote) else fsspec.filesystem("file")

    def path(self, relative: str) -> str:
        return f"{self.root}/{self._key(relative)}"

    def exists(self, relative: str) -> bool:
        return self._place.exists(self._key(relative))

    def size(self, relative: str) -> int:
        return self._place.size(self._key(relative))

    def read(self, relative: str) -> bytes:
        return self._place.read(self._key(relative))

    def read_many(self, relatives: Sequence[str]) -> list[bytes | None]:
        """The contents in the order asked for, many requests in flight; None for a name that is
        not there (any more).
        """
        return self._place.read_many([self._key(relative) for relative in relatives])

    def read_range(self, relative: str, start: int, end: int) -> Buffer:
        """Exactly the bytes [start, end), without a copy where the client can.

        Raises:
            DamagedData: the file ends before.
        """
        return self._place.read_range(self._key(relative), start, end)

    def checksum(self, relative: str) -> str:
        """xxh3_128 of what is stored there now, as 32 hex digits: no local copy is asked."""
        return self._place.checksum(self._key(relative))

    def names(self, folder: str) -> list[str]:
        """What lies directly in the folder now, files and folders."""
        files, folders = self._place.listing(self._key(folder))
        return sorted([*(entry.name for entry in files), *folders])

    def entries(self, folder: str) -> list[Entry]:
        """The files directly in the folder now, by name."""
        return sorted(self._place.listing(self._key(folder)).files)

    def remove(self, relative: str) -> None:
        """Neither a file nor a folder of this name is there afterwards."""
        self._place.remove(self._key(relative))

    def write(self, relative: str, data: bytes) -> None:
        """Put `data` there at once or not at all, instead of what was there."""
        self._place.write(self._key(relative), data)

    def write_new(self, relative: str, data: bytes) -> bool:
        """True if this call put `data` there, False if something was there before; one of any
        number of racing writers gets True.
        """
        return self._place.write_new(self._key(relative), data)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A local file name to write to, on the store's own disk where it has one; removed if
        nobody published it.
        """
        self.spool.mkdir(parents=True, exist_ok=True)
        local = self.spool / staged_name()
        try:
            yield local
        finally:
            local.unlink(missing_ok=True)

    def publish(self, local: Path, relative: str, *, checksum: str | None = None) -> None:
        """Put a staged file in its place: fsync and rename locally; uploaded, then compared with
        `checksum` (xxh3_128) elsewhere.

        Raises:
            DamagedData: what arrived in the bucket is not what was sent, twice.
        """
        self._place.publish(local, self._key(relative), checksum=checksum)

    def fetch(self, relative: str, checksum: str | None = None) -> Path:
        """A local file with the contents of a stored one: the file itself in a local store, a copy
        kept in `scratch` otherwise.

        The copy is of the version that is there now; with a `checksum` (xxh3_128), of the version
        that has it, and a copy once made is used without asking the server.

        Raises:
            DamagedData: the remote file has another checksum.
        """
        return self._place.fetch(self._key(relative), checksum)

    def stale_uploads(self, before: float) -> list[Upload]:
        """Multipart uploads begun before this time (unix seconds) and never finished; always
        none outside S3.
        """
        return self._place.stale_uploads(before) if isinstance(self._place, Remote) else []

    def abort_upload(self, upload: Upload) -> None:
        if isinstance(self._place, Remote):
            self._place.abort_upload(upload)

    def check_writable(self, min_free_gb: float = 0.0) -> None:
        """Raise StoreError now, rather than after hours of work, if nothing can be written here;
        TransientError if nobody answers.

        A remote store gets 10 s for the first check of a process; once one went well, a server that
        is away is waited for.
        """
        try:
            with self.staged() as probe:
                probe.write_bytes(b"deepspec")
            self._place.check_writable()
        except OSError as error:
            what = f"cannot write: {error.strerror or scrub(str(error))}"
            raise StoreError(
                what, where=f"store {self.url}", fix="choose another with --store"
            ) from None
        free_gb = self.free_bytes() / 1e9
        if free_gb < min_free_gb:
            what = (
                f"{free_gb:.2f} GB are free, resources.storage.min_free_gb asks for {min_free_gb:g}"
            )
            raise StoreError(
                what,
                where=f"store {self.url}",
                fix="free some space, choose another --store, or lower the setting",
            )

    def free_bytes(self) -> float:
        """Room on the disk that files are written to: the store's own, or that of `scratch` for
        a remote store.
        """
        folder = Path(self.root) if self.is_local else self.scratch
        return shutil.disk_usage(folder).free if folder.exists() else float("inf")

    def conditional_writes_work(self) -> bool:
        """Whether `write_new` keeps racing writers apart here; on S3 that depends on the
        server, which three requests find out.
        """
        return self._place.conditional_writes_work() if isinstance(self._place, Remote) else True

    def _key(self, relative: str) -> str:
        parts = PurePosixPath(relative)
        if parts.is_absolute() or ".." in parts.parts:
            raise DamagedData(
                f"the path {relative!r} leads outside the store",
                where=self.url,
                fix="remove the file that names it",
            )
        return relative


def canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def pretty_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _resolve(url: str) -> tuple[bool, str]:
    """Whether the URL is a local folder, and its path or "bucket/prefix"."""
    protocol = fsspec.utils.get_protocol(url)
    # a key may hold a slash: then the @ is behind it
    place = url.partition("://")[2].partition("/")[0]
    if "@" in place or (protocol in ("s3", "s3a") and ":" in place):
        raise StoreError(
            "keys do not belong into a store's URL",
            where=f"store {protocol}://",
            fix="set AWS_ACCESS_KEY_ID or AWS_PROFILE",
        )
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise StoreError(
            f"{error}", where=f"store {url}", fix="give a local folder or s3://bucket/prefix"
        ) from None
    root = str(kind._strip_protocol(url)).rstrip("/")
    if protocol in ("s3", "s3a") and not root:
        raise StoreError(
            "the URL names no bucket", where=f"store {url}", fix="give s3://bucket/prefix"
        )
    return issubclass(kind, LocalFileSystem), root


def _store(url: str, scratch: str, uploads: Uploads) -> Store:
    return Store(url, scratch=scratch, uploads=uploads)
