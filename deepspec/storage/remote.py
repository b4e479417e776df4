"""A store in a bucket: verified uploads, fetched copies, create-only writes, above any client."""

import contextlib
import copy
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import xxhash
from typing_extensions import override

from deepspec.errors import DamagedData
from deepspec.storage.blocks import hash_blocks, read_blocks
from deepspec.storage.clients import ClientName, client_of
from deepspec.storage.retries import retried, within
from deepspec.storage.s3_client import PART_BYTES, Bucket, Head, create
from deepspec.storage.s3_errors import DAMAGED_FIX, Failure, cut_short, user_error
from deepspec.storage.store import Buffer, FolderListing, Store, Upload, Uploads

log = logging.getLogger(__name__)

QUICK_S, CHECK_S = 6.0, 10.0
SINGLE_PUT_BYTES = PART_BYTES
READERS = 16
ResultT = TypeVar("ResultT")


class RemoteStore(Store):
    """Objects by key, below `root` ("bucket/prefix")."""

    is_local = False

    def __init__(self, url: str, root: str, *, scratch: Path, uploads: Uploads) -> None:
        self.url, self.root, self.scratch, self.uploads = url, root, scratch, uploads
        self.spool = scratch / "staged"
        self.patience_s = float("inf")  # as long as `retried` allows
        self._checked_in: set[int] = set()  # processes that could write here

    @override
    def exists(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(self.head(name))
        return bool(self.names(name))

    def head(self, name: str) -> Head:
        """The object's current version."""
        return self._request("head", name, lambda bucket: bucket.head(name))

    @override
    def size(self, name: str) -> int:
        return self.head(name).num_bytes

    @override
    def read(self, name: str) -> bytes:
        return self._request("read", name, lambda bucket: bucket.read(name))

    @override
    def read_many(self, names: Sequence[str]) -> list[bytes | None]:
        client_of(self.url, self.root)  # one client, made before many threads need it
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read_if_there, names))

    @override
    def read_range(self, name: str, start: int, end: int) -> Buffer:
        if end <= start:
            return b""

        def whole(bucket: Bucket) -> Buffer:
            data = bucket.read_range(name, start, end)
            if len(data) != end - start and bucket.head(name).num_bytes >= end:
                raise ConnectionError(f"{len(data)} of {end - start} bytes came")
            return data

        data = self._request("read", name, whole)
        if len(data) != end - start:
            raise cut_short(f"{self.url}/{name}")
        return data

    @override
    def checksum(self, name: str) -> str:
        return hash_blocks(self._blocks(name, self.size(name)))

    @override
    def listing(self, folder: str) -> FolderListing:
        try:
            return self._request("list", folder, lambda bucket: bucket.listing(folder))
        except FileNotFoundError:
            return FolderListing([], [])

    @override
    def remove(self, name: str) -> None:
        self._remove_object(name)
        for inner in self.names(name):
            self.remove(f"{name}/{inner}")

    @override
    def write(self, name: str, data: bytes) -> None:
        self._request("write", name, lambda bucket: bucket.put(name, data))

    @override
    def write_new(self, name: str, data: bytes) -> bool:
        created = self._create(name, data)
        if created is not None:
            return created
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def conditional_writes_work(self) -> bool:
        """Whether `write_new` keeps racing writers apart; not every S3 server does.

        Three requests find out, and also whether one can write here at all.
        """
        name = f".probe-{uuid.uuid4().hex}"
        created = [self._create(name, data) for data in (b"first", b"second")]
        self._remove_object(name)
        return created == [True, False]

    def _create(self, name: str, data: bytes) -> bool | None:
        owner = uuid.uuid4().hex
        return self._request("create", name, partial(create, key=name, data=data, owner=owner))

    @override
    def publish(self, local: Path, name: str, *, checksum: str | None = None) -> None:
        for _ in range(2):
            self._upload(local, name)
            wrong = self._what_is_wrong(local, name, checksum)
            if not wrong:
                return
            log.warning("op=publish key=%s reason=%s", name, wrong)
            self._remove_object(name)
        raise DamagedData(
            f"twice, what arrived is not what was sent: {wrong}",
            where=f"{self.url}/{name}",
            fix="check the network and the server, then run the same again",
        )

    def _upload(self, local: Path, name: str) -> None:
        if local.stat().st_size <= SINGLE_PUT_BYTES:
            self.write(name, local.read_bytes())
            return
        # The answer to a completed upload may get lost; the next try finds no such upload any more.
        with contextlib.suppress(FileNotFoundError):
            self._request("upload", name, lambda bucket: bucket.upload(local, name))

    def _what_is_wrong(self, local: Path, name: str, checksum: str | None) -> str:
        try:
            num_bytes = self.size(name)
        except FileNotFoundError:
            return "nothing is there"
        if num_bytes != local.stat().st_size:
            return f"{num_bytes} bytes are there, {local.stat().st_size} were sent"
        if checksum is None or self.uploads == "size_only":
            return ""
        found = self.checksum(name)
        return "" if found == checksum else f"the checksum there is {found}, {checksum} was sent"

    @override
    def fetch(self, name: str, checksum: str | None = None) -> Path:
        copies = self.scratch / "fetched" / xxhash.xxh3_64_hexdigest(self.url.encode())
        target = copies / Path(self.path(name)).relative_to(self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        if checksum and (kept := target.with_name(f"{checksum}-{target.name}")).exists():
            return kept
        while True:
            head = self.head(name)
            version = checksum or xxhash.xxh3_128_hexdigest(
                f"{head.num_bytes} {head.etag}".encode()
            )
            kept = target.with_name(f"{version}-{target.name}")
            if kept.exists() or self._download(name, head, kept, checksum=checksum):
                return kept

    def _download(self, name: str, head: Head, target: Path, *, checksum: str | None) -> bool:
        """Whether `target` is now a copy of that version: it may have been replaced meanwhile."""
        unfinished = target.with_name(f".{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                found = hash_blocks(self._blocks(name, head.num_bytes), file)
            if self.head(name) != head:
                return False
            if checksum and found != checksum:
                raise DamagedData(
                    f"its checksum is {found}, not {checksum}",
                    where=f"{self.url}/{name}",
                    fix=DAMAGED_FIX,
                )
            unfinished.replace(target)
            return True
        finally:
            unfinished.unlink(missing_ok=True)

    def _blocks(self, name: str, num_bytes: int) -> Iterator[Buffer]:
        client_of(self.url, self.root)  # one client, made before the threads need it
        return read_blocks(partial(self.read_range, name), num_bytes)

    @override
    def unfinished_uploads(self) -> list[Upload]:
        return self._request("list uploads", "", lambda bucket: bucket.uploads(), client="s3fs")

    @override
    def abort_upload(self, upload: Upload) -> None:
        self._request("abort", upload.key, lambda bucket: bucket.abort(upload), client="s3fs")

    @override
    def probe(self) -> None:
        """Create and remove one small object; the first time in a process within `CHECK_S`."""
        if os.getpid() in self._checked_in:
            super().probe()
            return
        quick = copy.copy(self)
        quick.patience_s = QUICK_S
        if not within(CHECK_S, quick.conditional_writes_work, where=f"store {self.url}"):
            what = "of racing workers the last record wins, both are whole"
            log.warning("store=%s ignores If-None-Match: %s", self.url, what)
        self._checked_in.add(os.getpid())

    def _remove_object(self, name: str) -> None:
        self._request("remove", name, lambda bucket: bucket.remove(name))

    def _request(
        self,
        op: str,
        name: str,
        call: Callable[[Bucket], ResultT],
        *,
        client: ClientName | None = None,
    ) -> ResultT:
        """What `call` returns for the client of this process, tried again while that may help."""
        self.path(name)  # refuses what leads outside
        bucket = client_of(self.url, self.root, name=client)
        where = f"{self.url}/{name}"
        try:
            return retried(f"{op} {where}", lambda: call(bucket), bucket, within_s=self.patience_s)
        except Failure as failure:
            raise user_error(failure.problem, where) from None
