"""The engine `openai`: answers from any number of OpenAI-compatible servers of the target."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import aiohttp
import openai
from anyio.from_thread import BlockingPortal, start_blocking_portal
from jinja2 import TemplateError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from deepspec.answers.progress import AnswerProgress
from deepspec.answers.read_prompts import difference, ids_to_keep
from deepspec.answers.response import read_reply
from deepspec.answers.server_clients import UNREACHABLE, ServerClient, causes
from deepspec.answers.server_pool import PooledServer, ServerPool
from deepspec.config.run import RunConfig
from deepspec.config.servers import ServersConfig
from deepspec.errors import ConfigError
from deepspec.serving.protocol import KEY_REFUSED, RETRIED
from deepspec.target.chat import CHAT_FAMILIES, Chat
from deepspec.target.conversation import AnswerRequest, Failed, Outcome, Refused, Turn

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0  # a server's own rest is longer; a row is to notice soon that it is back
LOOK_S = 1.0  # between two looks at a server that rests, and for one of them twice that at most
OVERLOADED = (429, 503)
HUNG_UP = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError)


class AttemptFailed(Exception):
    """An attempt at a request failed for a reason that may pass."""


class ServerUnavailable(AttemptFailed):
    """The server was unreachable or overloaded, which does not count against the request."""


class Reply(NamedTuple):
    """The outcome of a request."""

    outcome: Outcome
    difference: str | None = None
    """How the prompt that the server read differs from the expected one."""
    limit: int | None = None
    """What the context left of the answer's tokens, where that is less than the request's."""


@contextmanager
def open_servers(
    config: RunConfig, servers: ServersConfig, chat: Chat | None, progress: AnswerProgress
) -> Iterator["ServerEngine"]:
    """An engine with a connection to each server, of which those that are up are checked.

    Raises:
        ConfigError: a server has another model, or refuses the key.
    """
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(_clients(config, servers)) as clients,
    ):
        engine = ServerEngine(portal, clients, config, servers, chat, progress)
        looking = portal.start_task_soon(engine.look_at_resting)
        try:
            yield engine
        finally:
            looking.cancel()


@asynccontextmanager
async def _clients(
    config: RunConfig, servers: ServersConfig
) -> AsyncIterator[dict[str, ServerClient]]:
    async with AsyncExitStack() as stack:
        clients = {}
        for url in servers.endpoints:
            clients[url] = ServerClient(url, config, servers)
            await stack.enter_async_context(clients[url].http)
        await asyncio.gather(*(client.look() for client in clients.values()))
        yield clients


@dataclass
class ServerEngine:
    """A pool of servers, asked from an event loop on a thread of its own: that of `portal`."""

    portal: BlockingPortal
    clients: dict[str, ServerClient]
    config: RunConfig
    servers: ServersConfig
    """Those of the run, or the one that the stage started."""
    chat: Chat | None
    """The target's own; without it no prompt is counted or compared."""
    progress: AnswerProgress

    def __post_init__(self) -> None:
        self.pool = ServerPool(self.servers)
        for server in self.pool.servers:
            server.max_model_len = self.clients[server.url].max_model_len

    async def look_at_resting(self) -> None:
        """Look at servers that rest or were never reached, so that one that is back is used."""
        while True:
            await asyncio.sleep(LOOK_S)
            resting = [server for server in self.pool.servers if server.is_to_be_looked_at]
            await asyncio.gather(*map(self._look, resting))

    async def _look(self, server: PooledServer) -> None:
        client, is_up = self.clients[server.url], False
        try:
            is_up = await client.look(timeout_s=2 * LOOK_S)
        except ConfigError as error:  # one with another model is none of ours
            if not server.is_away:
                log.warning("endpoint=%s is not used: %s", server.url, error.what)
        server.note_look(is_up=is_up, max_model_len=client.max_model_len)

    async def ask(self, request: AnswerRequest) -> Reply:
        """The outcome of a request after as many attempts as it takes or may have.

        Raises:
            TransientError: all servers are lost.
            ConfigError: the key is refused.
        """
        try:
            prompt = self.chat.render(request.messages, request.tools) if self.chat else []
        except (TemplateError, TypeError, ValueError) as error:
            return Reply(Refused("template", f"the chat template refuses it: {error}"))
        counted, limit = 0, request.max_new_tokens

        async def attempt() -> Turn | Refused:
            nonlocal counted, limit
            num_left = self.pool.longest - len(prompt)
            if num_left < 1:
                why = f"{len(prompt)} prompt tokens leave no room for an answer"
                return Refused("too_long", f"{why} (max_model_len is {self.pool.longest})")
            limit = int(min(request.max_new_tokens, num_left))
            num_tokens = len(prompt) + limit
            try:
                return await self._attempt(request._replace(max_new_tokens=limit), num_tokens)
            except AttemptFailed as error:
                self.progress.errors += 1
                if isinstance(error, ServerUnavailable):
                    self.pool.refuse_if_lost(num_tokens)
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
            outcome: Turn | Refused = await retrying(attempt)
        except AttemptFailed as error:
            return Reply(Failed(f"{counted} attempts failed, the last one with: {error}"))
        if isinstance(outcome, Refused):
            return Reply(outcome)
        cut = limit if limit < request.max_new_tokens else None
        if self.chat is None:
            return Reply(outcome, limit=cut)
        how = difference(self.chat, prompt, outcome)
        kept = ids_to_keep(self.chat, request, outcome.prompt_token_ids or prompt, rendered=prompt)
        return Reply(outcome._replace(prompt_token_ids=kept), how, cut)

    async def _attempt(self, request: AnswerRequest, num_tokens: int) -> Turn | Refused:
        """One attempt at one server; how it went decides what the pool sends there next."""
        async with self.pool.lease(num_tokens) as server:
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
            server.note_answer()
            return outcome

    def _failure(self, server: PooledServer, error: Exception, began: float) -> AttemptFailed:
        server.note_failure(began)
        chain = list(causes(error))
        cause = chain[-1]
        if any(isinstance(found, UNREACHABLE) for found in chain):
            return ServerUnavailable(f"{server.url}: it cannot be reached ({cause})")
        hung_up = any(isinstance(found, HUNG_UP) for found in chain)
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
        server.note_answer()
        return Refused(f"http_{status}", message[:1000])


def _retry_after_s(header: str) -> float:
    """Retry-After in seconds, from either of its forms; 0 where there is none."""
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0
