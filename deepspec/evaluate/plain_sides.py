"""The plain side of a served evaluation, kept until the other side is there.

On one GPU the two servers run one after the other, so that a unit's plain answers wait for its
speculative ones, through a kill as well. A file a unit on the local disk, whole or not there.
"""

from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored
from deepspec.artifacts.side_files import folder_beside


class PlainAnswer(Stored):
    """One prompt at one turn, as the plain server answered it."""

    prompt: int
    token_ids: list[int]
    seconds: float


class PlainGroup(Stored):
    """Prompts that were served together at one turn."""

    turn: int
    seconds: float  # of all together
    answers: list[PlainAnswer]


class PlainSide(Stored):
    """All that the plain server made of a unit, in the order in which it was made."""

    groups: list[PlainGroup]
    skipped: list[dict[str, Any]]


class PlainSides:
    """Those of one artifact, by unit."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.folder = artifact, folder_beside(artifact, "plain")

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:05d}.json"

    def get(self, unit: int) -> PlainSide | None:
        """The unit's plain side, where there is one."""
        path = self._path(unit)
        return PlainSide.model_validate_json(path.read_bytes()) if path.is_file() else None

    def put(self, unit: int, side: PlainSide) -> None:
        """Keep it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(unit).with_suffix(".part")
        part.write_text(side.model_dump_json(), encoding="utf-8")
        part.rename(self._path(unit))

    def remove_committed(self) -> None:
        """Remove those of committed units, whoever committed them."""
        paths = {int(path.stem): path for path in self.folder.glob("*.json")}
        for unit in self.artifact.records(paths) if paths else ():
            paths[unit].unlink(missing_ok=True)
