"""Arguments and options that several verbs share, and what answers those of earlier versions."""

from typing import Annotated, Any, Literal

import typer

from deepspec.errors import ConfigError

RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="a recipe (`python -m deepspec recipes`) or a run file ending in .yaml"
    ),
]
RunOrArtifact = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run (recipe or .yaml), or an artifact's folder or URL"),
]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override one field, e.g. --set train.lr=3e-4",
        default_factory=list,
        show_default=False,
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="artifact store: a folder or s3://bucket/prefix"),
]
Shards = Annotated[
    str | None,
    typer.Option(
        "--shards", metavar="LIST", help="only these of the missing shards, e.g. 17,18,40-52"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of the table")]
Purpose = Literal["cache", "rolling", "index"]


def moved(option: str, new: str) -> Any:
    """A hidden option of an earlier version, answered with what replaces it."""

    def refuse(value: str | None) -> None:
        if value is not None:
            now = new.format(value)
            raise ConfigError(f"{option} is now {now}", where="command line", fix=f"use {now}")

    return typer.Option(option, hidden=True, is_eager=True, callback=refuse)
