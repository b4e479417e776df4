"""What was answered of a shard that is not committed yet, so that a killed run asks nothing twice.

A file on the local disk (in the artifact's folder, or under `scratch` for a store in a bucket) with
one line an answer, each appended by one write: a kill can tear only the last line, and a torn line
is an answer that is requested again.
"""

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
from deepspec.target.conversation import FAILED, AnswerRequest, Failed, Refused, Turn


class Journal:
    """Outcomes by request; of two answers to the same request the first one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        self._torn = False
        with suppress(FileNotFoundError), path.open("rb") as lines:
            for line in lines:
                self._torn = not line.endswith(b"\n")
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    self._entries[entry["key"]].append((entry["kind"], entry["fields"]))

    def final_outcome(self, key: str, *, row_runs: int) -> Turn | Refused | None:
        """The outcome of a request in an earlier run, where no other attempt should be made.

        A row that failed in `row_runs` runs is refused in the next one.
        """
        entries = self._entries.get(key, [])
        for kind, fields in entries:
            if kind == Turn.__name__:
                return Turn(**fields)
        if len(entries) < row_runs:
            return None
        _, last = entries[-1]
        why = f"no answer in {len(entries)} runs; the last error: {last['detail']}"
        return Refused(FAILED, why)

    def append(self, key: str, outcome: Turn | Failed) -> None:
        """Add one line.

        Raises:
            OSError: it was not written, or not whole; it may be tried again.
        """
        entry = {"key": key, "kind": type(outcome).__name__, "fields": outcome._asdict()}
        data = canonical_json(entry) + b"\n"
        if self._torn:  # end the torn line first
            data = b"\n" + data
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            self._torn = file.write(data) < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def request_key(request: AnswerRequest) -> str:
    """A digest of all that decides the answer: equal for no two different requests."""
    messages = [message.entry() for message in request.messages]
    content = [messages, request.seed, request.tools, request.max_new_tokens]
    return xxhash.xxh3_64_hexdigest(canonical_json(content))


def journal_path(artifact: Artifact, shard: int) -> Path:
    """Where the journal of a shard is kept."""
    return folder_beside(artifact, "journal") / f"{shard:05d}.jsonl"


def remove_committed(artifact: Artifact) -> None:
    """Remove the journals of committed shards, whichever run committed them."""
    paths = {int(path.stem): path for path in journal_path(artifact, 0).parent.glob("*.jsonl")}
    for shard in artifact.records(paths) if paths else ():
        paths[shard].unlink(missing_ok=True)
