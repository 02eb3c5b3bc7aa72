"""What can go wrong at the Hub, in words that say what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fat5convert.errors import ConvertError

NO_LOGIN = (
    "not logged in to the Hub. Make a token with write access at https://huggingface.co/settings/tokens and run "
    "`hf auth login`, or put it into HF_TOKEN and give --token-from-env"
)
AGAIN = "Give the same command again: it goes on from what has arrived."

# What a lost connection comes as: the base of the client's own error is that of its HTTP library, which is requests,
# httpx or another by its release.
HTTP_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
# And where an upload went wrong, in threads of its own, or the Hub says no to its parts or to the card.
_CLIENT_ERRORS: tuple[type[Exception], ...] = (*HTTP_ERRORS, ValueError, RuntimeError)
_PASSING = (408, 429, 500, 502, 503, 504)


def status_of(error: BaseException | None) -> int | None:
    """Status of the Hub's answer, None if there was none; looks through the errors that this one was raised from."""
    for raised in _chain(error):
        response = getattr(raised, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed, and the answer, if any, may have been lost on its way."""
    if isinstance(error, OfflineModeIsEnabled | HFValidationError):
        return False
    status = status_of(error)
    return status in _PASSING if status is not None else any(isinstance(e, HTTP_ERRORS) for e in _chain(error))


@contextmanager
def explained(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into ConvertError.

    Args:
        repo_id: the repo that is being written.
        token: never to be shown, whatever a message quotes.
    """
    try:
        yield
    except (ConvertError, click.Abort):  # the latter is how a question ends that was interrupted
        raise
    except _CLIENT_ERRORS as error:
        message = _explain(repo_id, error)
        if token:
            message = message.replace(token, "***")
        # Without the cause, whose text is not ours to vouch for.
        raise ConvertError(message) from None


def _explain(repo_id: str, error: Exception) -> str:
    status, said = status_of(error), _said(error)
    if isinstance(error, LocalTokenNotFoundError):
        return NO_LOGIN
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and publishing needs the Hub; unset it"
    if isinstance(error, HFValidationError):
        return f"{repo_id}: no valid name of a repo ({error})"
    if _is_full(status, said):
        return f"{repo_id}: the Hub has no room left for it ({said}). Free or buy storage, then: {AGAIN}"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not accept the token: it is wrong, expired or revoked ({said}). Run `hf auth login` again"
    if status == 403:
        return f"{repo_id}: this token may not do that ({said}). It needs write access to {repo_id.split('/')[0]}"
    if status in (401, 404):
        return f"{repo_id}: no such repo or revision, or this token does not see it ({said})"
    if status == 412:
        return f"{repo_id}: somebody else has pushed there meanwhile. Look at what it was, and give the command again"
    if is_passing(error) or status in _PASSING:
        return f"{repo_id}: the Hub cannot be reached or fails ({said}). {AGAIN}"
    if isinstance(error, RuntimeError):  # of Xet's client, which does not say what kind of failure it was
        return f"{repo_id}: the upload failed ({said}). {AGAIN}"
    return f"{repo_id}: the Hub refuses ({said}). What has arrived is kept, nothing that was there is lost"


def _is_full(status: int | None, said: str) -> bool:
    if status == 429:  # whose text has a quota as well: of requests
        return False
    return status in (402, 413, 507) or any(
        word in said.lower() for word in ("quota", "storage limit", "storage is full")
    )


def _said(error: BaseException) -> str:
    """What the Hub, or the network, had to say: of the first error of the chain, on one line."""
    cause: Any = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    told = response.headers.get("X-Error-Message") if response is not None else None
    text = told or getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    text = " ".join(text.split())
    return text if response is None else f"{response.status_code}: {text}"
