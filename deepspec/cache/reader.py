"""The hidden-state cache as training reads it: Arrow shards, every sample one read of exactly its
bytes.

A shard is an Arrow IPC file that any Arrow reader opens. Reading for training never opens it that
way: the index holds the offset and length of every sample's message, so a sample is one `preadv`
locally and one ranged GET on S3, checked before it is decoded (damaged Arrow bytes decode to wrong
numbers without an error). A local cache that memory can hold is mapped instead: its bytes are then
copied once, from the page cache to the batch.
"""

import mmap
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from safetensors.torch import load as load_tensors

from deepspec.artifacts.artifact import RECORDS, Artifact
from deepspec.cache.format import HiddenSample, Layout
from deepspec.cache.index import INDEX, Index, ShardFiles, map_index
from deepspec.cache.local_copies import LocalCopies
from deepspec.cache.prefetch import read_buffered
from deepspec.cache.source import Source
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.process.host_memory import host_memory
from deepspec.storage.local import read_into

# Decoded tensors share memory that must not be written to; nothing here does.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
SCHEMA, SCALES = "schema.arrow", "scales.safetensors"
# of the machine's memory: a larger cache would push its own pages out before they are used again
MAPPED_SHARE = 0.5
MAX_OPEN_FILES = 128  # of 10,000 shards; a process may often hold no more than 1,024


class HiddenCache(Source):
    """A sealed cache, opened by its manifest and index alone; `cache[i]` reads sample i of the
    index.

    May be sent to a spawned process and inherited by a forked one (trap C9): clients of a bucket
    are made anew in each. What stands beside the shards is checked here, each sample when it is
    read; the index is not, its samples' checksums are in it.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        cache_gb: float = 0.0,
        check_reads: Literal["first", "always"] = "first",
    ) -> None:
        manifest = artifact.manifest()
        if manifest is None:
            raise ArtifactMismatch(
                "the hidden states are not finished",
                where=artifact.url,
                fix="run `python -m deepspec hidden` until nothing is missing",
            )
        self.artifact, self.cache_gb, self.check_reads = artifact, cache_gb, check_reads
        scales = (
            load_tensors(artifact.fetch_file(SCALES).read_bytes())
            if SCALES in manifest.files
            else {}
        )
        self.layout = Layout.of(artifact.fetch_file(SCHEMA).read_bytes(), scales)
        self.index: Index = map_index(
            artifact.store.fetch(artifact.path(INDEX), manifest.files[INDEX].checksum)
        )
        self.files = ShardFiles(
            artifact.store.fetch(artifact.path(RECORDS), manifest.records.checksum)
        )
        # samples that need no further look
        self._checked = np.zeros(len(self.index.shard), dtype=bool)
        self.mapped = (
            artifact.store.is_local
            and manifest.totals["num_bytes"] < MAPPED_SHARE * host_memory().total
        )
        self._open = lru_cache(MAX_OPEN_FILES)(
            lambda shard: _OpenFile(artifact.store.path(artifact.path(self.files[shard])))
        )
        self._copies = (
            LocalCopies(artifact.store.scratch / "samples", round(cache_gb * 1e9))
            if cache_gb
            else None
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(HiddenCache, cache_gb=self.cache_gb, check_reads=self.check_reads), (
            self.artifact,
        )

    def __len__(self) -> int:
        return len(self.index.shard)

    def __getitem__(self, number: int) -> HiddenSample:
        return self.read(number, np.empty(self.room(number), dtype=np.uint8))

    def file(self, name: str) -> Path:
        """A local copy of the artifact's file of this name."""
        return self.artifact.fetch_file(name)

    def room(self, number: int) -> int:
        """Bytes of buffer that reading sample `number` takes: none where it is mapped, or a
        remote store's client has its own.
        """
        return (
            int(self.index.num_bytes[number])
            if self.artifact.store.is_local and not self.mapped
            else 0
        )

    def read(self, number: int, buffer: np.ndarray) -> HiddenSample:
        """Sample `number`; its tensors may share the memory of `buffer` (uint8, at least
        `room(number)` long).

        Compared with its checksum the first time that it is read here (`check_reads` may ask for
        every time).

        Raises:
            DamagedData: the bytes are not those that were committed; names shard and row.
        """
        index = self.index
        shard, offset, num_bytes, checksum = (
            int(column[number])
            for column in (index.shard, index.offset, index.num_bytes, index.checksum)
        )
        reason = ""
        try:
            if self.artifact.store.is_local:
                message = self._local(shard, offset, num_bytes, buffer)
                whole = len(message) == num_bytes and bool(
                    self._checked[number] or xxhash.xxh3_64_intdigest(message) == checksum
                )
                self._checked[number] = whole and self.check_reads == "first"
            else:
                message, whole = self._remote(self.files[shard], offset, num_bytes, checksum)
        except OSError as error:  # the file is gone, or a sector is bad
            whole, reason = False, f" ({type(error).__name__}: {error})"
        if not whole:
            raise DamagedData(
                f"row {index.row[number]} of shard {shard} is damaged{reason}",
                where=f"{self.artifact.url}/{self.files[shard]}",
                fix="run `python -m deepspec verify` and then the stage 'hidden' again: "
                f"it captures shard {shard} once more",
            )
        return self.layout.decode(message)

    def _local(self, shard: int, offset: int, num_bytes: int, buffer: np.ndarray) -> memoryview:
        """The bytes of a message, as many as the file has of them."""
        opened = self._open(shard)  # held here, or it might be closed before it is read
        if self.mapped:
            return opened.view[offset : offset + num_bytes]
        room = buffer.data[:num_bytes]
        return room[: read_into(opened.fd, room, offset)]

    def _remote(
        self, file: str, offset: int, num_bytes: int, checksum: int
    ) -> tuple[memoryview, bool]:
        """The bytes from the local copies if they are there and whole, else from the store; and
        whether they are whole.
        """
        key = f"{self.artifact.url}/{file}"
        copy = self._copies.get(key, offset, num_bytes) if self._copies else None
        if copy is not None and xxhash.xxh3_64_intdigest(copy.data) == checksum:
            return copy.data, True
        data = memoryview(
            self.artifact.store.read_range(self.artifact.path(file), offset, offset + num_bytes)
        )
        whole = xxhash.xxh3_64_intdigest(data) == checksum
        if self._copies and whole:
            self._copies.put(key, offset, data)
        return data, whole

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        """Samples in the order asked, read ahead by threads; a sample's tensors are good until
        the next one is asked for.
        """
        reads = (
            (int(self.index.num_bytes[number]), self.room(number), partial(self.read, number))
            for number in numbers
        )
        return read_buffered(reads, max_bytes=max_bytes, threads=threads)


class _OpenFile:
    """A descriptor that is closed when nobody uses it any more: one that was given up may still
    be read by a thread.
    """

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    @cached_property
    def view(self) -> memoryview:
        """The mapped file; lives as long as anything that was decoded from it."""
        empty = os.fstat(self.fd).st_size == 0  # which mmap refuses
        return memoryview(b"" if empty else mmap.mmap(self.fd, 0, prot=mmap.PROT_READ))

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
