"""The page: one or two of the engine's models answer beside each other, and each token shows its expert.

Gradio draws the controls and does the streaming. The texts are HTML of our own, so that text is only ever shown as text
(`parts.py`). Nothing is fetched from elsewhere: no analytics, no fonts, no share link (`page_server.py` makes the
browser enforce it).

Running answers are kept by browser session, so that Stop reaches them and closing the tab ends them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune.chat.answering import Answer, Answering
from finetune.chat.parts import chat_text, coloured_text, head, legend, refusal
from finetune.chat.routes import Routed, routed
from finetune.chat.session import NAMES
from finetune.chat.sides import Turn, history, requests_for, summary
from finetune.errors import DataError, FinetuneError
from finetune.infer import Sampling

# Gradio reads it when it is imported and when it makes a page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

if TYPE_CHECKING:
    from finetune.infer import Engine

NOBODY = ""  # no model has this name
_REDRAW = 0.06  # seconds between two states: a browser draws no faster, and each is sent whole
_SIDE = 320  # pixels; two such beside each other where the window has them, else below each other
_CHAT: dict[str, Any] = {"container": True, "padding": True, "max_height": 460, "autoscroll": True}
_EMPTY = chat_text([], "Nothing has been said yet.", label="no conversation")


class Page:
    """Builds the page of an engine.

    Args:
        sampling: initial values of the controls.
        system: the system message at first; None for none.
    """

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None):
        self._engine, self._sampling, self._system = engine, sampling, system
        self._layers = engine.run(lambda loaded: loaded.arch.layers)
        self._running: dict[str, Answering] = {}

    def build(self) -> gr.Blocks:
        """Builds the page; `PageServer` serves it."""
        names = list(self._engine.names)
        with gr.Blocks(title="finetune chat", analytics_enabled=False) as page:
            turns, seen, texts = gr.State([]), gr.State([]), gr.State([])
            gr.HTML(head(self._engine.model_path))
            with gr.Row():
                left = gr.Dropdown(names, value=names[0], label="Model")
                beside_it = [("nobody", NOBODY), *((name, name) for name in names)]
                right = gr.Dropdown(beside_it, value=names[1] if len(names) > 1 else NOBODY, label="Beside it")
            with gr.Row():
                with gr.Column(min_width=_SIDE):
                    left_chat = gr.HTML(_EMPTY, elem_id="left", **_CHAT)
                with gr.Column(min_width=_SIDE, visible=len(names) > 1) as beside:
                    right_chat = gr.HTML(_EMPTY, elem_id="right", **_CHAT)
            refused = gr.HTML(elem_id="refused", visible=False)
            box = gr.Textbox(
                label="Question", placeholder="Enter sends, Shift+Enter starts a new line", lines=1, max_lines=8
            )
            with gr.Row():
                send = gr.Button("Send", variant="primary", min_width=100)
                stop = gr.Button("Stop", variant="stop", min_width=100, interactive=False)
                reset = gr.Button("New conversation", min_width=180)
            settings = self._settings()
            with gr.Accordion("Experts by token", open=True):
                with gr.Row():
                    with gr.Column(min_width=_SIDE):
                        wanted = gr.Checkbox(True, label="Colour the conversation after each answer")
                    with gr.Column(min_width=_SIDE):
                        layer = gr.Slider(0, self._layers - 1, value=0, step=1, label="Layer")
                experts = gr.HTML(elem_id="experts")
                with gr.Row():
                    with gr.Column(min_width=_SIDE):
                        left_text = gr.HTML(elem_id="left-text")
                    with gr.Column(min_width=_SIDE):
                        right_text = gr.HTML(elem_id="right-text")

            quiet: dict[str, Any] = {
                "concurrency_limit": None,
                "show_progress": "hidden",
                "api_visibility": "private",
            }
            buttons, chats, shown = [send, stop, reset], [left_chat, right_chat], [experts, left_text, right_text]
            answer = gr.on(
                [send.click, box.submit],
                self._answer,
                [box, turns, left, right, *settings],
                [box, turns, *chats, refused, seen, *buttons],
                **quiet,
            )
            answer.then(_idle, None, buttons, **quiet).then(self._look, [seen, texts, wanted], texts, **quiet).then(
                _colour, [texts, layer], shown, **quiet
            )
            stop.click(self._stop, None, None, queue=False, **quiet)
            reset.click(_forget, None, [turns, *chats, refused, seen, texts, *shown], **quiet)
            wanted.change(self._look, [seen, texts, wanted], texts, **quiet).then(
                _colour, [texts, layer], shown, **quiet
            )
            layer.change(_colour, [texts, layer], shown, trigger_mode="always_last", **quiet)
            right.change(lambda name: gr.update(visible=name != NOBODY), right, beside, **quiet)
            page.unload(self._stop)
        return page

    def stop_all(self) -> None:
        """Stops every running answer."""
        for running in list(self._running.values()):
            running.cancel()

    def _settings(self) -> list[gr.components.Component]:
        """The controls, in the order in which `_answer` takes them."""
        start = self._sampling
        with gr.Accordion("Settings", open=False):
            system = gr.Textbox(self._system or "", label="System message", lines=1, max_lines=4)
            with gr.Row():
                temperature = gr.Slider(0, 2, value=start.temperature, step=0.05, label="Temperature")
                top_p = gr.Slider(0.01, 1, value=start.top_p, step=0.01, label="Top p")
                min_p = gr.Slider(0, 0.99, value=start.min_p, step=0.01, label="Min p")
                penalty = gr.Slider(0.5, 2, value=start.repetition_penalty, step=0.01, label="Repetition penalty")
            with gr.Row():
                top_k = gr.Number(start.top_k, precision=0, label="Top k (0: all)")
                seed = gr.Number(start.seed, precision=0, label="Seed")
                most = gr.Number(start.max_new_tokens, precision=0, label="Max new tokens")
        return [system, most, temperature, top_p, top_k, min_p, penalty, seed]

    def _answer(
        self,
        question: str,
        turns: list[Turn],
        left: str,
        right: str,
        system: str,
        most: float | None,
        temperature: float | None,
        top_p: float | None,
        top_k: float | None,
        min_p: float | None,
        penalty: float | None,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Streams the answers; each yield updates the whole page."""
        idle = (gr.skip(), gr.skip(), gr.skip())
        models = [left] if right == NOBODY else [left, right]
        question, system_or_none = question.strip(), system.strip() or None
        if not question:
            yield (*[gr.skip()] * 6, *idle)
            return
        try:
            sampling = _sampling(most, temperature, top_p, top_k, min_p, penalty, seed)
            asked = requests_for(self._engine, turns, question, models, sampling, system_or_none)
            answering = Answering(self._engine, asked)
        except FinetuneError as error:
            yield (*[gr.skip()] * 4, gr.update(value=refusal(str(error)), visible=True), gr.skip(), *idle)
            return
        session, hidden = str(request.session_hash), gr.update(visible=False)
        self._running[session] = answering
        busy = (gr.update(interactive=False), gr.update(interactive=True), gr.update(interactive=False))
        try:
            for sides in answering.states(apart=_REDRAW):
                yield ("", gr.skip(), *self._chats(turns, question, sides), hidden, gr.skip(), *busy)
        finally:
            answering.cancel()
            self._running.pop(session, None)
        kept, left_over, note = turns, question, "the model said nothing, so the question is not kept"
        if any(side.text for side in sides):
            kept, left_over, note = [*turns, Turn(question, tuple(side.text.strip() for side in sides))], "", ""
        looked = [(str(side.request.model), [*side.request.ids, *side.tokens]) for side in sides]
        errors = [str(side.end.error) for side in sides if side.end is not None and side.end.error is not None]
        note = "\n".join([*dict.fromkeys(errors), *([note] if note else [])])
        said = gr.update(value=refusal(note), visible=bool(note))
        yield (left_over, kept, *self._chats(kept, None, sides), said, looked, *busy)

    def _stop(self, request: gr.Request) -> None:
        running = self._running.get(str(request.session_hash))
        if running is not None:
            running.cancel()

    def _look(
        self, seen: list[tuple[str, list[int]]], texts: list[tuple[str, Routed]], wanted: bool
    ) -> list[tuple[str, Routed]]:
        """The routing of what the models saw last; `texts` where it is known already, none of an engine that failed."""
        if not wanted or self._engine.failure is not None:
            return []
        if [(model, text.ids) for model, text in texts] == seen:
            return texts
        return [(model, routed(self._engine, ids, model)) for model, ids in seen]

    def _chats(self, turns: Sequence[Turn], question: str | None, sides: Sequence[Answer]) -> tuple[Any, Any]:
        """The two chats; the second is left unchanged when only one model answers."""
        made: list[Any] = []
        for number, side in enumerate(sides):
            messages = history(turns, number, None).messages(question)
            if question is not None and side.text:
                messages.append({"role": "assistant", "content": side.text})
            made.append(chat_text(messages, summary(self._engine, side), label=str(side.request.model)))
        return made[0], made[1] if len(made) > 1 else gr.skip()


def _sampling(*values: float | None) -> Sampling:
    """The sampling of the controls, in the order of NAMES.

    Raises:
        DataError: a control is empty, or its value is outside its range.
    """
    given = dict(zip(NAMES, values, strict=True))
    for name, value in given.items():
        if value is None:
            raise DataError(f"{name} is empty", where=name, allowed="a number", fix="fill it in")
    return Sampling(**given)  # type: ignore[arg-type]


def _colour(texts: list[tuple[str, Routed]], layer: int) -> tuple[str, str, str]:
    """The legend and the coloured texts for one layer."""
    if not texts:
        return "", "", ""
    shown = [coloured_text(text, layer, model=model) for model, text in texts]
    return legend(texts[0][1].experts, texts, layer), shown[0], shown[1] if len(shown) > 1 else ""


def _idle() -> tuple[Any, Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False), gr.update(interactive=True)


def _forget() -> tuple[Any, ...]:
    return [], _EMPTY, _EMPTY, gr.update(visible=False), [], [], "", "", ""
