"""Publishing over real HTTP: one commit, no second upload of what has arrived, and one message for every refusal."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune.console import Report
from finetune.errors import HubError
from finetune.export.hub import Destination, Hub, publish, require_writable
from tests.hub.stand_in import ORGANIZATION, TOKEN, USER, StandIn

REPO = f"{USER}/tuned"
FILES: dict[str, Path | bytes] = {
    "README.md": b"---\nlicense: mit\n---\n",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"A" * 4000,
    "figures/training.png": b"P" * 300,
}


def client(waits: list[float] | None = None) -> Hub:
    return Hub(Report(as_json=True), sleep=(waits if waits is not None else []).append)


def push(to: Destination, files: dict[str, Path | bytes] | None = None, waits: list[float] | None = None) -> str:
    hub = client(waits)
    return publish(hub, require_writable(hub, to), files or FILES, message="Adapter").commit


def refused(to: Destination, files: dict[str, Path | bytes] | None = None) -> str:
    """The message of a push that must fail; it holds no token, and nothing of it was printed."""
    out = io.StringIO()
    with redirect_stderr(out), redirect_stdout(out), pytest.raises(HubError) as caught:
        push(to, files)
    for text in (str(caught.value), out.getvalue()):
        assert TOKEN not in text
        assert "signature=" not in text
    assert caught.value.fix
    return str(caught.value)


def test_everything_goes_by_one_commit(hub: StandIn) -> None:
    commit = push(Destination("tuned"))
    repo = hub.repos[REPO]
    assert {path: content for path, content in repo.files().items() if path != ".gitattributes"} == FILES
    assert repo.branches == {"main": commit}
    assert repo.messages == ["initial commit", "Adapter"]
    assert not repo.private


def test_an_existing_repository_is_updated_without_sending_what_is_there(hub: StandIn) -> None:
    push(Destination(REPO))
    hub.uploaded.clear()
    changed = FILES | {"adapter_model.safetensors": b"B" * 4000}
    push(Destination(REPO), changed)
    assert hub.repos[REPO].files()["adapter_model.safetensors"] == b"B" * 4000
    assert hub.uploaded == [hashlib.sha256(b"B" * 4000).hexdigest()]
    assert hub.count("POST", "repos/create") == 1


def test_shards_of_an_earlier_push_do_not_stay(hub: StandIn) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": bytes([i]) * 100 for i in (1, 2, 3)}
    hub.add(REPO, {"config.json": b"{}", "notes.md": b"mine", "model.safetensors.index.json": b"{}", **shards})
    push(Destination(REPO), {"config.json": b"{}", "model.safetensors": b"whole"})
    assert set(hub.repos[REPO].files()) == {"config.json", "notes.md", "model.safetensors"}


def test_a_branch_is_made_and_main_is_left_alone(hub: StandIn) -> None:
    before = hub.add(REPO, {".gitattributes": b""})
    commit = push(Destination(REPO, branch="rank-16"))
    assert hub.repos[REPO].branches == {"main": before, "rank-16": commit}
    assert push(Destination(REPO, branch="rank-16")) == commit  # nothing changed: no empty commit


def test_private_and_organization(hub: StandIn) -> None:
    push(Destination(f"{ORGANIZATION}/tuned", private=True))
    assert hub.repos[f"{ORGANIZATION}/tuned"].private


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "whoami"), ("POST", "repos/create"), ("POST", "/commit/")], ids=["who", "make", "put"]
)
def test_the_wait_that_the_hub_asks_for_is_kept(hub: StandIn, method: str, path: str) -> None:
    hub.fail(method, path, times=2, status=429, headers={"Retry-After": "7"})
    waits: list[float] = []
    push(Destination(REPO), waits=waits)
    assert waits == [7, 7]
    assert hub.repos[REPO].files()["adapter_config.json"] == b"{}"
    assert len(hub.uploaded) == 2


def test_too_many_requests_are_said_in_the_end(hub: StandIn) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"RateLimit": '"api";r=0;t=55'})
    says = refused(Destination(REPO))
    assert "limits the rate of requests (429) and asks to wait 55 s" in says
    assert "tried 5 times" in says
    hub.faults.clear()
    hub.fail("GET", "whoami", status=429, headers={"Retry-After": "3600"})
    assert "asks to wait 3600 s" in refused(Destination(REPO))
    assert hub.count("GET", "whoami") == 2  # an hour is the user's to wait


def test_no_token(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    says = refused(Destination(REPO))
    assert "there is no token for the hub" in says
    assert "hf auth login" in says
    assert hub.requests == []


def test_a_token_that_has_expired(hub: StandIn) -> None:
    hub.tokens.clear()
    says = refused(Destination(REPO))
    assert "does not accept the token (401)" in says
    assert "make a token with write access" in says


def test_a_token_that_expires_on_the_way(hub: StandIn) -> None:
    hub.fail("POST", "/commit/", status=401, says=f"Bearer {TOKEN} has expired")
    says = refused(Destination(REPO))
    assert "does not accept the token (401): *** has expired" in says


@pytest.mark.parametrize(
    "rights",
    [
        {"role": "read"},
        {"role": "fineGrained", "fineGrained": {"scoped": []}},
        {
            "role": "fineGrained",
            "fineGrained": {"scoped": [{"entity": {"name": USER}, "permissions": ["repo.content.read"]}]},
        },
    ],
    ids=["read", "fine-grained, nothing", "fine-grained, reading"],
)
def test_a_token_that_may_only_read(hub: StandIn, rights: dict[str, object]) -> None:
    hub.tokens[TOKEN] = rights
    assert "the token may only read" in refused(Destination(REPO))
    assert [path for _, path in hub.requests] == ["/api/whoami-v2"]


def test_a_fine_grained_token_with_the_right(hub: StandIn) -> None:
    scoped = [{"entity": {"type": "user", "name": USER}, "permissions": ["repo.content.read", "repo.write"]}]
    hub.tokens[TOKEN] = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
    push(Destination(REPO))


def test_no_right_to_write(hub: StandIn) -> None:
    hub.fail("POST", "repos/create", status=403, headers={"X-Error-Message": "plan exceeded"})
    says = refused(Destination(REPO))
    assert "the token has no right to create the repository (403)" in says
    assert "plan exceeded" in says


def test_somebody_elses_name(hub: StandIn) -> None:
    says = refused(Destination("stranger/tuned"))
    assert f"the token is {USER}'s, who may not write to stranger" in says
    assert f"allowed: {USER}/..., {ORGANIZATION}/..." in says
    hub.organizations[0]["roleInOrg"] = "read"
    assert "may not write to engine" in refused(Destination(f"{ORGANIZATION}/tuned"))


@pytest.mark.parametrize("repo_id", ["a/b/c", "-x", "with space", "x..y", ""])
def test_a_name_that_cannot_be(hub: StandIn, repo_id: str) -> None:
    says = refused(Destination(repo_id))
    assert f"{repo_id!r} cannot be the name of a repository" in says
    assert "owner/name" in says
    assert hub.requests == []


def test_a_repository_of_another_kind(hub: StandIn) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"M"})
    says = refused(Destination(REPO))
    assert "already holds a model, and this is a LoRA adapter" in says
    assert hub.repos[REPO].messages == ["before"]
    assert hub.count("PUT", "/lfs/") == 0


def test_a_public_repository_where_a_private_one_is_wanted(hub: StandIn) -> None:
    hub.add(REPO, {})
    assert "the repository exists and is public" in refused(Destination(REPO, private=True))
    assert hub.repos[REPO].messages == ["before"]


def test_a_cut_connection_is_said_and_the_next_push_goes_on(hub: StandIn) -> None:
    hub.fail("POST", "/commit/", times=1, cut_after=0)
    says = refused(Destination(REPO))
    assert "the hub does not answer to the end" in says
    assert "what has arrived is not sent again" in says
    assert hub.repos[REPO].messages == ["initial commit"]
    assert len(hub.uploaded) == 2
    push(Destination(REPO))
    assert len(hub.uploaded) == 2
    assert hub.repos[REPO].messages == ["initial commit", "Adapter"]


def test_a_cut_transfer_is_sent_again_at_once(hub: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    hub.fail("PUT", "/lfs/", times=1, cut_after=1000)
    push(Destination(REPO))
    assert hub.repos[REPO].files()["adapter_model.safetensors"] == b"A" * 4000
    assert hub.count("PUT", "/lfs/") == 3
    assert "thrown while requesting PUT" in caplog.text
    assert "signature=" not in caplog.text  # of the URL, by which anybody could write


def test_no_hub_there(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached (ConnectError)" in refused(Destination(REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub is switched off (HF_HUB_OFFLINE" in refused(Destination(REPO))


_PUSHER = """
import sys
from pathlib import Path
from finetune.console import Report
from finetune.export.hub import Destination, Hub, publish, require_writable
hub = Hub(Report(as_json=True))
files = {"adapter_config.json": b"{}", **{path.name: path for path in sorted(Path(sys.argv[1]).iterdir())}}
print(publish(hub, require_writable(hub, Destination("tuned")), files, message="Adapter").commit)
"""


def test_a_killed_upload_goes_on_where_it_was(hub: StandIn, environment: dict[str, str], tmp_path: Path) -> None:
    """Two processes: the first is killed in the middle of its second large file, the second sends only that one."""
    folder = tmp_path / "large"
    folder.mkdir()
    contents = {"adapter_model.safetensors": os.urandom(1 << 20), "more.safetensors": os.urandom(1 << 20)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    hang = threading.Event()
    second = hashlib.sha256(contents["more.safetensors"]).hexdigest()
    hub.fail("PUT", second, times=1, cut_after=1000, hang=hang)
    command = [sys.executable, "-c", _PUSHER, str(folder)]
    with subprocess.Popen(command, env={**os.environ, **environment}) as first:
        assert hang.wait(60)
        while not hub.uploaded and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert hub.repos[REPO].messages == ["initial commit"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    assert sorted(hub.uploaded) == sorted(hashlib.sha256(content).hexdigest() for content in contents.values())
    assert hub.repos[REPO].branches["main"] == done.stdout.strip()
    assert contents.items() <= hub.repos[REPO].files().items()
    assert TOKEN not in done.stdout + done.stderr
