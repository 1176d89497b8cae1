"""A Hub on the loopback interface: the part of the Hub's HTTP interface that pushing and loading a model needs.

Repositories live in memory. Faults can be asked for: the next requests that match fail as a broken server would.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

TOKEN = "hf_right_token"
USER = "someone"


@dataclass
class Repository:
    """One model: its branches, each a mapping from path to content, and whether it is private."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def sha(self, revision: str) -> str:
        content = json.dumps({path: _sha256(data) for path, data in sorted(self.branches[revision].items())})
        return hashlib.sha1(content.encode()).hexdigest()


@dataclass
class Fault:
    """How many of the next requests whose path holds `part` fail, and how: with a status such as `"500"`, or `"reset"`."""

    part: str
    kind: str
    left: int
    seen: int = 0


class LocalHub:
    """The server, in a thread of this process. Use it as a context manager; `endpoint` is its address."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        config = uvicorn.Config(self._make_app(), host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def clear(self) -> None:
        """Forget all that was put here, asked for, and requested."""
        for kept in (self.repositories, self.blobs, self.faults, self.requests):
            kept.clear()

    def fail(self, part: str, kind: str = "500", times: int = 1) -> Fault:
        self.faults.append(Fault(part, kind, times))
        return self.faults[-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[repo_id].branches[revision]

    def _make_app(self) -> FastAPI:
        app = FastAPI()
        hub = self

        @app.middleware("http")
        async def faults_and_token(request: Request, call_next: Any) -> Response:
            path = request.url.path
            hub.requests.append(f"{request.method} {path}")
            for fault in hub.faults:
                if fault.part in path and fault.left > 0:
                    fault.left, fault.seen = fault.left - 1, fault.seen + 1
                    if fault.kind == "reset":
                        return StreamingResponse(_break_off(), headers={"Content-Length": "100"})
                    return JSONResponse({"error": "broken"}, status_code=int(fault.kind))
            given = request.headers.get("authorization", "")
            needs_token = path.startswith("/api/repos") or path.startswith("/api/whoami") or "commit" in path
            if needs_token and given != f"Bearer {TOKEN}":
                return JSONResponse({"error": "Invalid credentials in Authorization header"}, status_code=401)
            return await call_next(request)

        @app.get("/api/whoami-v2")
        def whoami() -> dict[str, Any]:
            return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

        @app.post("/api/repos/create")
        async def create(request: Request) -> Response:
            body = await request.json()
            owner = body.get("organization") or USER
            if owner != USER:
                message = f"You don't have the rights to create a model under the namespace {owner!r}"
                return JSONResponse({"error": message}, status_code=403, headers={"X-Error-Message": message})
            repo_id = f"{owner}/{body['name']}"
            url = {"url": f"{hub.endpoint}/{repo_id}"}
            if repo_id in hub.repositories:
                return JSONResponse(url, status_code=409)
            private = bool(body.get("private")) or body.get("visibility") == "private"
            hub.repositories[repo_id] = Repository(private=private)
            return JSONResponse(url)

        @app.post("/api/validate-yaml")
        def validate() -> dict[str, Any]:
            return {"errors": [], "warnings": []}

        @app.post("/api/models/{owner}/{name}/preupload/{revision}")
        async def preupload(owner: str, name: str, revision: str, request: Request) -> dict[str, Any]:
            body = await request.json()
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs"
                        if file["path"].endswith((".safetensors", ".bin", ".pt", ".png"))
                        else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in body["files"]
                ]
            }

        @app.post("/{owner}/{name}.git/info/lfs/objects/batch")
        async def batch(owner: str, name: str, request: Request) -> dict[str, Any]:
            body = await request.json()
            objects = []
            for entry in body["objects"]:
                answer = {"oid": entry["oid"], "size": entry["size"]}
                if entry["oid"] not in hub.blobs:
                    answer["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{entry['oid']}"}}
                objects.append(answer)
            return {"transfer": "basic", "objects": objects}

        @app.put("/lfs/{oid}")
        async def upload(oid: str, request: Request) -> Response:
            content = await request.body()
            if _sha256(content) != oid:
                return Response(status_code=400)
            hub.blobs[oid] = content
            return Response(status_code=200)

        @app.post("/api/models/{owner}/{name}/branch/{branch}")
        def make_branch(owner: str, name: str, branch: str) -> Response:
            branches = hub.repositories[f"{owner}/{name}"].branches
            if branch in branches:
                return Response(status_code=409)
            branches[branch] = dict(branches["main"])
            return JSONResponse({})

        @app.post("/api/models/{owner}/{name}/commit/{revision}")
        async def commit(owner: str, name: str, revision: str, request: Request) -> Response:
            repository = hub.repositories[f"{owner}/{name}"]
            if revision not in repository.branches:
                return _missing("RevisionNotFound")
            files = dict(repository.branches[revision])
            for line in (await request.body()).splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    repository.commits.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            repository.branches[revision] = files
            sha = repository.sha(revision)
            return JSONResponse(
                {"commitOid": sha, "commitUrl": f"{hub.endpoint}/{owner}/{name}/commit/{sha}"}
            )

        @app.get("/api/models/{owner}/{name}")
        @app.get("/api/models/{owner}/{name}/revision/{revision}")
        def info(owner: str, name: str, request: Request, revision: str = "main") -> Response:
            found = hub._find(owner, name, revision, request)
            if isinstance(found, Response):
                return found
            siblings = [{"rfilename": path} for path in sorted(found.branches[revision])]
            return JSONResponse(
                {
                    "id": f"{owner}/{name}",
                    "sha": found.sha(revision),
                    "private": found.private,
                    "siblings": siblings,
                    "tags": [],
                }
            )

        @app.get("/api/models/{owner}/{name}/tree/{revision}")
        @app.get("/api/models/{owner}/{name}/tree/{revision}/{folder:path}")
        def tree(owner: str, name: str, revision: str, request: Request, folder: str = "") -> Response:
            found = hub._find(owner, name, revision, request)
            if isinstance(found, Response):
                return found
            files = {p: d for p, d in found.branches[revision].items() if p.startswith(folder)}
            if folder and not files:
                return _missing("EntryNotFound")
            return JSONResponse(
                [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
            )

        @app.api_route("/{owner}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        def resolve(owner: str, name: str, revision: str, path: str, request: Request) -> Response:
            repository = hub.repositories.get(f"{owner}/{name}")
            branch = next(
                (
                    b
                    for b in (repository.branches if repository else {})
                    if revision in (b, repository.sha(b))
                ),
                None,
            )
            found = hub._find(owner, name, branch or revision, request)
            if isinstance(found, Response):
                return found
            content = found.branches[branch or revision].get(path)
            if content is None:
                return _missing("EntryNotFound")
            headers = {"X-Repo-Commit": found.sha(branch or revision), "ETag": f'"{_sha256(content)}"'}
            return Response(content, headers=headers, media_type="application/octet-stream")

        return app

    def _find(self, owner: str, name: str, revision: str, request: Request) -> Repository | Response:
        repository = self.repositories.get(f"{owner}/{name}")
        allowed = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            return _missing("RepoNotFound")
        return repository if revision in repository.branches else _missing("RevisionNotFound")


async def _break_off() -> AsyncIterator[bytes]:
    """The beginning of an answer, after which the server closes the connection."""
    yield b"{"
    raise ConnectionResetError


def _missing(code: str) -> Response:
    return JSONResponse({"error": code}, status_code=404, headers={"X-Error-Code": code})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
