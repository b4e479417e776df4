"""One client per server: its connection, what it understands, and the key that opens it.

A request holds each parameter by the name that its server knows (trap A4).
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp
import openai
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types.chat import ChatCompletion

from deepspec.config.run import RunConfig
from deepspec.config.servers import ServersConfig
from deepspec.errors import ConfigError
from deepspec.messages import Message
from deepspec.process.machine import is_loopback
from deepspec.serving.protocol import KEY_REFUSED, SEEDS
from deepspec.target.conversation import AnswerRequest

log = logging.getLogger(__name__)

REQUEST_LOGGERS = ("httpx", "httpx2")  # a line per request, of which there are millions
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
KNOWN_OWNERS = {"vllm": "vllm", "sglang": "sglang"}
GIVES_IDS = ("vllm", "sglang")
# SGLang leaves the tools out of the prompt for it, `transformers serve` refuses it
NO_TOOL_CHOICE = ("sglang", "transformers")
AWAY = (502, 503, 504)  # of a gateway whose server is not there
CHECK_S = 10.0  # that a server may take to list its models
UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


class ServerClient:
    """A connection to one server of the target, which knows what its requests must hold."""

    def __init__(self, url: str, config: RunConfig, servers: ServersConfig) -> None:
        self.url = url
        self._key = os.environ.get(servers.api_key_env, "")  # neither printed nor logged
        self.model = servers.model_name or config.target.model
        self._config = config
        self._servers = servers
        self._last_reason = ""
        self.dialect, self.fields = self._understood_by(owner="")
        self.max_model_len: float | None = None
        """Tokens of prompt and answer that it takes; infinite where it does not report them, None
        until it was reached."""
        for name in REQUEST_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        # aiohttp: with hundreds of requests in flight it takes half of httpx's time
        self.http = AsyncOpenAI(
            base_url=url,
            api_key=self._key or "none",  # what servers without keys accept
            max_retries=0,
            timeout=servers.request_timeout_s,
            # a proxy does not reach the servers of this machine
            http_client=DefaultAioHttpClient(trust_env=not is_loopback(url)),
        )

    def _understood_by(self, owner: str) -> tuple[str, dict[str, Any]]:
        """The dialect of a server whose models belong to `owner`, and the fields of every request.

        What a request leaves out, a server takes from the model's own generation_config.json (top_k
        20 for Qwen3), so everything that the server understands is sent. Strict servers refuse
        fields beyond OpenAI's schema, so `openai` sends those only where they are not neutral.
        """
        sampling, servers = self._config.answers.sampling, self._servers
        extended = {name: getattr(sampling, name) for name in NEUTRAL}
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "chat_template_kwargs": {"enable_thinking": self._config.target.thinking},
        }
        if sampling.presence_penalty:
            fields["presence_penalty"] = sampling.presence_penalty
        known = KNOWN_OWNERS.get(owner, "openai")
        dialect = known if servers.dialect == "auto" else servers.dialect
        if servers.token_ids == "ask" or (servers.token_ids == "auto" and dialect in GIVES_IDS):
            fields["return_token_ids"] = True
        match dialect:
            case "transformers":  # takes the others here alone, and samples only with `do_sample`
                sampled = {**extended, "do_sample": sampling.temperature > 0}
                fields["generation_config"] = json.dumps(sampled)
            case "openai":
                fields |= {key: value for key, value in extended.items() if value != NEUTRAL[key]}
            case _:
                # the marks around thinking are special tokens
                fields |= {**extended, "top_k": sampling.top_k or -1, "skip_special_tokens": False}
        return dialect, fields

    def scrub(self, text: str) -> str:
        """The text without the key: a server's error may repeat what it was sent."""
        return text.replace(self._key, "***") if self._key else text

    def key_refused(self, status: int) -> ConfigError:
        """The error of a server that does not accept the key."""
        variable = self._servers.api_key_env
        return ConfigError(
            f"the server requires a key ({status}),"
            f" and {variable} is {'refused' if self._key else 'not set'}",
            where=self.url,
            fix=f"set {variable} to its key",
        )

    async def complete(self, request: AnswerRequest) -> ChatCompletion:
        """The server's reply to one request.

        Raises:
            openai.APIError: there is none, or it is an error.
            ValueError: its body is not JSON.
        """
        body = {
            **self.fields,
            "messages": sent_messages(request.messages),
            "seed": request.seed % SEEDS,
            "max_tokens": request.max_new_tokens,
        }
        if request.tools:
            body["tools"] = request.tools
            # What the target writes is text to store, calls of tools included; a vLLM without a
            # tool parser refuses any other choice.
            if self.dialect not in NO_TOOL_CHOICE:
                body["tool_choice"] = "none"
        # Not `chat.completions.create`, which looks every field of the body up in its schema: a
        # quarter of a request's time.
        completion = await self.http.post("/chat/completions", body=body, cast_to=ChatCompletion)
        if not isinstance(completion, ChatCompletion):  # the client passes other bodies on as text
            raise ValueError("the body is not JSON")
        return completion

    async def look(self, *, timeout_s: float = CHECK_S) -> bool:
        """Whether the server is up, of which its dialect and its room are learnt.

        One that answers without a list of models is up, and taken as it is: `transformers serve`
        answers 500 while it has no cache folder.

        Raises:
            ConfigError: the server has another model, or refuses the key.
        """
        try:
            listed = await self.http.with_options(timeout=timeout_s).models.list()
            models = {model.id: model for model in listed.data or ()}
        except (openai.APIError, ValueError, AttributeError) as error:
            return self._is_up_without_list(error)
        if models and self.model not in models:
            raise ConfigError(
                f"the server serves {', '.join(sorted(models))}, not {self.model}",
                where=f"resources.servers.endpoints {self.url}",
                fix="correct the endpoint, or set resources.servers.model_name",
            )
        self.max_model_len, self._last_reason = math.inf, ""
        if models:
            model = models[self.model]
            self.dialect, self.fields = self._understood_by(model.owned_by)
            reported = (model.model_extra or {}).get("max_model_len")
            if isinstance(reported, int) and reported > 0:
                self.max_model_len = reported
        return True

    def _is_up_without_list(self, error: Exception) -> bool:
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if status in KEY_REFUSED:
            raise self.key_refused(status) from None
        reason = self.scrub(str(error))
        if reason != self._last_reason:  # a server that rests is looked at every second
            log.warning("endpoint=%s does not list its models: %s", self.url, reason)
        self._last_reason = reason
        if any(isinstance(cause, UNREACHABLE) for cause in causes(error)):
            return False
        self.max_model_len = self.max_model_len or math.inf
        return status not in AWAY and not isinstance(error, openai.APITimeoutError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: `openai` raises lost connections as time-outs."""
    while error is not None:
        yield error
        error = error.__cause__


def sent_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as servers take them: a tool call's arguments are JSON text there."""
    entries = [message.entry() for message in messages]
    for entry in entries:
        if "tool_calls" in entry:
            entry["tool_calls"] = [_sent_call(call) for call in entry["tool_calls"]]
    return entries


def _sent_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id", ""),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }
