"""The chat page in a real browser: the bundled model and a made-up adapter on it answer, and show their experts."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.infer.engine import Engine
from finetune.infer.request import Event, Request, Sampling
from finetune.infer.residency import EngineSettings
from tests.browser.conftest import MEASURE, SIZES, opened_tab
from tests.conftest import REPOSITORY
from tests.models import save_lora
from tests.running import run_finetune

pytest.importorskip("gradio", reason="scripts/test_browser.sh installs it")
PlaywrightTimeout: Any = pytest.importorskip("playwright.sync_api").TimeoutError

MODEL = REPOSITORY / "recipes" / "tiny-mixtral" / "model"
SAMPLING = Sampling(max_new_tokens=24)
QUESTION = "def add(a, b):"
INJECTED = "<script>alert(1)</script><img src=x onerror=alert(2)> ${alert(3)} {{value}} \u202e"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose answers are not the base's."""
    return save_lora(MODEL, tmp_path_factory.mktemp("run") / "adapter", std=0.3)


class Paced:
    """An engine that can be held up before each token."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.pause = 0.0
        self.handles: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request, listen: Callable[[Event], None]) -> Any:
        def slowly(event: Event) -> None:
            time.sleep(self.pause)
            listen(event)

        self.handles.append(self._engine.submit(request, slowly))
        return self.handles[-1]


@dataclass
class Site:
    """The page, served in this process."""

    url: str
    engine: Any

    def answer(self, model: str, *questions: str) -> tuple[list[str], list[int]]:
        """What the engine itself says, turn by turn, and the tokens that the model has seen in the end."""
        messages: list[dict[str, str]] = []
        answers: list[str] = []
        seen: list[int] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            ids = self.engine.encode_chat(messages)
            events = list(self.engine.stream(Request(ids, SAMPLING, model)))
            answers.append("".join(event.text for event in events).strip())
            seen = [*ids, *(event.token for event in events[:-1])]
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers, seen


@pytest.fixture(scope="module")
def site(adapter: Path) -> Iterator[Site]:
    from finetune.chat.page import Page
    from finetune.chat.page_server import PageServer
    from finetune.web.addresses import bind, listen

    settings = EngineSettings(max_length=400)
    with Engine.load(str(adapter), device="cpu", settings=settings) as engine:
        paced: Any = Paced(engine)
        page = Page(paced, SAMPLING, None)
        bound = bind("127.0.0.1", 0)
        listen(bound)
        server = PageServer(page.build(), bound, stop=page.stop_all)
        thread = threading.Thread(target=server.serve_page)
        thread.start()
        yield Site(server.url, paced)
        server.should_exit = True
        thread.join()


@dataclass
class Opened:
    """A tab, what it said to the console, and what it asked for."""

    page: Any
    said: list[str]
    asked: list[str]

    def send(self, question: str) -> None:
        self.page.get_by_label("Question").fill(question)
        self.page.get_by_role("button", name="Send").click()

    def send_until(self, question: str, text: str) -> None:
        """For what follows a refusal: gradio drops a click until it has heard that the event before is over."""
        for _ in range(30):
            self.send(question)
            with contextlib.suppress(PlaywrightTimeout):
                self.page.get_by_text(text).first.wait_for(timeout=2_000)
                return
        raise AssertionError(f"no {text!r} on the page")

    def last_answers(self) -> list[str]:
        return [self.page.locator(f"#{side} .assistant").last.inner_text() for side in ("left", "right")]

    def until_done(self) -> None:
        """The button is free again once both answers have ended; the colours follow."""
        self.page.wait_for_function(
            "[...document.querySelectorAll('button')].find(b => b.innerText == 'Stop').disabled"
        )

    def until_coloured(self, tokens: int) -> None:
        self.page.wait_for_function(f"document.querySelectorAll('#left-text .t').length == {tokens}")


@pytest.fixture
def opened(site: Site, browser: Any, request: pytest.FixtureRequest) -> Iterator[Opened]:
    site.engine.pause = 0.0
    with opened_tab(browser, site.url, *getattr(request, "param", (1280, "light"))) as tab:
        tab[0].wait_for_selector("#left .chat")
        yield Opened(*tab)


@SIZES
def test_it_answers_quietly_and_fits(
    opened: Opened, site: Site, screenshots: Path | None, request: pytest.FixtureRequest
) -> None:
    page = opened.page
    opened.send(QUESTION)
    _, seen = site.answer(site.engine.names[0], QUESTION)
    opened.until_coloured(len(seen))
    page.locator("#right-text .t").first.wait_for()
    measured = page.evaluate(MEASURE)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith((site.url, "data:"))] == []
    assert measured["width"] <= measured["window"]
    assert measured["outside"] == []
    assert [text for text in measured["faint"] if "svelte" not in text] == []  # those are gradio's own
    boxes = [page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
    beside = boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    assert beside == (page.viewport_size["width"] == 1280)
    if screenshots is not None:
        name = request.node.callspec.id
        page.screenshot(path=screenshots / f"chat-{name}.png", full_page=True)


def test_both_models_stream_their_own_answers_to_one_conversation(opened: Opened, site: Site) -> None:
    names = site.engine.names
    site.engine.pause = 0.03
    opened.send(QUESTION)
    lengths = set()
    opened.page.locator("#right .assistant").first.wait_for()
    while opened.page.get_by_role("button", name="Stop").is_enabled():
        lengths.add(tuple(map(len, opened.last_answers())))
        time.sleep(0.05)
    assert len(lengths) > 3
    site.engine.pause = 0.0
    opened.until_done()
    expected = [site.answer(name, QUESTION, "And now?")[0] for name in names[:2]]
    assert expected[0] != expected[1]
    assert opened.last_answers() == [answers[0] for answers in expected]
    opened.send("And now?")
    opened.page.locator("#right .user").nth(1).wait_for()
    opened.until_done()
    assert opened.last_answers() == [answers[1] for answers in expected]
    assert opened.page.locator("#left .user").all_inner_texts() == [QUESTION, "And now?"]
    note = opened.page.locator("#right .note").inner_text()
    assert re.match(rf"{names[1]}, \d+ \+ 24 tokens, [\d.]+ tokens/s, cut at max_new_tokens=24$", note)


def test_every_token_that_a_model_saw_has_its_experts_colour(opened: Opened, site: Site) -> None:
    opened.send(QUESTION)
    for name, side in zip(site.engine.names, ("left", "right"), strict=False):
        _, seen = site.answer(name, QUESTION)

        def route(loaded: Any, seen: list[int] = seen) -> list[list[int]]:
            with torch.no_grad():
                out = loaded.model(input_ids=torch.tensor([seen]), output_router_logits=True)
            return [logits.argmax(-1).tolist() for logits in out.router_logits]

        truth = site.engine.run(route, name)
        tokens = opened.page.locator(f"#{side}-text .t")
        for layer in (0, 4):
            opened.page.get_by_label("number input for Layer").fill(str(layer))
            opened.page.get_by_label("number input for Layer").press("Enter")
            opened.page.locator(f"#{side}-text [aria-label$='layer {layer}']").wait_for()
            titles = tokens.evaluate_all("tokens => tokens.map(token => token.title)")
            assert titles == [f"token {i}, expert {expert}" for i, expert in enumerate(truth[layer])]
        colours = tokens.evaluate_all("tokens => tokens.map(token => getComputedStyle(token).backgroundColor)")
        assert len(set(zip(colours, truth[4], strict=True))) == len(set(colours)) == len(set(truth[4]))
    assert opened.page.locator("#experts .t").all_inner_texts() == [str(expert) for expert in range(8)]


def test_stop_ends_the_answers_and_the_conversation_goes_on(opened: Opened, site: Site) -> None:
    site.engine.pause = 0.1
    opened.send(QUESTION)
    opened.page.locator("#right .assistant").first.wait_for()
    opened.page.get_by_role("button", name="Stop").click()
    opened.until_done()
    whole = [site.answer(name, QUESTION)[0][0] for name in site.engine.names]
    stopped = opened.last_answers()
    for side, text, full in zip(("left", "right"), stopped, whole, strict=False):
        assert opened.page.locator(f"#{side} .note").inner_text().endswith("stopped")
        assert full.startswith(text)
        assert len(text) < len(full)
    site.engine.pause = 0.0
    opened.page.get_by_label("Question").fill("And now?")
    opened.page.keyboard.press("Enter")
    opened.page.locator("#left .assistant").nth(1).wait_for()
    opened.until_done()
    assert opened.page.locator("#left .assistant").first.inner_text() == stopped[0]
    opened.page.get_by_role("button", name="New conversation").click()
    opened.page.wait_for_function("!document.querySelector('.user') && !document.querySelector('.t')")


def test_a_closed_tab_ends_its_answers(site: Site, browser: Any) -> None:
    page = browser.new_page()
    page.goto(site.url)
    page.wait_for_selector("#left .chat")
    site.engine.pause = 0.2
    before = site.engine.stats().cancelled
    Opened(page, [], []).send(QUESTION)
    page.locator("#left .assistant").first.wait_for()
    page.close()
    deadline = time.monotonic() + 30
    while site.engine.stats().cancelled < before + 2:
        assert time.monotonic() < deadline, "the answers go on"
        time.sleep(0.05)


def test_text_is_never_markup(opened: Opened, site: Site) -> None:
    opened.send(INJECTED)
    shown = INJECTED.replace("\u202e", "\\u202e")
    opened.page.locator("#right .user").first.wait_for()
    opened.until_done()
    opened.page.locator("#right-text .t").first.wait_for()
    assert opened.page.locator("#left .user").inner_text() == shown
    made = "document.querySelectorAll('.chat script, .chat img, .coloured script, .coloured img').length"
    assert opened.page.evaluate(made) == 0
    coloured = opened.page.locator("#left-text .t").evaluate_all(
        "tokens => tokens.map(t => { t = t.cloneNode(true); t.querySelector('sup')?.remove(); return t.textContent })"
    )
    assert shown in "".join(coloured)
    assert opened.said == []


def test_a_refusal_is_said_and_the_question_stays(opened: Opened, site: Site) -> None:
    question = "word " * 500
    opened.send(question)
    alert = opened.page.get_by_role("alert")
    alert.wait_for()
    assert "the conversation no longer fits" in alert.inner_text()
    assert "fewer than 400" in alert.inner_text()
    assert opened.page.get_by_label("Question").input_value() == question
    opened.page.get_by_role("button", name="Settings").click()
    opened.page.get_by_label("Max new tokens").fill("0")
    opened.send_until("Hi", "max_new_tokens is 0")
    opened.page.get_by_label("Max new tokens").fill("3")
    opened.page.get_by_label("Beside it").click()
    opened.page.get_by_role("option", name="nobody").click()
    opened.send_until("Hi", "+ 3 tokens")
    assert not opened.page.locator("#right").is_visible()
    assert opened.page.get_by_role("alert").count() == 0


def ask(url: str, headers: dict[str, str], *, data: bytes | None = None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as refused:
        return refused.code, refused.headers


def test_only_its_own_page_reaches_it(site: Site) -> None:
    port = int(site.url.rstrip("/").rpartition(":")[2])
    status, headers = ask(site.url, {})
    assert status == 200
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert ask(site.url, {"Host": "localhost:9000"})[0] == 200  # through a tunnel
    assert ask(site.url, {"Host": f"elsewhere.example:{port}"})[0] == 403
    join = f"{site.url}gradio_api/queue/join"
    assert ask(join, {"Origin": "https://elsewhere.example", "Content-Type": "text/plain"}, data=b"{}")[0] == 403
    assert ask(join, {"Origin": "null", "Content-Type": "text/plain"}, data=b"{}")[0] == 403
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


WATCHED = """
import sys

def watch(event, arguments):
    # Its own address, as a number, is written down by getaddrinfo without asking anybody.
    if event == "socket.connect" or (event == "socket.getaddrinfo" and arguments[0] != "127.0.0.1"):
        print("calls out:", event, arguments, file=sys.stderr)

sys.addaudithook(watch)
from finetune.cli import main
main()
"""


def test_the_command_calls_nobody_and_ctrl_c_ends_it_and_its_answers(browser: Any) -> None:
    command = [sys.executable, "-c", WATCHED, "chat", str(MODEL), "--ui", "--port", "0", "--device", "cpu"]
    # Without an end of sequence the answer would take minutes.
    command += ["--max-new-tokens", "100000", "--repetition-penalty", "1.1"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert url is not None, line
        page = browser.new_page()
        page.goto(url[0])
        page.wait_for_selector("#left .chat")
        Opened(page, [], []).send(QUESTION)
        page.locator("#left .assistant").first.wait_for()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        page.close()
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "calls out" not in said


def test_an_address_that_cannot_be_had(site: Site) -> None:
    taken = site.url.rstrip("/").rpartition(":")[2]
    for host, port in (("127.0.0.1", taken), ("192.0.2.1", "0")):
        ran = run_finetune("chat", "no/such/model", "--ui", "--host", host, "--port", port)
        assert ran.status == 2
        assert f"cannot listen on {host} port {port}: " in ran.stderr
        assert "choose another port" in ran.stderr


def test_an_engine_that_failed_is_told(
    opened: Opened, site: Site, monkeypatch: pytest.MonkeyPatch, screenshots: Path | None
) -> None:
    """Last of all, since nobody answers after it."""

    def lost(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    for name in ("step", "probe"):
        monkeypatch.setattr(site.engine._runner, name, lost)
    opened.send(QUESTION)
    why = "the engine failed while it answered: RuntimeError: CUDA error: an illegal memory access"
    opened.page.locator("#right .note", has_text=why).wait_for()
    alert = opened.page.get_by_role("alert")
    alert.wait_for()
    told = re.compile(rf"{re.escape(why)}\n.*\n +fix: start it again; the traceback is in the log")
    assert re.match(told.pattern + "\nthe model said nothing, so the question is not kept$", alert.inner_text())
    opened.until_done()
    opened.send("And now?")
    opened.page.wait_for_function("!document.querySelector('[role=alert]').innerText.includes('said nothing')")
    assert told.fullmatch(alert.inner_text())
    assert opened.page.get_by_label("Question").input_value() == "And now?"
    assert opened.page.locator("#left-text .t").count() == 0
    assert opened.page.locator(".toast-wrap .error").count() == 0
    assert opened.said == []
    if screenshots is not None:
        opened.page.screenshot(path=screenshots / "chat-failed.png", full_page=True)
