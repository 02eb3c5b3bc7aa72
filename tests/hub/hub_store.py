"""What a Hub keeps: repos with branches and pull requests, commits as trees of files, and large files beside them."""

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """A file of a commit; `sha256` where its content lies among the large files."""

    data: bytes | None
    size: int
    oid: str
    sha256: str | None = None

    @classmethod
    def small(cls, data: bytes) -> "File":
        return cls(data, len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(None, size, cls.small(pointer).oid, sha256)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    files: dict[str, File]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    status: str = "open"


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def add(self, ref: str, title: str, author: str, files: dict[str, File], parent: str | None) -> Commit:
        listing = {path: file.oid for path, file in files.items()}
        number = len(self.commits)
        oid = hashlib.sha1(json.dumps([self.id, parent, number, title, listing], sort_keys=True).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, author, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision, revision)
        return self.commits.get(oid)

    @property
    def main(self) -> Commit:
        return self.commits[self.refs["main"]]

    def titles(self, ref: str = "main") -> list[str]:
        """The history, newest first."""
        found, oid = [], self.refs.get(ref)
        while oid is not None:
            found.append(self.commits[oid].title)
            oid = self.commits[oid].parent
        return found


@dataclass
class Store:
    """All of it. Tokens: name -> (user, role); `expired` are known and not accepted."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    capacity: int | None = None  # bytes of large files that there is room for

    def create(self, repo_id: str, author: str, private: bool) -> Repo:
        self.repos[repo_id] = repo = Repo(repo_id, private)
        attributes = File.small(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.add("main", "initial commit", author, {".gitattributes": attributes}, None)
        return repo

    def content(self, file: File) -> bytes:
        return file.data if file.data is not None else self.large[file.sha256]

    def text(self, repo_id: str, path: str, revision: str = "main") -> str:
        return self.content(self.repos[repo_id].at(revision).files[path]).decode()

    def edit(self, repo_id: str, path: str, data: bytes, title: str = "Edit on the page") -> None:
        """Commit as somebody does on the Hub's own pages."""
        main = self.repos[repo_id].main
        self.repos[repo_id].add("main", title, "somebody", {**main.files, path: File.small(data)}, main.oid)
