"""The engine `openai`: answers from any number of OpenAI-compatible servers of the target."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import openai
from anyio.from_thread import BlockingPortal, start_blocking_portal
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from deepspec.answers.progress import AnswerProgress
from deepspec.answers.response import read_reply
from deepspec.answers.server_clients import ServerClient
from deepspec.answers.server_errors import (
    KEY_REFUSED,
    OVERLOADED,
    RETRIED,
    AttemptFailed,
    ServerUnavailable,
    connection_failure,
    retry_after_s,
)
from deepspec.answers.server_pool import PooledServer, ServerPool
from deepspec.config.data import AnswersConfig
from deepspec.config.servers import ServersConfig
from deepspec.config.target import TargetConfig
from deepspec.target.chat import CHAT_FAMILIES, ChatFamily
from deepspec.target.conversation import AnswerRequest, Failed, Outcome, Refused, Turn

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0


@contextmanager
def open_servers(
    answers: AnswersConfig, target: TargetConfig, servers: ServersConfig, progress: AnswerProgress
) -> Iterator["ServerEngine"]:
    """An engine with a connection to each server, of which those that are up are checked.

    Raises:
        ConfigError: a server has another model, or refuses the key.
    """
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_clients(answers, target, servers)) as clients,
    ):
        family = CHAT_FAMILIES[target.chat_family]
        yield ServerEngine(portal, clients, family, servers, progress)


@asynccontextmanager
async def _clients(
    answers: AnswersConfig, target: TargetConfig, servers: ServersConfig
) -> AsyncIterator[dict[str, ServerClient]]:
    async with AsyncExitStack() as stack:
        clients = {}
        for url in servers.endpoints:
            clients[url] = ServerClient(url, answers.sampling, target, servers)
            await stack.enter_async_context(clients[url].http)
        await asyncio.gather(*(client.check_model() for client in clients.values()))
        yield clients


class ServerEngine:
    """A pool of servers, asked from an event loop on a thread of its own: that of `portal`."""

    def __init__(
        self,
        portal: BlockingPortal,
        clients: dict[str, ServerClient],
        family: ChatFamily,
        servers: ServersConfig,
        progress: AnswerProgress,
    ) -> None:
        self.portal = portal
        self.clients = clients
        self.family = family
        self.progress = progress
        self.servers = servers
        self.pool = ServerPool(servers.endpoints, most=servers.requests, lost_s=servers.lost_s)

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
                outcome = read_reply(reply, request, self.family, endpoint=server.url)
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
        kind, cause = connection_failure(error)
        if kind == "unreachable":
            return ServerUnavailable(f"{server.url}: it cannot be reached ({cause})")
        if kind == "timeout":
            server.note_overload(began)
            return AttemptFailed(
                f"{server.url}: no answer within {self.servers.request_timeout_s:g} s"
            )
        detail = self.clients[server.url].key.scrub(str(error))
        return AttemptFailed(f"{server.url}: {detail} ({type(cause).__name__})")

    def _refusal(self, server: PooledServer, error: openai.APIStatusError, began: float) -> Refused:
        """The rejection of a request that no server would ever answer.

        Raises:
            AttemptFailed: a later attempt may succeed.
            ConfigError: the key is refused.
        """
        status = error.status_code
        key = self.clients[server.url].key
        message = key.scrub(error.message)
        if status in KEY_REFUSED:
            raise key.refused(server.url, status) from None
        if status in OVERLOADED:
            after_s = retry_after_s(error.response.headers.get("retry-after"))
            server.note_overload(began, after_s)
            raise ServerUnavailable(f"{server.url}: {status}: {message}") from error
        if status in RETRIED or status >= 500:
            server.note_failure(began)
            raise AttemptFailed(f"{server.url}: {status}: {message}") from error
        self.pool.note_answer(server)
        return Refused(f"http_{status}", message[:1000])
