"""Whether a Prefect server has what these flows use; asked where a run begins, because a worker's server may be any."""

from __future__ import annotations

import functools

from deepspec.errors import UserError

OLDEST = (3, 8)  # the first server that has it


def check_version(server: str) -> None:
    """Return where a server of this version will do.

    Raises:
        UserError: it is too old, or of another generation.
    """
    major, minor = (int(part) for part in server.split(".")[:2])
    if major != OLDEST[0] or (major, minor) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        what = f"the Prefect server has version {server}, which does not fit: {wanted} or a later {OLDEST[0]}.x is needed"
        raise UserError(what, where="PREFECT_API_URL", fix="start the server from this environment: `prefect server start`")


def check_server() -> None:
    """Return where the server of this process will do, or does not say: one short request, the first time.

    Raises:
        UserError: as `check_version`.
    """
    from prefect.settings import PREFECT_API_URL

    version = _version_of(str(PREFECT_API_URL.value()))
    if version is not None:
        check_version(version)


@functools.lru_cache
def _version_of(url: str) -> str | None:
    """The version of the server at this URL, which is the one in Prefect's settings; None if it does not answer."""
    import httpx
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        try:
            return str(client.api_version())
        except httpx.HTTPError:
            return None
