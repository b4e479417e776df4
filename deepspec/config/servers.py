"""The section `resources.servers`: how servers of the target are started, reached and given up."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from deepspec.config.section import Section


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an endpoint is a URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "keys do not belong into an endpoint's URL: name the variable that holds one in "
            "resources.servers.api_key_env"
        )
    return url.rstrip("/")


def _variable_name(name: str) -> str:
    if not name.isidentifier():  # the value is not repeated: it may be the key
        raise ValueError(
            "this is the name of an environment variable, such as OPENAI_API_KEY; the key itself "
            "belongs into that variable"
        )
    return name


Endpoint = Annotated[str, AfterValidator(_endpoint)]


class ServersConfig(Section):
    """Servers of the target, for `answers.engine: openai` and `evaluate.engine`."""

    endpoints: tuple[Endpoint, ...] = ()
    """OpenAI-compatible servers of the target (vLLM, SGLang, TGI, transformers serve, ...),
    each with its `/v1`.
    """
    plain_endpoint: Endpoint | None = None
    """Server of the target alone, for `evaluate.engine: openai`."""
    draft_endpoint: Endpoint | None = None
    """Server of the same target with the draft, for `evaluate.engine: openai`."""
    dialect: Literal["auto", "openai", "vllm", "sglang", "transformers"] = "auto"
    """What those servers understand beyond OpenAI's schema; `auto` recognizes vLLM and SGLang
    by what they report about themselves.
    """
    start: Literal["none", "vllm", "sglang", "transformers"] = "none"
    """Server of the target that the answers stage starts itself on loopback, one per lane,
    instead of using `endpoints`.
    """
    start_command: tuple[str, ...] = ()
    """Its command as a list of arguments, where the usual one does not fit; {model}, {name},
    {host}, {port} and {dtype} are filled in.
    """
    start_deadline_s: PositiveFloat = 900.0
    """Seconds until a started server must answer: loading a large target takes minutes."""
    model_name: str | None = None
    """Name under which the servers know the target; null is `target.model`."""
    api_key_env: Annotated[str, AfterValidator(_variable_name)] = "OPENAI_API_KEY"
    """Environment variable that holds the servers' key; the key itself is written nowhere."""
    api_key_secret: str | None = None
    """Prefect Secret block that holds the key; flows put it into that variable of the children
    that send requests, and nowhere else.
    """
    requests: PositiveInt = 32
    """Requests in flight per server at most; fewer while it is overloaded."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds that one answer may take."""
    request_tries: PositiveInt = 6
    """Attempts per answer and run that reached a server, whichever it was; those at a server
    that is away or overloaded are not counted.
    """
    row_runs: PositiveInt = 3
    """Runs in which all attempts at a row may fail before it goes to the rejects."""
    max_refused: float = Field(default=0.2, ge=0, le=1)
    """Share of a shard's rows that servers may refuse or fail for good; above it the shard
    fails and is not committed.
    """
    lost_s: PositiveFloat = 120.0
    """Seconds without an answer, all servers failing, after which a shard fails, to be tried
    again later.
    """
    progress_s: PositiveFloat = 5.0
    """Seconds between two reports of the answers' progress."""
    token_ids: Literal["auto", "ask", "none"] = "auto"
    """Whether servers are asked for the ids of the tokens that they read and drew
    (`return_token_ids`): `auto` asks vLLM and SGLang; others may refuse the field.
    """
    max_differing_prompts: float = Field(default=0.05, ge=0, le=1)
    """Share of a shard's rows whose prompts a server may read as other tokens than the target's
    tokenizer and chat template give here; above it the shard fails. 1 accepts any server.
    """
