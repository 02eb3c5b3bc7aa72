"""The push: compare the folder with the repo, upload what differs, remove what an earlier push left, in one commit.

What is done follows from comparing the two alone, so that the same command may be given again after any failure: what
has arrived is found there, and nothing is uploaded twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

from fat5convert.errors import ConvertError
from fat5convert.publish import card as cards
from fat5convert.publish.contents import CARD, CERTIFICATE, CONVERSION, INDEX, TRAINING
from fat5convert.publish.hub_errors import AGAIN, HTTP_ERRORS, explained, is_passing
from fat5convert.publish.origin import Origin, find_origin, read_card
from fat5convert.publish.preflight import Ready
from fat5convert.publish.remote import Remote, State, read_text
from fat5convert.publish.sections import sections

_ATTEMPTS = 4
"""Of the commit; the client itself repeats uploads and reads."""

_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_RUNTIME = "runtime_files.py"
"""The code file that lists the code files, of this version and of an earlier one that is on the Hub."""

AskLicence = Callable[[], cards.Licence]


@dataclass(frozen=True)
class Changes:
    """What makes the repo as the folder is."""

    files: list[CommitOperationAdd]  # all, the card last
    additions: list[CommitOperationAdd]  # those of them that are not there
    deletions: list[str]
    card: ModelCard
    kept_sections: list[str]  # of the card, which were edited by hand

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.additions or self.deletions)


class Push:
    """A checked folder on its way to a repo.

    Args:
        ready: the folder.
        remote: the repo.
        licence: as given by the user, None to take it from the card that is there or the base model's.
        ask_licence: called where neither states one.

    Raises:
        ConvertError: a card cannot be read, or the Hub not reached.
    """

    def __init__(self, ready: Ready, remote: Remote, licence: cards.Licence | None, ask_licence: AskLicence) -> None:
        self.ready, self.remote = ready, remote
        self._licence, self._ask_licence = licence, ask_licence
        self.additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(ready.folder / name))
            for name in ready.contents.upload
        ]
        with explained(remote.repo_id, remote.token):
            self.origin: Origin | None = find_origin(ready, remote.knows)
            self._base = read_card(remote, self.origin)

    def compare(self, state: State) -> Changes:
        """Say what is to be done to a revision of the repo."""
        card = self._write_card(state)
        files = [*self.additions, CommitOperationAdd(CARD, str(card[0]).encode())]
        return Changes(files, [file for file in files if not state.has(file)], self._stale(state), *card)

    def send(self, state: State, message: str, author: str, *, create_pr: bool = False) -> str:
        """Do it, and see that it is done.

        Args:
            state: the repo as it was compared with.
            message: of the commit, and title of the pull request.
            author: the name of the token's owner.
            create_pr: whether to open a pull request instead.

        Returns:
            Address of the repo, or of the pull request.

        Raises:
            ConvertError: the Hub refuses, fails for long or cannot be reached, or somebody else pushed meanwhile.
        """
        with explained(self.remote.repo_id, self.remote.token):
            for attempt in range(_ATTEMPTS):
                changes = self.compare(state)
                if not changes:
                    return self.remote.url
                if create_pr and (url := self._opened(message, author)):
                    return url
                try:
                    return self._commit(changes, state, message, create_pr)
                except HTTP_ERRORS as error:
                    # Its answer may be all that was lost: look what is there before the next attempt.
                    if not is_passing(error) or attempt == _ATTEMPTS - 1:
                        raise
                time.sleep(2**attempt)
                before, state = state, self.remote.read()
                if state.commit != before.commit and self.compare(state):
                    raise ConvertError(
                        f"{self.remote.repo_id}: somebody else has pushed there meanwhile (commit {state.commit}). "
                        "Look at what it was, and give the command again"
                    )
        raise AssertionError("the last attempt returns or raises")

    def _commit(self, changes: Changes, state: State, message: str, create_pr: bool) -> str:
        deletions = [CommitOperationDelete(name) for name in changes.deletions]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*changes.additions, *deletions]
        revision, url = self.remote.commit(operations, message, state.commit, create_pr=create_pr)
        left = self.compare(self.remote.read(revision))
        if left:
            names = [addition.path_in_repo for addition in left.additions] + left.deletions
            told = f"the Hub has not taken {', '.join(names)}; does a .gitignore there say so? {AGAIN}"
            raise ConvertError(f"{self.remote.repo_id}: {told}")
        return url or self.remote.url

    def _opened(self, title: str, author: str) -> str | None:
        """The pull request that an earlier attempt opened, if its answer was lost."""
        for revision, url in self.remote.open_pull_requests(title, author):
            if not self.compare(self.remote.read(revision)):
                return url
        return None

    def _write_card(self, state: State) -> tuple[ModelCard, list[str]]:
        present = cards.parse(self.remote.text(CARD, state), f"{self.remote.repo_id}/{CARD}") or self._own_card()
        if self._licence is None:
            self._licence = cards.licence_of(present, self._base) or self._ask_licence()
        hashes = {
            op.path_in_repo: op.upload_info.sha256.hex() for op in self.additions if _SHARD.fullmatch(op.path_in_repo)
        }
        texts = sections(self.ready, self.origin, self.remote.repo_id, hashes)
        card = cards.write(self.ready, self.origin, texts, self._licence, self._base, present)
        return card, cards.edited(present)

    def _own_card(self) -> ModelCard | None:
        """What the user has put into the folder, for a repo without a card."""
        path = self.ready.folder / CARD
        if not path.is_file():
            return None
        if not path.resolve().is_relative_to(self.ready.folder.resolve()):
            raise ConvertError(f"{path}: is a link that leads out of the folder; put the file itself there")
        return cards.parse(read_text(path, str(path)), str(path))

    def _stale(self, state: State) -> list[str]:
        """Files of the kinds that a push writes, which this one does not: shards, code and certificates of old."""
        ours = {*self.ready.contents.upload, CARD}
        owned = {INDEX, CERTIFICATE, CONVERSION, TRAINING}
        if any(not state.has(op) for op in self.additions if op.path_in_repo == _RUNTIME) and _RUNTIME in state.files:
            owned |= set(re.findall(r'"(\w+\.py)"', self.remote.text(_RUNTIME, state) or ""))
        return sorted(
            name for name in state.files if name not in ours and (name in owned or _SHARD.fullmatch(name) is not None)
        )
