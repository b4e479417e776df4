"""As much of the Hugging Face hub as reading a data set takes: a folder of data sets, alike at
every commit, on loopback.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """`/api/datasets/<owner>/<name>[/revision/R | /tree/R/folder | /paths-info/R]` and
    `/datasets/<owner>/<name>/resolve/R/file`.
    """

    folder: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.asked.append(f"{self.command} {unquote(url.path)}")
        parts = unquote(url.path).strip("/").removeprefix("api/").split("/")
        place, rest = self.folder / "/".join(parts[1:3]), parts[3:]
        if parts[0] != "datasets" or not place.is_dir():
            self.answer(404, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["resolve"]:
            self.send_file(place / "/".join(rest[2:]), commit_of(rest))
        elif rest[:1] == ["tree"]:
            recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            found = sorted((place / "/".join(rest[2:])).glob("**/*" if recursive else "*"))
            self.answer_json([self.entry(place, path) for path in found])
        elif rest[:1] == ["paths-info"]:
            fields = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = (
                json.loads(fields)["paths"] if fields.startswith("{") else parse_qs(fields)["paths"]
            )
            self.answer_json(
                [self.entry(place, place / path) for path in paths if (place / path).exists()]
            )
        else:
            files = [
                {"rfilename": path.relative_to(place).as_posix()}
                for path in place.rglob("*")
                if path.is_file()
            ]
            self.answer_json(
                {
                    "id": "/".join(parts[1:3]),
                    "sha": commit_of(rest),
                    "siblings": files,
                    "tags": [],
                    "private": False,
                }
            )

    do_HEAD = do_POST = do_GET  # noqa: N815

    def entry(self, place: Path, path: Path) -> dict[str, object]:
        kind = (
            {"type": "file", "size": path.stat().st_size}
            if path.is_file()
            else {"type": "directory"}
        )
        return {**kind, "path": path.relative_to(place).as_posix(), "oid": "b" * 40}

    def send_file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        data, headers = path.read_bytes(), {"ETag": '"x"', "X_Repo_Commit": commit}
        first, _, last = (
            (self.headers.get("Range") or "bytes=").removeprefix("bytes=").partition("-")
        )
        if first:
            end = int(last) + 1 if last else len(data)
            self.answer(
                206,
                data[int(first) : end],
                Content_Range=f"bytes {first}-{end - 1}/{len(data)}",
                **headers,
            )
        else:
            self.answer(200, data, **headers)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit_of(rest: list[str]) -> str:
    """The one that is asked for by its whole name behind `revision` or `resolve`, else the
    newest.
    """
    return rest[1] if len(rest) > 1 and len(rest[1]) == len(COMMIT) else COMMIT


@contextmanager
def hub_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The endpoint of a hub with the data sets `<owner>/<name>` under `folder`, and what it is
    asked.
    """
    asked: list[str] = []
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("OneHub", (Hub,), {"folder": folder, "asked": asked})
    )
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
