"""A Hub on this machine: as much of huggingface.co as its own client needs to create, upload, commit and download.

Large files lie on a server of another origin, as they do in truth: a token that arrives there has leaked.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from hub_http import Answer, Request, Server
from hub_store import Commit, File, PullRequest, Repo, Store

PAGE = 50  # files in a page of a tree
PARTS_FROM = 16_000_000  # bytes from which a file is uploaded in parts
PART = 8_000_000
LICENCES = ["apache-2.0", "mit", "other"]  # of many

Respond = Callable[..., Answer]


class Hub:
    def __init__(self) -> None:
        self.store = Store(tokens={"hf_alice_writes": ("alice", "write"), "hf_alice_reads": ("alice", "read")})
        self.store.tokens["hf_bob_writes"] = ("bob", "write")
        self.parts: dict[tuple[str, int], bytes] = {}
        self.chunks: Path | None = None  # of Xet, where files are uploaded that way
        self.xet_hashes: dict[str, str] = {}  # by SHA-256; the true Hub learns them from what is uploaded
        # Another host than the Hub's, as some releases of the client tell by the name alone.
        self.storage = Server(self.keep, "localhost")
        self.answering: Respond | None = None  # asked before the Hub is, by a test that has something to do meanwhile
        self.server = Server(lambda request: (self.answering or self.answer)(request))
        self.url = self.server.url
        repo = r"/api/models/(?P<id>[^/]+/[^/]+)"
        self.routes: list[tuple[str, str, Respond]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/validate-yaml", self.validate),
            ("POST", r"/api/repos/create", self.create),
            ("GET", repo, self.info),
            ("GET", rf"{repo}/revision/(?P<rev>.+)", self.info),
            ("GET", rf"{repo}/refs", self.references),
            ("GET", rf"{repo}/tree/(?P<rev>refs/pr/\d+|[^/]+)", self.tree),
            ("POST", rf"{repo}/paths-info/(?P<rev>.+)", self.paths_info),
            ("POST", rf"{repo}/branch/(?P<branch>.+)", self.branch),
            ("POST", rf"{repo}/preupload/(?P<rev>.+)", self.preupload),
            ("POST", rf"{repo}/commit/(?P<rev>.+)", self.commit),
            ("GET", rf"{repo}/discussions", self.discussions),
            ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/verify", self.verify),
            ("GET", rf"{repo}/xet-(?P<kind>read|write)-token/(?P<rev>.+)", self.xet_token),
            ("POST", r"/complete/(?P<sha>\w+)", self.complete),
            ("GET", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", self.resolve),
        ]

    def stop(self) -> None:
        self.server.stop()
        self.storage.stop()

    # ---- who may do what

    def answer(self, request: Request) -> Answer:
        if request.token is not None and request.token not in self.store.tokens:
            expired = request.token in self.store.expired
            message = (
                'User Access Token "laptop" is expired' if expired else "Invalid credentials in Authorization header"
            )
            return Answer.error(401, message)
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, respond in self.routes:
            if wanted == method and (match := re.fullmatch(pattern, request.path)):
                groups = match.groupdict()
                if "id" not in groups:
                    return respond(request, **groups)
                repo = self.store.repos.get(groups.pop("id"))
                if repo is None or (repo.private and self.user(request) != repo.id.split("/")[0]):
                    return Answer.error(401 if request.token is None else 404, "Repository not found", "RepoNotFound")
                return respond(request, repo, **groups)
        return Answer.error(404, f"no such route: {request.method} {request.path}")

    def user(self, request: Request) -> str | None:
        return self.store.tokens.get(request.token, (None, None))[0]

    def may_write(self, request: Request, namespace: str) -> Answer | None:
        """An answer that says no; None if it is allowed."""
        user, role = self.store.tokens.get(request.token, (None, None))
        if user is None:
            return Answer.error(401, "Invalid username or password.")
        if user != namespace:
            return Answer.error(403, f"You don't have the rights to write in the namespace {namespace}")
        if role != "write":
            return Answer.error(403, "This token has read permission only")
        return None

    def whoami(self, request: Request) -> Answer:
        if request.token is None:
            return Answer.error(401, "Invalid username or password.")
        user, role = self.store.tokens[request.token]
        token = {"displayName": "laptop", "role": role}
        return Answer.json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}})

    # ---- repos

    def create(self, request: Request) -> Answer:
        wanted = request.json
        owner = wanted.get("organization") or self.user(request)
        if refused := self.may_write(request, owner):
            return refused
        repo_id = f"{owner}/{wanted['name']}"
        if repo_id in self.store.repos:
            return Answer.json({"error": "You already created this model repo", "url": f"{self.url}/{repo_id}"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.store.create(repo_id, owner, private)
        return Answer.json({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def info(self, request: Request, repo: Repo, rev: str = "main") -> Answer:
        commit = repo.at(rev)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        facts = {"id": repo.id, "modelId": repo.id, "sha": commit.oid, "private": repo.private, "siblings": siblings}
        return Answer.json(facts | {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def references(self, request: Request, repo: Repo) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repo.refs.items()
            if not name.startswith("refs/")
        ]
        return Answer.json({"branches": branches, "tags": [], "converts": []})

    def tree(self, request: Request, repo: Repo, rev: str) -> Answer:
        commit = repo.at(rev)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        start = int(request.query.get("cursor", 0))
        entries = [entry(path, file) for path, file in sorted(commit.files.items())]
        headers = {}
        if start + PAGE < len(entries):
            following = f"{self.url}{request.path}?recursive=true&cursor={start + PAGE}".replace(
                "refs/pr/", "refs%2Fpr%2F"
            )
            headers["Link"] = f'<{following}>; rel="next"'
        return Answer.json(entries[start : start + PAGE], **headers)

    def paths_info(self, request: Request, repo: Repo, rev: str) -> Answer:
        commit = repo.at(rev)
        paths = request.json["paths"] if request.headers["content-type"].endswith("json") else []
        return Answer.json([entry(path, commit.files[path]) for path in paths if path in commit.files])

    def branch(self, request: Request, repo: Repo, branch: str) -> Answer:
        if refused := self.may_write(request, repo.id.split("/")[0]):
            return refused
        if branch in repo.refs:
            return Answer.error(409, "Reference already exists")
        repo.refs[branch] = repo.at(request.json.get("startingPoint", "main")).oid
        return Answer.json({})

    def resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Answer:
        commit = repo.at(rev)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        file = commit.files.get(path)
        found = {"X-Repo-Commit": commit.oid}
        if file is None:
            missing = Answer.error(404, "Entry not found", "EntryNotFound")
            return Answer(404, missing.body, missing.headers | found)
        if file.sha256 is None:
            return Answer(200, file.data, found | {"ETag": f'"{file.oid}"'})
        found |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        if file.sha256 in self.xet_hashes:
            route = f"{self.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            found |= {"X-Xet-Hash": self.xet_hashes[file.sha256], "X-Xet-Refresh-Route": route}
        return Answer(302, b"", found | {"Location": f"{self.storage.url}/{file.sha256}"})

    # ---- uploads and commits

    def validate(self, request: Request) -> Answer:
        block = re.match(r"---\n(.*?)\n---", request.json["content"], re.DOTALL)
        metadata = yaml.safe_load(block[1]) if block else {}
        if not isinstance(metadata, dict) or metadata.get("license", "mit") not in LICENCES:
            return Answer.json({"errors": [{"message": f'"license" must be one of {LICENCES}'}], "warnings": []}, 400)
        return Answer.json({"errors": [], "warnings": []})

    def preupload(self, request: Request, repo: Repo, rev: str) -> Answer:
        if "create_pr" not in request.query and (refused := self.may_write(request, repo.id.split("/")[0])):
            return refused
        commit, files = repo.at(rev), []
        for file in request.json["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt")) else "regular"
            known = commit.files.get(file["path"])
            oid = None if known is None else (known.sha256 or known.oid)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.json({"files": files})

    def batch(self, request: Request, repo: Repo) -> Answer:
        objects = []
        kept = sum(map(len, self.store.large.values()))
        for wanted in request.json["objects"]:
            sha, size = wanted["oid"], wanted["size"]
            said = {"oid": sha, "size": size}
            if sha in self.store.large:
                pass
            elif self.store.capacity is not None and kept + size > self.store.capacity:
                said["error"] = {"code": 413, "message": "Storage quota exceeded for alice"}
            else:
                kept += size
                verify = {"href": f"{self.url}/{repo.id}.git/info/lfs/verify"}
                upload: dict = {"href": f"{self.storage.url}/{sha}"}
                if size >= PARTS_FROM:
                    count = -(-size // PART)
                    parts = {f"{n:05d}": f"{self.storage.url}/{sha}/{n}" for n in range(1, count + 1)}
                    upload = {"href": f"{self.url}/complete/{sha}", "header": {"chunk_size": str(PART), **parts}}
                said["actions"] = {"upload": upload, "verify": verify}
            objects.append(said)
        return Answer.json({"transfer": "basic", "objects": objects})

    def keep(self, request: Request) -> Answer:
        """What the storage does: take a file or a part of one, and give it back, whole or a range."""
        sha, *part = request.path.strip("/").split("/")
        if request.method == "PUT":
            if part:
                self.parts[sha, int(part[0])] = request.body
                return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
            return self.put(sha, request.body)
        if sha not in self.store.large:
            return Answer.error(404, "no such object")
        data = self.store.large[sha]
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            return Answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        return Answer(200, data, {"ETag": f'"{sha}"', "Accept-Ranges": "bytes"})

    def put(self, sha: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != sha:
            return Answer.error(400, "The content does not have this hash")
        self.store.large[sha] = data
        return Answer()

    def xet_token(self, request: Request, repo: Repo, kind: str, rev: str) -> Answer:
        """Where Xet's client is to keep chunks: a folder on this machine, which it takes in the place of a server."""
        if kind == "write" and (refused := self.may_write(request, repo.id.split("/")[0])):
            return refused
        cas, expiry = f"local://{self.chunks}", int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": cas, "X_Xet_Access_Token": "xet_token", "X_Xet_Token_Expiration": str(expiry)}
        return Answer.json({"casUrl": cas, "accessToken": "xet_token", "exp": expiry}, **headers)

    def complete(self, request: Request, sha: str) -> Answer:
        numbers = [part["partNumber"] for part in request.json["parts"]]
        return self.put(sha, b"".join(self.parts.pop((sha, n)) for n in numbers))

    def verify(self, request: Request, repo: Repo) -> Answer:
        wanted = request.json
        there = len(self.store.large.get(wanted["oid"], b"")) == wanted["size"]
        return Answer.json({}) if there else Answer.error(404, "not uploaded")

    def commit(self, request: Request, repo: Repo, rev: str) -> Answer:
        pull_request = request.query.get("create_pr") == "1"
        owner, user = repo.id.split("/")[0], self.user(request)
        if user is None:
            return Answer.error(401, "Invalid username or password.")
        if not pull_request and (refused := self.may_write(request, owner)):
            return refused
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repo.at(rev)
        if header.get("parentCommit") not in (None, parent.oid):
            return Answer.error(412, "A commit has happened since. Please refresh and try again.")
        try:
            files = self.applied(parent, lines)
        except KeyError as error:
            return Answer.error(404, f"A file with this name doesn't exist: {error}", "EntryNotFound")
        if not pull_request:
            made = repo.add(rev, header["summary"], user, files, parent.oid)
            return Answer.json({"success": True, "commitOid": made.oid, "commitUrl": self.page(repo, made)})
        opened = PullRequest(len(repo.pull_requests) + 1, header["summary"], user)
        repo.pull_requests.append(opened)
        made = repo.add(f"refs/pr/{opened.num}", header["summary"], user, files, parent.oid)
        url = f"{self.url}/{repo.id}/discussions/{opened.num}"
        facts = {"success": True, "commitOid": made.oid, "commitUrl": self.page(repo, made), "pullRequestUrl": url}
        return Answer.json(facts)

    def page(self, repo: Repo, commit: Commit) -> str:
        return f"{self.url}/{repo.id}/commit/{commit.oid}"

    def applied(self, parent: Commit, lines: list[dict]) -> dict[str, File]:
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File.small(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if self.chunks is None and value["oid"] not in self.store.large:
                    raise KeyError(value["path"])
                files[value["path"]] = File.large(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def discussions(self, request: Request, repo: Repo) -> Answer:
        found = [
            {
                "num": pr.num,
                "title": pr.title,
                "author": {"name": pr.author},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": pr.status,
                "repo": {"name": repo.id, "type": "model"},
                "isPullRequest": True,
            }
            for pr in repo.pull_requests
            if request.query.get("author", pr.author) == pr.author
            and request.query.get("status", pr.status) == pr.status
        ]
        return Answer.json({"discussions": found, "count": len(found), "start": 0})


def entry(path: str, file: File) -> dict:
    facts: dict = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.sha256 is not None:
        facts["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return facts
