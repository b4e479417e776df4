"""The engine `openai`: answers from any number of OpenAI-compatible servers of the target."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
import openai
from anyio.from_thread import BlockingPortal, start_blocking_portal
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from deepspec.answers.progress import AnswerProgress
from deepspec.answers.response import read_reply
from deepspec.answers.server_clients import ServerClient
from deepspec.answers.server_pool import PooledServer, ServerPool
from deepspec.config.run import RunConfig
from deepspec.config.servers import ServersConfig
from deepspec.serving.protocol import KEY_REFUSED, RETRIED
from deepspec.target.chat import CHAT_FAMILIES
from deepspec.target.conversation import AnswerRequest, Failed, Outcome, Refused, Turn

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
OVERLOADED = (429, 503)
UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)


class AttemptFailed(Exception):
    """An attempt at a request failed for a reason that may pass."""


class ServerUnavailable(AttemptFailed):
    """The server was unreachable or overloaded, which does not count against the request."""


@contextmanager
def open_servers(
    config: RunConfig, servers: ServersConfig, progress: AnswerProgress
) -> Iterator["ServerEngine"]:
    """An engine with a connection to each server, of which those that are up are checked.

    Raises:
        ConfigError: a server has another model, or refuses the key.
    """
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_clients(config, servers)) as clients,
    ):
        yield ServerEngine(portal, clients, config, servers, progress)


@asynccontextmanager
async def _clients(
    config: RunConfig, servers: ServersConfig
) -> AsyncIterator[dict[str, ServerClient]]:
    async with AsyncExitStack() as stack:
        clients = {}
        for url in servers.endpoints:
            clients[url] = ServerClient(url, config, servers)
            await stack.enter_async_context(clients[url].http)
        await asyncio.gather(*(client.check_model() for client in clients.values()))
        yield clients


@dataclass
class ServerEngine:
    """A pool of servers, asked from an event loop on a thread of its own: that of `portal`."""

    portal: BlockingPortal
    clients: dict[str, ServerClient]
    config: RunConfig
    servers: ServersConfig
    """Those of the run, or the one that the stage started."""
    progress: AnswerProgress

    def __post_init__(self) -> None:
        self.pool = ServerPool(self.servers)

    async def ask(self, request: AnswerRequest) -> Outcome:
        """The outcome of a request after as many attempts as it takes or may have.

        Raises:
            TransientError: all servers are lost.
            ConfigError: the key is refused.
        """
        counted = 0

        async def attempt() -> Turn | Refused:
            nonlocal counted
            try:
                return await self._attempt(request)
            except AttemptFailed as error:
                self.progress.errors += 1
                if isinstance(error, ServerUnavailable):
                    self.pool.refuse_if_lost()
                else:
                    counted += 1
                raise

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(AttemptFailed),
            stop=lambda state: counted >= self.servers.request_tries,
            reraise=True,
            wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        )
        try:
            return await retrying(attempt)
        except AttemptFailed as error:
            return Failed(f"{counted} attempts failed, the last one with: {error}")

    async def _attempt(self, request: AnswerRequest) -> Turn | Refused:
        """One attempt at one server; how it went decides what the pool sends there next."""
        async with self.pool.lease() as server:
            began = time.monotonic()
            self.progress.in_flight += 1
            try:
                reply = await self.clients[server.url].complete(request)
                family = CHAT_FAMILIES[self.config.target.chat_family]
                outcome = read_reply(reply, request, family, endpoint=server.url)
            except openai.APIStatusError as error:
                return self._refusal(server, error, began)
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                raise self._failure(server, error, began) from error
            finally:
                self.progress.in_flight -= 1
            self.pool.note_answer(server)
            return outcome

    def _failure(self, server: PooledServer, error: Exception, began: float) -> AttemptFailed:
        server.note_failure(began)
        causes = list(_causes(error))
        cause = causes[-1]
        if any(isinstance(found, UNREACHABLE) for found in causes):
            return ServerUnavailable(f"{server.url}: it cannot be reached ({cause})")
        hung_up = any(isinstance(found, HUNG_UP) for found in causes)
        if isinstance(error, openai.APITimeoutError) and not hung_up:
            server.note_overload(began)
            return AttemptFailed(
                f"{server.url}: no answer within {self.servers.request_timeout_s:g} s"
            )
        detail = self.clients[server.url].scrub(str(error))
        return AttemptFailed(f"{server.url}: {detail} ({type(cause).__name__})")

    def _refusal(self, server: PooledServer, error: openai.APIStatusError, began: float) -> Refused:
        """The rejection of a request that no server would ever answer.

        Raises:
            AttemptFailed: a later attempt may succeed.
            ConfigError: the key is refused.
        """
        status, client = error.status_code, self.clients[server.url]
        message = client.scrub(error.message)
        if status in KEY_REFUSED:
            raise client.key_refused(status) from None
        if status in OVERLOADED:
            header = error.response.headers.get("retry-after", "")
            server.note_overload(began, _retry_after_s(header))
            raise ServerUnavailable(f"{server.url}: {status}: {message}") from error
        if status in RETRIED or status >= 500:
            server.note_failure(began)
            raise AttemptFailed(f"{server.url}: {status}: {message}") from error
        self.pool.note_answer(server)
        return Refused(f"http_{status}", message[:1000])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: `openai` raises lost connections as time-outs."""
    while error is not None:
        yield error
        error = error.__cause__


def _retry_after_s(header: str) -> float:
    """Retry-After in seconds, from either of its forms; 0 where there is none."""
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0
