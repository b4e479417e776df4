"""Whether a Prefect server answers and has what these flows use. Checked where a run begins, for a
worker's server may be any.
"""

import functools

from deepspec.errors import UserError

OLDEST = (3, 8)  # the first server that has it
HEALTH_S = 10.0


def check_version(server: str) -> None:
    """Return where a server of this version will do.

    Raises:
        UserError: it is too old, or of another major version.
    """
    major, minor = (int(part) for part in server.split(".")[:2])
    if major != OLDEST[0] or (major, minor) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UserError(
            f"the Prefect server has version {server}, which does not fit: "
            f"{wanted} or a later {OLDEST[0]}.x is needed",
            where="PREFECT_API_URL",
            fix="start the server from this environment: `prefect server start`",
        )


def check_answer(*, fix: str) -> None:
    """Return where the server of this process answers.

    One that accepts a connection and never answers is given up after two times `HEALTH_S`.

    Raises:
        UserError: it does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import (
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    with temporary_settings({PREFECT_API_REQUEST_TIMEOUT: HEALTH_S, PREFECT_CLIENT_MAX_RETRIES: 1}):
        problem = get_client(sync_client=True).api_healthcheck()
    if problem is not None:
        raise UserError(
            f"the Prefect server does not answer: {problem}",
            where=str(PREFECT_API_URL.value()),
            fix=fix,
        )


def check_server() -> None:
    """Return where the version of this process's server will do, or cannot be read.

    It is one short request, in each process once.

    Raises:
        UserError: as `check_version`.
    """
    from prefect.settings import PREFECT_API_URL

    version = _version_of(str(PREFECT_API_URL.value()))
    if version is not None:
        check_version(version)


@functools.lru_cache
def _version_of(url: str) -> str | None:
    """The version of the server at this URL, which is the one in Prefect's settings; None if it
    does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        try:
            return str(client.api_version())
        except httpx.HTTPError:
            return None
