"""Digests of what a user brings (prompt files, a local model), as part of fingerprints."""

from functools import lru_cache
from pathlib import Path

import fsspec
import xxhash

from deepspec.errors import DataError
from deepspec.storage.store import file_checksum

SAMPLED_BLOCK = 1 << 20  # bytes at either end of a large file
MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


@lru_cache
def file_digest(path: str) -> str:
    """A local file's checksum as hex; elsewhere what the server gives as its version.

    Raises:
        DataError: the file does not exist.
    """
    filesystem, location = fsspec.core.url_to_fs(path)
    if not filesystem.exists(location):
        raise DataError(
            "the file does not exist",
            where=path,
            fix="check the path in prompts.source.paths, prompts.decontaminate or "
            "evaluate.benchmarks",
        )
    if Path(location).is_file():
        return file_checksum(Path(location))
    return str(filesystem.ukey(location))


def draft_digest(folder: str) -> str:
    """The digest of a draft's files.

    Raises:
        DataError: there is no draft.
    """
    files = [Path(folder) / name for name in ("config.json", "model.safetensors")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            f"this folder holds no draft: {' and '.join(missing)} missing",
            where=folder,
            fix="check the path in train.start_from",
        )
    return folder_digest(str(Path(folder).resolve()))


@lru_cache
def folder_digest(folder: str) -> str:
    """A digest of a local model's files.

    Of a file only its size, first and last block count: 30 GB must not be read to be named.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix not in MODEL_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BLOCK))
            file.seek(max(0, size - SAMPLED_BLOCK))
            digest.update(file.read(SAMPLED_BLOCK))
    return digest.hexdigest()
