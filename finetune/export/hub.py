"""Talks to the Hugging Face Hub: who asks, what a repository holds, one commit with everything in it.

Why one `create_commit` and not `upload_folder`: a commit is atomic, so that nobody pulls half a model, and its
operations are a list of files, so that only what was listed can go. It is resumable all the same, because content is
addressed by its hash: a large file that has arrived (or its chunks, with Xet storage) is not sent again.

Whatever the client raises becomes a `HubError` of one message. Its own texts hold URLs, signed ones among them, so they
are not repeated; what the server said is, with anything that looks like a token taken out. The client sends transfers
again by itself when the connection breaks; it does not for most other calls when asked to wait (429), so that is done
here.

Leaves out: which files go (published.py), the card (card.py), downloads (download.py).
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from finetune.console import Report
from finetune.errors import HubError

T = TypeVar("T")
Kind = Literal["LoRA adapter", "non-MoE tuning", "model"]
# How often a call is tried when the hub asks to wait, and for how long at most before the user decides.
_TRIES, _LONGEST_WAIT = 5, 300
_TOKEN = re.compile(r"hf_\w+|Bearer\s+\S+")
_AGAIN = "run the same command again: what has arrived is not sent again"
_NEW_TOKEN = "make a token with write access on the hub's settings page, then `hf auth login` or set HF_TOKEN"
# Files that say what a repository holds, and those that an update must not leave behind.
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"adapter_config\.json", "LoRA adapter"),
    (r"non_moe\.json", "non-MoE tuning"),
    (r"config\.json|.+\.gguf", "model"),
)
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|.+\.gguf)")


@dataclass(frozen=True)
class Destination:
    """Where to push: `repo_id` with or without its owner, and the branch (the default one when None)."""

    repo_id: str
    private: bool = False
    branch: str | None = None


@dataclass(frozen=True)
class Pushed:
    """A commit that holds what was pushed."""

    repo_id: str
    commit: str
    url: str


class Hub:
    """The hub at HF_ENDPOINT, asked with the token of this machine if there is one.

    Args:
        report: told when the hub asks to wait.
        sleep: waits so many seconds.
    """

    def __init__(self, report: Report, *, sleep: Callable[[float], None] = time.sleep):
        self.token = get_token()
        self.api = HfApi(endpoint=constants.ENDPOINT, token=self.token or False, library_name="moe-qlora")
        self._report, self._sleep = report, sleep

    def ask(self, what: str, repo: str, question: Callable[[], T]) -> T:
        """The answer to a call of the client, after the waits that the hub asks for.

        Args:
            what: what the call does, for messages.
            repo: the repository it is about.

        Raises:
            HubError: no connection, no right, no such repository, or a wait that is too long.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                with self._explained(what, repo), _unsigned_logs():
                    return question()
            except _AskedToWait as wait:
                if attempt == _TRIES or wait.seconds > _LONGEST_WAIT:
                    raise HubError(
                        f"the hub limits the rate of requests (429) and asks to wait {wait.seconds:.0f} s",
                        where=f"{what}, {repo}, tried {attempt} {'time' if attempt == 1 else 'times'}",
                        fix=f"wait, then {_AGAIN}",
                    ) from None
                self._report.line(f"The hub asks to wait {wait.seconds:.0f} s ({attempt} of {_TRIES - 1})")
                self._sleep(wait.seconds)
        raise AssertionError("the last try returns or raises")

    @contextlib.contextmanager
    def _explained(self, what: str, repo: str) -> Iterator[None]:
        try:
            yield
        except (HTTPError, OSError, RuntimeError) as error:  # an upload's threads wrap theirs in a RuntimeError
            known = _known(error)
            if known is None:
                raise
            raise self._reworded(known, what, repo) from None

    def _reworded(self, error: BaseException, what: str, repo: str) -> Exception:
        where = f"{repo} at {constants.ENDPOINT}"
        if isinstance(error, OfflineModeIsEnabled):
            return HubError(
                "the hub is switched off (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set)",
                where=f"{what}, {repo}",
                fix="unset the variable, then run the same command again",
            )
        if not isinstance(error, HfHubHTTPError):
            kind = "cannot be reached" if "connect" in type(error).__name__.lower() else "does not answer to the end"
            return HubError(f"the hub {kind} ({type(error).__name__}): {what}", where=where, fix=_AGAIN)
        status = error.response.status_code
        said = f": {self.redacted(error.server_message)}" if error.server_message else ""
        if status == 429:
            return _AskedToWait(_seconds(error.response.headers))
        if isinstance(error, RevisionNotFoundError):
            return HubError(
                f"the repository has no such revision: {what}",
                where=where,
                fix="name a branch, a tag or a commit of it",
            )
        if status == 401 and self.token is not None:
            return HubError(f"the hub does not accept the token (401){said}", where=where, fix=_NEW_TOKEN)
        if status == 401 or isinstance(error, RepositoryNotFoundError):
            return HubError(
                "the hub has no such repository that you may read",
                where=where,
                fix="check the name; for a private or gated one, `hf auth login` or set HF_TOKEN",
            )
        if status == 403:
            return HubError(f"the token has no right to {what} (403){said}", where=where, fix=_NEW_TOKEN)
        if status >= 500:
            return HubError(f"the hub has a fault of its own ({status}): {what}", where=where, fix=f"later, {_AGAIN}")
        return HubError(f"the hub refuses to {what} ({status}){said}", where=where, fix="correct what it names")

    def redacted(self, text: str) -> str:
        """The text without this machine's token, and without what looks like one."""
        return _TOKEN.sub("***", text.replace(self.token, "***") if self.token else text)


@contextlib.contextmanager
def _unsigned_logs() -> Iterator[None]:
    """While it lasts, the client's warnings (it sends a transfer again, it waits) show no signatures of URLs."""
    handlers = logging.getLogger("huggingface_hub").handlers

    def unsigned(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), ()
        return True

    for handler in handlers:
        handler.addFilter(unsigned)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(unsigned)


class _AskedToWait(Exception):
    def __init__(self, seconds: float):
        super().__init__(seconds)
        self.seconds = seconds


def require_writable(hub: Hub, to: Destination) -> Destination:
    """Checks by one cheap call that this machine's token may write there; returns the destination with its owner.

    Raises:
        HubError: a bad name, no token, one that is not accepted or that may only read, or somebody else's name.
    """
    require_repo_id(to.repo_id)
    if hub.token is None:
        raise HubError("there is no token for the hub", where=to.repo_id, fix=_NEW_TOKEN)
    who = hub.ask("ask whose the token is", to.repo_id, hub.api.whoami)
    user = str(who["name"])
    organizations = {str(entry["name"]): entry.get("roleInOrg") for entry in who.get("orgs", [])}
    owner = to.repo_id.split("/")[0] if "/" in to.repo_id else user
    full = replace(to, repo_id=to.repo_id if "/" in to.repo_id else f"{user}/{to.repo_id}")
    if owner != user and organizations.get(owner, "read") == "read":
        writable = [user, *(name for name, role in organizations.items() if role != "read")]
        raise HubError(
            f"the token is {user}'s, who may not write to {owner}",
            where=full.repo_id,
            allowed=", ".join(f"{name}/..." for name in writable),
            fix="choose another owner, or ask one of the organization for the right",
        )
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read" or (
        token.get("role") == "fineGrained" and not _may_write(token["fineGrained"], owner, full.repo_id)
    ):
        raise HubError("the token may only read", where=full.repo_id, fix=_NEW_TOKEN)
    return full


def require_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        HubError: says what is allowed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot be the name of a repository: {str(error).split(':')[0]}",
            where="--repo-id, or output.push_to_hub.repo_id",
            allowed="name or owner/name: letters, digits, '-', '_' and '.', at most 96 of them",
            fix="choose another name",
        ) from None


def publish(hub: Hub, to: Destination, files: Mapping[str, Path | bytes], *, message: str) -> Pushed:
    """Makes the repository where there is none, and puts the files into it by one commit.

    Files of an earlier push that have the same names are replaced; weights that are not among the new ones are deleted.

    Args:
        to: with its owner, as `require_writable` returns it.
        files: path in the repository to a file or to its content.

    Raises:
        HubError: as `Hub.ask`; the repository holds something else, or is public where a private one is asked for.
    """
    kind = kind_of(files)
    assert kind is not None, "nothing to push that could be loaded"
    api, repo = hub.api, to.repo_id
    there = hub.ask("read what the repository holds", repo, partial(_holdings, api, to))
    if there is None:
        hub.ask(
            "create the repository", repo, partial(api.create_repo, repo, private=to.private or None, exist_ok=True)
        )
        there = _Holdings(frozenset(), private=to.private)
    held = kind_of(there.files)
    if held not in (None, kind):
        raise HubError(
            f"the repository already holds a {held}, and this is a {kind}",
            where=repo,
            allowed=f"a new repository, or one with a {kind}",
            fix="choose another --repo-id, or another --branch",
        )
    if to.private and not there.private:
        raise HubError(
            "the repository exists and is public",
            where=repo,
            fix="choose another --repo-id, make it private on the hub, or push without --private",
        )
    if to.branch is not None:
        hub.ask("create the branch", repo, partial(api.create_branch, repo, branch=to.branch, exist_ok=True))
    gone = sorted(path for path in there.files if _WEIGHTS.fullmatch(path) and path not in files)
    operations = [
        *(CommitOperationDelete(path_in_repo=path) for path in gone),
        *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()),
    ]
    made = hub.ask(
        "upload the files",
        repo,
        partial(api.create_commit, repo, operations, commit_message=message, revision=to.branch),
    )
    return Pushed(repo, made.oid, made.commit_url)


def kind_of(paths: Mapping[str, Any] | frozenset[str]) -> Kind | None:
    """What a repository with these files holds; None where nothing could be loaded from it."""
    for pattern, kind in _KINDS:
        if any(re.fullmatch(pattern, path) for path in paths):
            return kind
    return None


@dataclass(frozen=True)
class _Holdings:
    files: frozenset[str]
    private: bool


def _holdings(api: HfApi, to: Destination) -> _Holdings | None:
    """What the branch holds (the default one, where it does not exist: it starts from there); None: no repository."""
    try:
        try:
            info = api.model_info(to.repo_id, revision=to.branch)
        except RevisionNotFoundError:
            info = api.model_info(to.repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None
    return _Holdings(frozenset(file.rfilename for file in info.siblings or ()), private=bool(info.private))


def _may_write(rights: Mapping[str, Any], owner: str, repo_id: str) -> bool:
    """Whether a fine-grained token's rights cover writing to the owner's repositories, or to this one."""
    return any(
        scope["entity"].get("name") in (owner, repo_id) and "repo.write" in scope["permissions"]
        for scope in rights.get("scoped", [])
    )


def _known(error: BaseException | None) -> BaseException | None:
    """The first of an error and its causes that is about the hub."""
    while error is not None and not isinstance(error, (HTTPError, OfflineModeIsEnabled)):
        error = error.__cause__
    return error


def _seconds(headers: Mapping[str, str]) -> float:
    """How long the hub asks to wait: `Retry-After`, or the reset of the window in `RateLimit`."""
    after = headers.get("retry-after", "")
    window = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(after) if after.isdigit() else float(window[1]) if window else 30.0
