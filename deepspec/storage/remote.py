"""A store in a bucket: retries, verified uploads, fetched copies and create-only writes, above
either client.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import xxhash

from deepspec.errors import DamagedData
from deepspec.storage.retries import CHECK_S, Calls, within
from deepspec.storage.s3_client import (
    PART_BYTES,
    Bucket,
    Buffer,
    Failure,
    FolderListing,
    Head,
    ShortBody,
    Upload,
)

log = logging.getLogger(__name__)

SINGLE_PUT_BYTES = PART_BYTES
READERS, BLOCKS_AHEAD = 16, 4
Uploads = Literal["read_back", "size_only"]


class Remote:
    """Objects by key; `disk.Disk` is its counterpart for a local folder."""

    def __init__(self, calls: Calls, *, scratch: Path, uploads: Uploads) -> None:
        self.calls, self.url, self.scratch, self.uploads = calls, calls.url, scratch, uploads
        self._checked_in: set[int] = set()

    @property
    def fs(self) -> Any:
        """The fsspec file system of this process."""
        return self.calls.fsspec_bucket.fs

    def read(self, key: str) -> bytes:
        return self.calls.once("read", key, lambda bucket: bucket.read(key))

    def read_many(self, keys: list[str]) -> list[bytes | None]:
        self.calls.bucket  # noqa: B018 - one client, made before many threads ask for it
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._read_if_there, keys))

    def read_range(self, key: str, start: int, end: int) -> Buffer:
        if end <= start:
            return b""

        def whole(bucket: Bucket) -> Buffer:
            data = bucket.read_range(key, start, end)
            if len(data) != end - start and bucket.head(key).num_bytes >= end:
                raise ShortBody(f"{len(data)} of {end - start} bytes came")
            return data

        data = self.calls.once("read", key, whole)
        if len(data) != end - start:
            raise self.calls.cut_short(key)
        return data

    def head(self, key: str) -> Head:
        return self.calls.once("head", key, lambda bucket: bucket.head(key))

    def size(self, key: str) -> int:
        return self.head(key).num_bytes

    def exists(self, key: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(self.head(key))
        files, folders = self.listing(key)
        return bool(files or folders)

    def listing(self, folder: str) -> FolderListing:
        try:
            return self.calls.once("list", folder, lambda bucket: bucket.listing(folder))
        except FileNotFoundError:
            return FolderListing([], [])

    def remove(self, key: str) -> None:
        self.calls.once("remove", key, lambda bucket: bucket.remove(key))
        files, folders = self.listing(key)
        for name in [*(entry.name for entry in files), *folders]:
            self.remove(f"{key}/{name}")

    def write(self, key: str, data: bytes) -> None:
        self.calls.once("write", key, lambda bucket: bucket.put(key, data))

    def write_new(self, key: str, data: bytes) -> bool:
        created = self._create(key, data)
        if created is not None:
            return created
        if self.exists(key):
            return False
        self.write(key, data)
        return True

    def conditional_writes_work(self) -> bool:
        """Whether the server keeps two writers of one new name apart; that one can write here
        at all shows on the way.
        """
        key = f".probe-{uuid.uuid4().hex}"
        first, second = self._create(key, b"first"), self._create(key, b"second")
        self.calls.once("remove", key, lambda bucket: bucket.remove(key))
        return (first, second) == (True, False)

    def _create(self, key: str, data: bytes) -> bool | None:
        """Whether this call put it there; None if the server refuses to be asked."""
        owner = uuid.uuid4().hex

        def put(bucket: Bucket) -> bool:
            try:
                bucket.put_new(key, data, owner)
            except bucket.errors as error:
                if bucket.problem(error).kind != "exists":
                    raise
                return self._is_owner(bucket, key, owner)
            return True

        try:
            return self.calls.attempt("create", key, put)
        except Failure as failure:
            if failure.problem.kind == "unsupported":
                return None
            raise self.calls.error(failure, key) from None

    @staticmethod
    def _is_owner(bucket: Bucket, key: str, owner: str) -> bool:
        """Whether the object that is in the way is our own: its answer got lost and the request was
        sent again.

        The owner tells that even from somebody else's equal bytes.
        """
        try:
            return bucket.head(key).owner == owner
        except FileNotFoundError:
            raise ConnectionError("the server saw a conflict, and nothing is there now") from None

    def publish(self, local: Path, key: str, *, checksum: str | None = None) -> None:
        for _ in range(2):
            self._upload(local, key)
            wrong = self._what_is_wrong(local, key, checksum)
            if not wrong:
                return
            log.warning("op=publish key=%s reason=%s", key, wrong)
            self.calls.once("remove", key, lambda bucket: bucket.remove(key))
        fix = "check the network and the server, then run the same again"
        raise DamagedData(
            f"twice, what arrived is not what was sent: {wrong}", where=f"{self.url}/{key}", fix=fix
        )

    def _upload(self, local: Path, key: str) -> None:
        if local.stat().st_size <= SINGLE_PUT_BYTES:
            self.write(key, local.read_bytes())
            return
        try:
            self.calls.attempt("upload", key, lambda bucket: bucket.upload(local, key))
        except Failure as failure:
            # The answer to a completed upload may get lost; asked again, the server knows of no
            # such upload any more.
            if failure.problem.kind != "missing":
                raise self.calls.error(failure, key) from None

    def _what_is_wrong(self, local: Path, key: str, checksum: str | None) -> str:
        try:
            num_bytes = self.size(key)
        except FileNotFoundError:
            return "nothing is there"
        if num_bytes != local.stat().st_size:
            return f"{num_bytes} bytes are there, {local.stat().st_size} were sent"
        if checksum is None or self.uploads == "size_only":
            return ""
        found = self.checksum(key)
        return "" if found == checksum else f"the checksum there is {found}, {checksum} was sent"

    def checksum(self, key: str) -> str:
        digest = xxhash.xxh3_128()
        for block in self._blocks(key, self.size(key)):
            digest.update(block)
        return digest.hexdigest()

    def fetch(self, key: str, checksum: str | None = None) -> Path:
        path = PurePosixPath(key)
        folder = (
            self.scratch / "fetched" / xxhash.xxh3_64_hexdigest(self.url.encode()) / path.parent
        )
        if checksum and (folder / f"{checksum}-{path.name}").exists():
            return folder / f"{checksum}-{path.name}"
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            head = self.head(key)
            version = checksum or xxhash.xxh3_128_hexdigest(
                f"{head.num_bytes} {head.etag}".encode()
            )
            cached = folder / f"{version}-{path.name}"
            partial = folder / f".{uuid.uuid4().hex}"
            try:
                if cached.exists() or self._download(key, head, partial, checksum=checksum) == head:
                    if not cached.exists():
                        partial.replace(cached)
                    return cached
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, key: str, head: Head, partial: Path, *, checksum: str | None) -> Head:
        """Writes `partial`; returns what is there afterwards: if it was replaced meanwhile, the
        copy may be made of both.
        """
        digest = xxhash.xxh3_128()
        with partial.open("wb") as file:
            for block in self._blocks(key, head.num_bytes):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        after = self.head(key)
        if after == head and checksum and digest.hexdigest() != checksum:
            what = f"its checksum is {digest.hexdigest()}, not {checksum}"
            raise DamagedData(
                what,
                where=f"{self.url}/{key}",
                fix="run `python -m deepspec verify`, then the stage again",
            )
        return after

    def _blocks(self, key: str, num_bytes: int) -> Iterator[Buffer]:
        """The object's bytes in order, a few ranged reads in flight."""
        self.calls.bucket  # noqa: B018 - one client, made before the threads ask for it
        with ThreadPoolExecutor(BLOCKS_AHEAD) as pool:
            waiting = deque[Any]()
            for start in range(0, num_bytes, PART_BYTES):
                waiting.append(
                    pool.submit(self.read_range, key, start, min(start + PART_BYTES, num_bytes))
                )
                if len(waiting) > BLOCKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def stale_uploads(self, before: float) -> list[Upload]:
        found = self.calls.by_fsspec("list uploads", "", lambda bucket: bucket.uploads())
        return [upload for upload in found if upload.started < before]

    def abort_upload(self, upload: Upload) -> None:
        self.calls.by_fsspec("abort", upload.key, lambda bucket: bucket.abort(upload))

    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written, TransientError if the server is away.

        That is said soon in the first check of a process, after an outage's length later on.
        """
        if os.getpid() in self._checked_in:
            key = f".probe-{uuid.uuid4().hex}"
            self.write(key, b"deepspec")
            self.calls.once("remove", key, lambda bucket: bucket.remove(key))
            return
        quick = Remote(self.calls.quick(), scratch=self.scratch, uploads=self.uploads)
        apart = within(CHECK_S, quick.conditional_writes_work, where=f"store {self.url}")
        self._checked_in.add(os.getpid())
        if not apart:
            log.warning(
                "store=%s ignores If-None-Match: racing workers are not kept apart, the last record wins, both are whole",
                self.url,
            )

    def _read_if_there(self, key: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return self.read(key)
        return None
