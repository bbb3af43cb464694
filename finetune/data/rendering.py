"""Conversations through a chat template, with the template's control tokens told from those that somebody typed.

Why: a template gives one string, and nothing in it says whose `</s>` is whose. How: a control token spelled out in a
message has its characters replaced by stand-ins before the template sees it, one for one, so that the bounds of
`{% generation %}` blocks hold. What is a control token in the rendered text is then the template's. As a check, the
template must write the same control tokens around messages of one harmless character. Without markers, an assistant's
span is what the template adds to the prompt once it has the answer; where that cannot be proven, it is refused.

Our own templates are known to place texts as they are. They are rendered once for each sequence of roles and filled in
after that: about 7 us a conversation instead of 100 (2,000 bundled conversations of 46 tokens, one core).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.data.forms import cut_from, template_leaves_out
from finetune.data.messages import REASONING, besides, tools_as_text
from finetune.data.rows import Turns

T = TypeVar("T")


def _own(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL_V1, MISTRAL_V3, CHATML = map(_own, ("mistral_v1", "mistral_v3", "chatml"))
# For tokenizers that put no space before the text after a control token, as Mistral's own do: the template puts it.
MISTRAL_V1_SPACED = MISTRAL_V1.replace("{{- '[INST] ' -}}", "{{- ' [INST] ' -}}")
MISTRAL_V3_SPACED = MISTRAL_V3.replace("{%- set lead = '' -%}", "{%- set lead = ' ' -%}")
_STRIPS_ANSWERS = {
    **dict.fromkeys((MISTRAL_V1, MISTRAL_V1_SPACED, CHATML), False),
    **dict.fromkeys((MISTRAL_V3, MISTRAL_V3_SPACED), True),
}
OWN_WRITE_NO_TOOLS = "mistral-v1, mistral-v3 and chatml write no tools"
# As transformers looks for it before it warns that the mask will be empty.
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE = range(0xF0000, 0x110000)  # planes 15 and 16: no character there has a meaning
_MARKS = range(0xE000, 0xF900)  # nor in this range, whose characters are in no alias
# What is kept of conversations of the same shape, so that nobody fills the memory with ever new shapes.
_KEPT_SHAPES, _KEPT_MESSAGES = 1024, 64


@dataclass(frozen=True)
class Rendered:
    """Text, control token, text, control token, ..., text; and the assistant's [start, end) in their concatenation.

    `cut` names what of the messages is not in it.
    """

    pieces: list[str]
    spans: Spans
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Form:
    """A rendered conversation with its texts left out.

    `pieces` are those of `Rendered`, the texts among them in parts: literals, and numbers of messages. A bound is a
    position in the literals, and the number of messages that have been placed before it.
    """

    pieces: list[list[str | int]]
    order: list[int]
    bounds: list[tuple[int, int]]

    def fill(self, texts: Sequence[str]) -> Rendered:
        """Puts the texts of a conversation in."""
        pieces = ["".join([part if isinstance(part, str) else texts[part] for part in parts]) for parts in self.pieces]
        placed = [0]
        for message in self.order:
            placed.append(placed[-1] + len(texts[message]))
        bounds = [position + placed[count] for position, count in self.bounds]
        return Rendered(pieces, list(zip(bounds[::2], bounds[1::2], strict=True)))


def _cut(messages: Turns, text: str) -> tuple[str, ...]:
    found = [cut_from(message["role"], message["content"], text) for message in messages]
    found += [cut_from(key, message[key], text) for message in messages for key in REASONING if key in message]
    return tuple(dict.fromkeys(filter(None, found)))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a template gets it."""
    return {"role": message["role"], "content": message["content"], **besides(message)}


class Renderer:
    """One chat template with the control tokens of one tokenizer.

    Args:
        template: Jinja source.
        names: what the template may call control tokens, `bos_token` for example.
        specials: every control token.
    """

    def __init__(self, template: str, names: dict[str, Any], specials: Iterable[str]) -> None:
        self._template, self._names = template, names
        self._no_tools = f"; {OWN_WRITE_NO_TOOLS}" if template in _STRIPS_ANSWERS else ""
        self._is_marked = GENERATION_MARKER.search(template) is not None
        # The longest first, as tokenizers match them. The group makes `split` keep what it splits at.
        self._special = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
        self._controls: dict[tuple[object, ...], list[str]] = {}
        self._forms: dict[tuple[object, ...], _Form] = {}

    def render(self, messages: Turns, *, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation. A prompt (`add_generation_prompt`) has spans only where the template is marked.

        Raises:
            TemplateRefusal: see there.
        """
        try:
            if (
                self._template in _STRIPS_ANSWERS
                and len(messages) < len(PRIVATE)
                and not any(map(tools_as_text, messages))
            ):
                return self._fill_form(messages, add_generation_prompt)
            return self.render_by_template(messages, add_generation_prompt=add_generation_prompt)
        except TemplateSyntaxError as fault:
            raise TemplateRefusal(f"the chat template is not Jinja: {fault.message}, line {fault.lineno}") from None
        except TemplateError as fault:
            if not any("tool_calls" in message for message in messages):
                raise TemplateRefusal(f"the chat template refuses a conversation: {fault}") from None
            what = f"the chat template refuses a conversation with tools: {fault}"
            raise TemplateRefusal(what + self._no_tools) from None

    def render_unfinished(self, messages: Turns) -> Rendered:
        """Renders a conversation up to the end of the last message's text, which is to go on; without spans.

        A mark behind that text says where it ends in what the template writes, which also keeps a space at its end.

        Raises:
            TemplateRefusal: see `render`; or the last message is written twice, or not at all.
        """
        taken = set(self._template).union(*_strings(list(messages)))
        mark = next((char for char in map(chr, _MARKS) if char not in taken), None)
        if mark is None:
            raise TemplateRefusal("a conversation uses every private character of Unicode's first plane")
        last = {**messages[-1], "content": messages[-1]["content"] + mark}
        pieces = self.render([*messages[:-1], last], add_generation_prompt=True).pieces
        at = [number for number, piece in enumerate(pieces) if mark in piece]
        if len(at) != 1 or pieces[at[0]].count(mark) != 1:
            raise TemplateRefusal("the chat template does not write the last message once, so it cannot go on")
        return Rendered([*pieces[: at[0]], pieces[at[0]].partition(mark)[0]], [])

    def render_by_template(self, messages: Turns, *, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation by any template; the truth that a form must agree with.

        Raises:
            TemplateError: the template refuses the conversation.
            TemplateRefusal: the template makes control tokens of the text of messages, or has no markers and the
                assistant's text cannot be told.
        """
        hidden, shown = self._hide(messages)
        text, spans = self._run(hidden, add_generation_prompt)
        cut = _cut(hidden, text)
        if any(map(tools_as_text, messages)) or any(message["role"] == "tool" for message in messages):
            cut = (*cut, *self._left_out(hidden, text, add_generation_prompt))
        pieces = self._special.split(text)
        controls, expected = pieces[1::2], self._controls_around(hidden, add_generation_prompt)
        if controls != expected:
            raise TemplateRefusal(
                "the chat template makes control tokens out of the text of messages: "
                f"{' '.join(controls) or 'none'} instead of {' '.join(expected) or 'none'}"
            )
        if not self._is_marked and not add_generation_prompt:
            spans = derive_spans(lambda part, prompt: self._run(part, prompt)[0], hidden, text)
        spans = [self._to_its_end(text, *span) for span in spans]
        if shown:
            pieces[::2] = [piece.translate(shown) for piece in pieces[::2]]
        return Rendered(pieces, spans, cut)

    def _left_out(self, messages: Turns, text: str, add_generation_prompt: bool) -> Iterator[str]:
        """Names the tools that the template does not write; found by leaving them out.

        Raises:
            TemplateRefusal: it does not write calls of tools or what they answered, without which the rest is nonsense.
        """

        def changes(without: Turns) -> bool:
            try:
                return self._run(without, add_generation_prompt)[0] != text
            except (TemplateError, TemplateRefusal):
                return True  # it missed them

        first, *rest = messages
        if "tools" in first and not changes([{key: first[key] for key in first if key != "tools"}, *rest]):
            yield template_leaves_out("`tools`")
        uncalled = [{key: m[key] for key in m if key != "tool_calls"} for m in messages]
        unanswered = [{**m, "content": HARMLESS} if m["role"] == "tool" else m for m in messages]
        for what, without in (("calls of tools", uncalled), ("what tools answer", unanswered)):
            if without != list(messages) and not changes(without):
                fix = f"choose a data.template that does{self._no_tools}"
                raise TemplateRefusal(f"the chat template does not write {what}; {fix}")

    def _run(self, messages: Turns, add_generation_prompt: bool) -> tuple[str, Spans]:
        tools = messages[0].get("tools") if messages else None
        try:
            rendered: Any = render_jinja_template(
                conversations=[[_plain(message) for message in messages]],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as fault:
            # What its expressions raise: `1 / 0`, or a text plus a number.
            raise TemplateRefusal(f"the chat template fails: {type(fault).__name__}: {fault}") from None
        texts, spans = rendered
        return texts[0], spans[0] if self._is_marked else []

    def _to_its_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A turn up to the control token that ends it: the new line that many templates write after it is nobody's."""
        last = None
        for last in self._special.finditer(text, start, end):  # noqa: B007
            pass
        return (start, last.end()) if last is not None and text[last.end() : end].isspace() else (start, end)

    def _hide(self, messages: Turns) -> tuple[Turns, dict[int, str]]:
        """The messages without control tokens, and what each stand-in character is for."""
        plain = [{**_plain(m), **({"tools": m["tools"]} if "tools" in m else {})} for m in messages]
        typed = list(_strings(plain))
        if not any(map(self._special.search, typed)):
            return plain, {}
        hidden = sorted({char for text in typed for special in self._special.findall(text) for char in special})
        taken = set(self._template).union(*typed)
        stand_ins = [char for char in map(chr, PRIVATE) if char not in taken][: len(hidden)]
        if len(stand_ins) < len(hidden):
            raise TemplateRefusal("a conversation uses every character of Unicode's private planes")
        hide = dict(zip(map(ord, hidden), stand_ins, strict=True))
        without = _each_string(lambda text: self._special.sub(lambda match: match[0].translate(hide), text), plain)
        return without, {ord(stand_in): chr(char) for char, stand_in in hide.items()}

    def _controls_around(self, messages: Turns, add_generation_prompt: bool) -> list[str]:
        """The control tokens that the template writes around such messages: the same roles, the same emptiness."""
        shapes = [
            (m["role"], HARMLESS if m["content"].strip() else m["content"][:1], tools_as_text(m)) for m in messages
        ]
        key = (add_generation_prompt, *shapes)
        found = self._controls.get(key)
        if found is None:
            alike = [{**m, "content": content} for m, (_, content, _) in zip(messages, shapes, strict=True)]
            found = self._special.findall(self._run(alike, add_generation_prompt)[0])
            _keep(self._controls, key, found)
        return found

    def _fill_form(self, messages: Turns, add_generation_prompt: bool) -> Rendered:
        strips = _STRIPS_ANSWERS[self._template]
        texts = [m["content"].rstrip(" ") if strips and m["role"] == "assistant" else m["content"] for m in messages]
        roles = [m["role"] for m in messages]
        key = (add_generation_prompt, *roles, *map(bool, texts))
        form = self._forms.get(key)
        if form is None:
            form = self._make_form(roles, texts, add_generation_prompt)
            _keep(self._forms, key, form)
        filled = form.fill(texts)
        if strips and any(len(text) < len(m["content"]) for text, m in zip(texts, messages, strict=True)):
            return replace(filled, cut=_cut(messages, "".join(filled.pieces)))
        return filled

    def _make_form(self, roles: list[str], texts: list[str], add_generation_prompt: bool) -> _Form:
        """Renders one private character in place of every text, and remembers where it went."""
        places = [chr(PRIVATE.start + number) if text else "" for number, text in enumerate(texts)]
        alike = [{"role": role, "content": place} for role, place in zip(roles, places, strict=True)]
        text, spans = self._run(alike, add_generation_prompt)
        number_of = {place: number for number, place in enumerate(places) if place}
        order = [number_of[char] for char in text if char in number_of]
        assert len(set(order)) == len(order), "no text is placed twice"
        if left_out := set(number_of.values()) - set(order):
            raise TemplateRefusal(f"the chat template does not write message {min(left_out) + 1}")
        place_pattern = re.compile(f"([{chr(PRIVATE.start)}-{chr(PRIVATE.stop - 1)}])")
        pieces: list[list[str | int]] = [
            [number_of.get(part, part) for part in place_pattern.split(piece)] for piece in self._special.split(text)
        ]
        placed = [0, *accumulate(char in number_of for char in text)]
        return _Form(pieces, order, [(bound - placed[bound], placed[bound]) for span in spans for bound in span])


def _strings(value: Any) -> Iterator[str]:
    """Every string in it, keys of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _each_string(change: Callable[[str], str], value: Any) -> Any:
    """The same with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_each_string(change, key): _each_string(change, inner) for key, inner in value.items()}
    return [_each_string(change, inner) for inner in value] if isinstance(value, list | tuple) else value


def _keep(kept: dict[tuple[object, ...], T], shape: tuple[object, ...], made: T) -> None:
    if len(shape) <= 2 * _KEPT_MESSAGES:
        if len(kept) >= _KEPT_SHAPES:
            kept.clear()
        kept[shape] = made


# ---- the spans of a template without markers ------------------------------------------------------------------------


Spans = list[tuple[int, int]]
HARMLESS = "\ue000"  # a private character, which no template looks for


class TemplateRefusal(Exception):
    """The template does not take a conversation, or it cannot be told what in its output is whose."""


class Render(Protocol):
    """Messages to text."""

    def __call__(self, messages: Turns, add_generation_prompt: bool, /) -> str: ...


def derive_spans(render: Render, messages: Turns, whole: str) -> Spans:
    """[start, end) in `whole`, the rendered conversation, of every assistant turn.

    Raises:
        TemplateRefusal: what an assistant turn wrote cannot be proven.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(messages[:number], True), render(messages[: number + 1], False)
        if not answered.startswith(asked):
            raise _unproven(number, "its prompt is not how the conversation with the answer begins")
        if not whole.startswith(answered):
            raise _unproven(number, "what comes after it changes how it is written")
        if asked == render(messages[:number], False):
            header = _header(render, messages[: number + 1], asked)
            if header:
                raise _unproven(number, f"{header!r} stands before the answer and is not in the generation prompt")
        spans.append((len(asked), len(answered)))
    return spans


def _header(render: Render, messages: Turns, asked: str) -> str:
    """What the template writes before the text of the last message, besides spaces."""
    alike = render([*messages[:-1], {**messages[-1], "content": HARMLESS}], False)
    return alike.partition(HARMLESS)[0][len(asked) :].strip()


def _unproven(number: int, why: str) -> TemplateRefusal:
    return TemplateRefusal(
        "the chat template has no generation markers, and what the assistant says in message "
        f"{number + 1} cannot be told from the prompt: {why}"
    )
