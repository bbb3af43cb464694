"""Conversations that are written as one text: ChatML, Mistral's and Llama 2's [INST], `### Human:`.

Why: many sets hold a conversation as a chat template wrote it, for another model's tokens. How: the text is taken apart
at the marks, and only marks where the format puts them count: a `</s>` in the middle of an answer is what somebody
typed, and stays text. What is not the format from its beginning to its end is refused. A beginning or end of sequence
around the whole is no text. Leaves out turns that call tools.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from finetune.data.rows import RowFault

TextForm = Literal["chatml_text", "inst_text", "human_text"]
Spoken = list[tuple[str, str]]  # (role, text)

_BEGIN = re.compile(r"\s*(?:<s>|<\|begin_of_text\|>|<\|startoftext\|>|<\|endoftext\|>|<bos>)?\s*")
_END = re.compile(r"\s*(?:</s>|<\|end_of_text\|>|<\|endoftext\|>|<eos>)?\s*\Z")
_CHATML_TURN = re.compile(r"\s*<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>\s*", re.DOTALL)
_HUMAN_MARK = re.compile(r"### (Human|Assistant):")
# An answer ends at a </s> that the next question or the end of the text follows; the last may lack it.
_EXCHANGE = re.compile(
    r"\s*(?:<s>\s*)?\[INST\](.*?)\[/INST\](.*?)(?:</s>\s*(?=<s>\s*\[INST\]|\[INST\]|\Z)|\Z)", re.DOTALL
)
_SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*(.*)\Z", re.DOTALL)
_SYSTEM_V7 = re.compile(r"\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", re.DOTALL)


def text_form(text: str) -> TextForm | None:
    """The form that a text seems to have, None for plain text."""
    return next((name for name, layout in _LAYOUTS.items() if layout.mark in text), None)


def spoken_in(text: str, form: TextForm, column: str) -> Spoken:
    """Roles and texts of the turns.

    Raises:
        RowFault: the text does not have the form.
    """
    begin = _BEGIN.match(text)
    assert begin is not None, "nothing is a beginning too"
    return _LAYOUTS[form].parse(text[begin.end() :], column)


def _chatml(text: str, column: str) -> Spoken:
    turns: Spoken = []
    position = 0
    while match := _CHATML_TURN.match(text, position):
        if "<|im_start|>" in match[2]:
            raise RowFault(f"a turn of `{column}` has no <|im_end|>")
        turns.append((match[1].strip(), match[2]))
        position = match.end()
    if not turns or not _END.match(text, position):
        raise RowFault(f"`{column}` is not ChatML from its beginning to its end")
    return turns


def _inst(text: str, column: str) -> Spoken:
    """White space beside a mark is not text."""
    turns: Spoken = []
    position = 0
    if system := _SYSTEM_V7.match(text):
        turns.append(("system", system[1].strip()))
        position = system.end()
    while match := _EXCHANGE.match(text, position):
        question, answer = match[1], match[2]
        if "[INST]" in question or "[INST]" in answer or "[/INST]" in answer:
            raise RowFault(f"[INST] or [/INST] in `{column}` stands where no turn begins or ends")
        if not turns and (told := _SYSTEM.match(question)):
            turns.append(("system", told[1].strip()))
            question = told[2]
        turns += [("user", question.strip()), ("assistant", answer.strip())]
        position = match.end()
    if not turns or position < len(text):
        raise RowFault(f"`{column}` is not [INST] ... [/INST] ...</s> from its beginning to its end")
    return turns


def _human(text: str, column: str) -> Spoken:
    """White space beside a mark is not text, and a last mark with nothing behind it is no turn."""
    text = _END.sub("", text)
    text = text.removesuffix("### Human:") if text.endswith(":") else text.removesuffix("### Human")
    before, *pieces = _HUMAN_MARK.split(text)
    if before or not pieces:
        raise RowFault(f"`{column}` does not begin with `### Human:`")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[speaker], content.strip()) for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)]


class _Layout(NamedTuple):
    mark: str
    parse: Callable[[str, str], Spoken]


_LAYOUTS: dict[TextForm, _Layout] = {
    "chatml_text": _Layout("<|im_start|>", _chatml),
    "inst_text": _Layout("[INST]", _inst),
    "human_text": _Layout("### Human:", _human),
}
