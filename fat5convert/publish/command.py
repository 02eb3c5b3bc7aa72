"""The command `fat5convert push`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fat5convert.console import one_message, size
from fat5convert.interruption import importing

if TYPE_CHECKING:
    from fat5convert.publish.card import Licence
    from fat5convert.publish.preflight import Ready
    from fat5convert.publish.push import Changes
    from fat5convert.publish.remote import State


@click.command()
@click.argument("out", type=click.Path())
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="of a new repo  [default: private]")
@click.option("--revision", metavar="R", help="branch to push to, made if it does not exist  [default: main]")
@click.option("--create-pr", is_flag=True, help="open a pull request instead of committing")
@click.option(
    "--commit-message",
    metavar="M",
    default="Publish with fat5convert",
    show_default=True,
    help="also the title of the pull request",
)
@click.option("--license", "licence", metavar="ID", help="such as apache-2.0  [default: the base model's]")
@click.option("--token-from-env", is_flag=True, help="take the token from HF_TOKEN, not from the stored login")
@click.option("--dry-run", is_flag=True, help="list files, deletions and the card; change nothing")
@click.option("--yes", is_flag=True, help="do not ask before pushing")
def push(
    out: str,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    licence: str | None,
    token_from_env: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Publish the FAT5 folder OUT as REPO_ID (owner/name) on the Hub.

    OUT is checked first: that it is complete, is what its certificate says, and loads where FAT5 is not installed. A
    card is written, in which what you edit on the Hub is kept. The same command may be given again after any failure,
    and for a new version: only what differs is uploaded.

    \b
    Examples:
      hf auth login                                                 # once
      fat5convert push flan-fat5/ my-name/flan-t5-small-fat5 --dry-run
      fat5convert push flan-fat5/ my-name/flan-t5-small-fat5 --public
      fat5convert push runs/ul2/model team/flan-legal --create-pr --commit-message "Adapt to case law"
    """  # noqa: D301 (click's \b keeps the lines apart)
    if create_pr and revision is not None:
        raise click.UsageError("a pull request is against main: give --create-pr or --revision, not both")
    if not Path(out).exists() and Path(repo_id).is_dir():
        raise click.UsageError(f"the folder comes first: fat5convert push {repo_id} {out}")
    with one_message():
        _push(
            out,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=commit_message,
            licence=licence,
            from_env=token_from_env,
            dry_run=dry_run,
            yes=yes,
        )


def _push(
    out: str,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
    licence: str | None,
    from_env: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    with importing():
        from fat5convert.errors import ConvertError
        from fat5convert.publish.card import Licence
        from fat5convert.publish.hub_errors import NO_LOGIN, explained
        from fat5convert.publish.preflight import check
        from fat5convert.publish.push import Push
        from fat5convert.publish.remote import Remote, check_names

    check_names(repo_id, revision)
    remote = Remote(repo_id, revision, from_env=from_env)
    with explained(repo_id, remote.token):
        author = "" if dry_run else remote.log_in()
        if remote.token is None:
            click.echo(f"{NO_LOGIN}. Without one, a private repo looks as if it were not there", err=True)
        state = remote.read()
        _check_request(repo_id, state, private, create_pr)
    click.echo(f"checking {out}, and loading it where FAT5 is not installed ...", err=True)
    ready = check(out)
    with explained(repo_id, remote.token):
        push = Push(ready, remote, Licence(licence) if licence else None, _ask_licence)
        changes = push.compare(state)
        if changes.files[-1] in changes.additions:
            remote.validate(changes.card)
    hidden = state.private if state.commit else private is not False
    _say_plan(out, ready, repo_id, changes, f"{'' if state.commit else 'new, '}{'private' if hidden else 'public'}")
    if dry_run:
        _say_files(changes)
        click.echo("dry run: nothing was changed")
        return
    if changes and not yes:
        if not sys.stdin.isatty():
            raise ConvertError("there is no terminal to ask on; look at what --dry-run says, then give --yes")
        click.confirm("Push?", abort=True)
    with explained(repo_id, remote.token):
        state = remote.make(state, private=hidden)
    click.echo(push.send(state, message, author, create_pr=create_pr))


def _check_request(repo_id: str, state: State, private: bool | None, create_pr: bool) -> None:
    """Refuse what would not come out as asked."""
    from fat5convert.errors import ConvertError

    if state.commit is None and create_pr:
        raise ConvertError(f"{repo_id}: there is no such repo to open a pull request in, or this token does not see it")
    if state.commit is not None and private is not None and private != state.private:
        found, option = ("private", "--public") if state.private else ("public", "--private")
        raise ConvertError(
            f"{repo_id} is there and {found}, which {option} does not change. Change it in the repo's settings first, "
            f"or push without {option}"
        )


def _ask_licence() -> Licence:
    """Ask for what no card states."""
    from fat5convert.errors import ConvertError
    from fat5convert.publish.card import Licence

    if not sys.stdin.isatty():
        raise ConvertError(
            "the base model's card states no licence, or cannot be seen. Find out which it is, and give it by "
            "--license, as https://huggingface.co/docs/hub/repositories-licenses writes it"
        )
    return Licence(click.prompt("The base model's card states no licence. Which is it (such as apache-2.0)?", err=True))


def _say_plan(out: str, ready: Ready, repo_id: str, changes: Changes, kind: str) -> None:
    nbytes = sum((ready.folder / name).stat().st_size for name in ready.contents.upload)
    click.echo(f"{out}: a complete FAT5 repo, {len(ready.contents.upload)} files, {size(nbytes)}")
    for name, reason in ready.contents.left.items():
        click.echo(f"  not published: {name} ({reason})")
    for name in changes.kept_sections:
        click.echo(f"  card: section {name!r} was edited by hand and stays as it is")
    new = size(sum(addition.upload_info.size for addition in changes.additions))
    click.echo(
        f"{repo_id} ({kind}): {len(changes.additions)} files to upload ({new}), "
        f"{len(changes.files) - len(changes.additions)} there already, {len(changes.deletions)} to delete"
    )
    for name in changes.deletions:
        click.echo(f"  delete {name}")


def _say_files(changes: Changes) -> None:
    """List everything with size and SHA-256, and show the card."""
    for file in changes.files:
        mark = "upload" if file in changes.additions else "there"
        click.echo(f"  {mark:7}{file.upload_info.size:>14,}  {file.upload_info.sha256.hex()}  {file.path_in_repo}")
    click.echo(f"\n{changes.card}")
