"""The repo on the Hub: what is there, and how it is changed. All requests are made by huggingface_hub's client."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile  # which older releases export nowhere else
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from fat5convert.errors import ConvertError
from fat5convert.publish.hub_errors import NO_LOGIN

_MAIN = "main"


@dataclass(frozen=True)
class State:
    """A revision of the repo."""

    commit: str | None = None  # None where there is no repo yet
    private: bool = True
    branch_exists: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)

    def has(self, addition: CommitOperationAdd) -> bool:
        """Whether the file is there with this content: large ones are known by SHA-256, others by git's hash."""
        file = self.files.get(addition.path_in_repo)
        if file is None or file.size != addition.upload_info.size:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == addition.upload_info.sha256.hex()
        with addition.as_file() as data:
            return file.blob_id == git_hash(data.read())


class Remote:
    """A model repo at a revision.

    Args:
        repo_id: `owner/name`.
        revision: branch, or the ref of a pull request.
        from_env: take the token from HF_TOKEN and nowhere else.
    """

    def __init__(self, repo_id: str, revision: str | None = None, *, from_env: bool = False) -> None:
        if from_env and not os.environ.get("HF_TOKEN", "").strip():
            raise ConvertError("--token-from-env: HF_TOKEN is not set or empty")
        self.repo_id, self.revision = repo_id, revision or _MAIN
        self.token = os.environ["HF_TOKEN"].strip() if from_env else get_token()
        if self.token and not re.fullmatch(r"[!-~]+", self.token):  # the client would quote it when it cannot send it
            raise ConvertError("the token has a blank or a sign that tokens do not have; copy it again, and all of it")
        self.api = HfApi(token=self.token or False, library_name="fat5")

    def log_in(self) -> str:
        """Have the Hub say whose token it is; give the name.

        Raises:
            ConvertError: there is none, or it can only read.
        """
        if self.token is None:
            raise ConvertError(NO_LOGIN)
        me = self.api.whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConvertError(
                "this token can only read. Make one with write access at https://huggingface.co/settings/tokens, and "
                "run `hf auth login` again"
            )
        return str(me["name"])

    def read(self, revision: str | None = None) -> State:
        """What is there; where the branch does not exist yet, what it would begin with."""
        try:
            main = self.api.repo_info(self.repo_id)
        except RepositoryNotFoundError:
            return State()
        wanted, exists = revision or self.revision, True
        try:
            commit = main.sha if wanted == _MAIN else self.api.repo_info(self.repo_id, revision=wanted).sha
        except RevisionNotFoundError:
            if wanted.startswith("refs/"):
                raise ConvertError(f"{self.repo_id} has no {wanted}; --create-pr opens a new pull request") from None
            commit, exists = main.sha, False
        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return State(commit, bool(main.private), exists, files)

    def knows(self, repo_id: str) -> bool:
        """Whether the Hub has a repo of this name, as far as this token sees."""
        try:
            return bool(self.api.repo_exists(repo_id))
        except HFValidationError:
            return False

    def make(self, state: State, *, private: bool) -> State:
        """Create the repo and the branch, those that do not exist."""
        if state.commit is None:
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            state = self.read()
        if not state.branch_exists:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            state = self.read()
        return state

    def text(self, name: str, state: State) -> str | None:
        """Contents of a small file, None where there is none.

        A file that is there and does not come is an error: what is taken for missing would be written anew.

        Raises:
            ConvertError: it is not text.
        """
        if name not in state.files:
            return None
        path = self.api.hf_hub_download(self.repo_id, name, revision=state.commit)
        return read_text(Path(path), f"{self.repo_id}/{name}")

    def validate(self, card: ModelCard) -> None:
        """Have the Hub say whether it takes a card.

        Raises:
            ConvertError: it does not, because of what stands in the metadata.
        """
        # As in the client's own ModelCard.validate, which in its older releases asks huggingface.co in any case.
        question = {"content": str(card), "repoType": "model"}
        headers = build_hf_headers(token=self.token or False, library_name="fat5")
        answer = get_session().post(f"{self.api.endpoint}/api/validate-yaml", json=question, headers=headers)
        if answer.status_code == 400:
            said = "; ".join(str(error.get("message")) for error in answer.json().get("errors", []))
            raise ConvertError(
                f"{self.repo_id}: the Hub does not take the card ({said}). Give another --license if it is that; else "
                "mend the metadata on top of the README.md, here or on the Hub"
            )
        hf_raise_for_status(answer)

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str | None,
        *,
        create_pr: bool = False,
    ) -> tuple[str, str | None]:
        """Upload what is not there and commit, unless somebody else has committed after `parent`.

        Returns:
            Revision to find it under, and the address of the pull request if that was asked for.
        """
        info = self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            revision=None if create_pr else self.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        return (info.pr_revision or self.revision) if create_pr else info.oid, info.pr_url

    def open_pull_requests(self, title: str, author: str) -> list[tuple[str, str]]:
        """Revisions and addresses of the open pull requests of this title and author."""
        found = self.api.get_repo_discussions(
            self.repo_id, author=author, discussion_type="pull_request", discussion_status="open"
        )
        return [(f"refs/pr/{pr.num}", pr.url) for pr in found if pr.title == title]

    @property
    def url(self) -> str:
        """Address of the page for people."""
        page = f"{self.api.endpoint}/{self.repo_id}"
        return page if self.revision == _MAIN else f"{page}/tree/{self.revision}"


def read_text(path: Path, where: str) -> str:
    """A small file as text, with its line ends.

    Raises:
        ConvertError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConvertError(f"{where}: is not text in UTF-8 ({error}). Mend it there first.") from error


def check_names(repo_id: str, revision: str | None) -> None:
    """Refuse what is no name of a repo, or a revision that cannot be written to.

    Raises:
        ConvertError: it is not.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ConvertError(f"{repo_id}: no name of a repo; write owner/name, such as my-name/flan-t5-small-fat5")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConvertError(f"--revision {revision} is a commit, which nothing can be added to; name a branch")
