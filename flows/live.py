"""Artifacts that change while a run works: created once, then updated in place, each at most every
few seconds.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.runtime import flow_run

from flows.reporting import best_effort, prefect_key


class Content(NamedTuple):
    """What an artifact shows."""

    data: float | str
    """A percentage, rows as JSON, or Markdown."""
    description: str
    """Shown above the data."""


class LiveArtifact:
    """One artifact of the run, the same one from its first content to its last."""

    def __init__(
        self, kind: Literal["progress", "table", "markdown"], name: str, *, pause_s: float
    ) -> None:
        self._kind, self._key, self._pause_s = kind, prefect_key(name), pause_s
        # The flow's own, read here: the first content may come from a group's task.
        self._flow_run_id = flow_run.id
        self._id: Any = None
        self._published_at = float("-inf")

    def publish(self, content: Callable[[], Content | None], *, now: bool = False) -> None:
        """Show the content (None: nothing yet); it is computed only where the last one has stood
        for `pause_s`, or `now`.
        """
        if not now and time.monotonic() - self._published_at < self._pause_s:
            return
        found = content()
        if found is None:
            return
        with best_effort(retries=2 if now else 0):
            self._put(found)
        # The pause begins here, so that a server that hangs is left alone for as long.
        self._published_at = time.monotonic()

    def _put(self, content: Content) -> None:
        with get_client(sync_client=True) as client:
            if self._id is None:
                wanted = ArtifactCreate(
                    type=self._kind,
                    key=self._key,
                    flow_run_id=self._flow_run_id,
                    **content._asdict(),
                )
                self._id = client.create_artifact(wanted).id
                return
            # Prefect's own update also sends an event that holds the whole content: those of a long
            # run would fill its database.
            client.request(
                "PATCH", "/artifacts/{id}", json=content._asdict(), path_params={"id": self._id}
            )


def table_content(rows: list[dict[str, Any]], description: str) -> Content:
    """The content of a table artifact."""
    return Content(json.dumps(rows), description)
