"""The parameters of the flows, as types that a form shows and a server checks before it creates a
run.

No pattern has square brackets: Prefect's command line would take them for markup and leave them out
of its message. Keys in a URL are refused by the schema itself (`not`): a run keeps its parameters,
so any later check would be too late.
"""

from pathlib import Path
from typing import Annotated

from prefect.runtime import flow_run
from pydantic import Field

from deepspec.config.recipes import recipe_names
from deepspec.errors import ConfigError
from deepspec.process.launch import RunRequest
from deepspec.process.shard_ranges import parse_shards, shard_list
from flows.automations import PART
from flows.child_runs import is_part
from flows.shard_scheduler import SHARD_DIGITS

# `demo` alone means `dspark-demo`
NAMES = sorted({name.partition("-")[2] for name in recipe_names()}) + recipe_names()
# Named by the target, not by the draft: every draft of it is trained on what they make.
BEFORE_DRAFTS = ("prepare", "regenerate", "capture")
LONGEST_SPAN = 60  # characters
KEY_IN_URL = r"://(\w|\.|-|%|:|\+|~|!|=)*@"
# A key may hold a slash; then there is no @ before it.
KEY_IN_STORE = rf"{KEY_IN_URL}|^s3a?://\w*:"
KEY_IN_OVERRIDE = (
    rf"{KEY_IN_URL}|^ *store *=.*s3a?://\w*:"
    r"|^ *resources\.(servers\.)?(api_key *=|api_key_env *=.*-)"
)
SHARD_RANGE = r"\d{1,6}(-\d{1,6})?"

Recipe = Annotated[
    str,
    Field(
        pattern="^(" + "|".join(name.replace(".", r"\.") for name in NAMES) + r"|.+\.ya?ml)$",
        examples=[*NAMES, "my-run.yaml"],
    ),
]
Override = Annotated[
    str,
    Field(
        pattern=r"^ *\S+ *=",
        examples=["train.lr=3e-4"],
        json_schema_extra={"not": {"pattern": KEY_IN_OVERRIDE}},
    ),
]
Overrides = tuple[Override, ...]
StoreUrl = Annotated[
    str,
    Field(
        examples=["", "s3://bucket/prefix"], json_schema_extra={"not": {"pattern": KEY_IN_STORE}}
    ),
]
# The command line reads `shards=17` as a number.
Shards = (
    Annotated[
        str,
        Field(
            pattern=f"^({SHARD_RANGE}(, ?{SHARD_RANGE})*)?$",
            examples=["", "17,18,40-52"],
            title="shards",
        ),
    ]
    | Annotated[int, Field(ge=0, lt=1_000_000, title="one shard")]
)


def request_of(recipe: str, overrides: Overrides, store: str) -> RunRequest:
    """A flow's parameters as a request; an empty store takes the recipe's."""
    return RunRequest(recipe, overrides, store or None)


def run_name() -> str:
    """The name of the flow run in which this is called."""
    given = flow_run.parameters
    name = title(str(flow_run.flow_name), given["recipe"], str(given.get("shards", "")))
    return name + (PART if is_part() else "")


def title(flow: str, recipe: str, shards: str) -> str:
    """What a run does, for lists of runs: `capture qwen3-4b 0017-0042`, `train
    dspark-qwen3-8b`, `regenerate my-run.yaml`.
    """
    name = Path(recipe).name
    if flow in BEFORE_DRAFTS and name in recipe_names():
        name = name.partition("-")[2]
    return f"{flow} {name} {_shard_span(shards)}".rstrip()


def _shard_span(text: str) -> str:
    """The shards in a form that `--shards` accepts, too, but for the dots where they are too many
    for a name.
    """
    try:
        span = shard_list(parse_shards(text), digits=SHARD_DIGITS)
    except ConfigError:  # reported by the run itself
        return text
    return span if len(span) <= LONGEST_SPAN else span[:LONGEST_SPAN].rpartition(",")[0] + ",..."
