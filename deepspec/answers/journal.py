"""What was answered of a shard that is not committed yet, a line an answer, so that a killed run
asks nothing twice.

A file on the local disk (beside the artifact, or under `scratch` where that is in a bucket) which a
line is appended to with one write: a kill can tear the last line only, and a torn line is an answer
that is asked for again.
"""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.side_files import folder_beside
from deepspec.storage.store import canonical_json
from deepspec.target.conversation import AnswerRequest


class Journal:
    """Notes by request. Of two that answer the same request the first counts, whoever wrote it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._notes: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        self._torn = False
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    self._torn = not line.endswith(b"\n")
                    with suppress(ValueError, KeyError, TypeError):
                        entry = json.loads(line)
                        self._notes[entry["key"]].append((entry["kind"], entry["fields"]))

    def notes(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        """(kind, fields) of what was noted about a request, oldest first."""
        return self._notes.get(key, [])

    def note(self, key: str, kind: str, fields: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            OSError: it could not be written, or not whole; it may be tried again.
        """
        data = canonical_json({"key": key, "kind": kind, "fields": fields}) + b"\n"
        if self._torn:  # this line must not be glued to half of one
            data = b"\n" + data
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            self._torn = file.write(data) < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def request_key(request: AnswerRequest) -> str:
    """Names a request by all that decides its answer: an answer to another conversation is
    never taken for it.
    """
    decides = [
        [message.entry() for message in request.messages],
        request.seed,
        request.tools,
        request.max_new_tokens,
    ]
    return xxhash.xxh3_64_hexdigest(canonical_json(decides))


def journal_path(artifact: Artifact, shard: int) -> Path:
    return folder_beside(artifact, "journal") / f"{shard:05d}.jsonl"


def open_journal(artifact: Artifact, shard: int) -> Journal:
    return Journal(journal_path(artifact, shard))


def remove_committed(artifact: Artifact) -> None:
    """Take away the journals of shards that are committed, by whichever run: their answers are
    in the store now.
    """
    left = {int(path.stem): path for path in journal_path(artifact, 0).parent.glob("*.jsonl")}
    for shard in artifact.records(left) if left else ():
        left[shard].unlink(missing_ok=True)
