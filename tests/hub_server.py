"""A stand-in for the Hugging Face Hub on this machine: the part of its protocol that runs need."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

_API = "/api/models/"


class Hub:
    """Repositories in memory: {name: {revision: {path: bytes}}}; `log` has every request."""

    def __init__(self):
        self.repositories, self.log, self.private, self.fails = {}, [], set(), 0
        self.token = "hf_secret"

    def revision(self, name, wanted):
        """(commit, files) of a branch or a commit; None where there is none."""
        for branch, files in self.repositories.get(name, {}).items():
            commit = commit_of(files)
            if wanted in (branch, commit):
                return commit, files
        return None


def commit_of(files):
    parts = [f"{k}:{hashlib.sha1(v).hexdigest()}" for k, v in sorted(files.items())]
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code="RepoNotFound", status=404):
        self.answer(status, {"error": "not found"}, X_Error_Code=code, X_Error_Message="not found")

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, _ = self.path.partition("?")
        path = urllib.parse.unquote(path)
        self.hub.log.append((self.command, path))
        if self.hub.fails:
            self.hub.fails -= 1
            return self.answer(503, {"error": "busy"})
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if path == "/api/repos/create":
            return self.create(json.loads(body), allowed)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/api/") and not path.startswith(_API):
            return self.missing()
        if path.startswith(_API):
            owner, name, *rest = path.removeprefix(_API).split("/")
            return self.api(f"{owner}/{name}", rest, body, allowed)
        owner, name, _, revision, *file = path.strip("/").split("/")
        return self.file(f"{owner}/{name}", revision, "/".join(file), allowed)

    do_GET = do_HEAD = do_POST = handle_any  # noqa: N815 - as http.server calls them

    def create(self, wanted, allowed):
        if not allowed:
            return self.answer(401, {"error": "Invalid credentials"})
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": self.url(name)})
        self.hub.repositories[name] = {"main": {}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer(200, {"url": self.url(name), "name": name, "id": "1"})

    def url(self, name):
        return f"http://{self.headers['Host']}/{name}"

    def seen(self, name, allowed):
        return name in self.hub.repositories and (allowed or name not in self.hub.private)

    def api(self, name, rest, body, allowed):
        if not self.seen(name, allowed):
            return self.missing()
        if rest[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest[:1] == ["commit"]:
            return self.commit(name, rest[1], body, allowed)
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        found = self.hub.revision(name, revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        if rest[:1] == ["tree"]:
            return self.answer(
                200,
                [
                    {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for k, v in sorted(files.items())
                ],
            )
        siblings = [{"rfilename": k, "size": len(v)} for k, v in sorted(files.items())]
        return self.answer(
            200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        )

    def commit(self, name, branch, body, allowed):
        if not allowed:
            return self.answer(401, {"error": "Invalid credentials"})
        files = dict(self.hub.repositories[name].get(branch, {}))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.hub.repositories[name][branch] = files
        commit = commit_of(files)
        url = f"{self.url(name)}/commit/{commit}"
        return self.answer(
            200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        )

    def file(self, name, revision, path, allowed):
        if not self.seen(name, allowed):
            return self.missing()
        found = self.hub.revision(name, revision)
        if found is None or path not in found[1]:
            return self.missing("EntryNotFound")
        commit, files = found
        tag = hashlib.sha1(files[path]).hexdigest()
        return self.answer(200, files[path], ETag=f'"{tag}"', X_Repo_Commit=commit)


@contextlib.contextmanager
def serving():
    """Yields a `Hub` and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
