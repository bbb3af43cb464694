"""How each form holds its turns: one row in, its turns out, still unchecked.

Why: seven layouts are in use for the same thing, and what is wrong with a conversation is the same in all of them. How:
`turns_of` only finds the turns, so that the checks (forms.py) and the repairs (check/fix.py) are written once. A text
that a chat template wrote (ChatML, Mistral's and Llama 2's [INST], `### Human:`) is taken apart only at marks where the
format puts them: a `</s>` in the middle of an answer is what somebody typed. Faults name the user's columns. Leaves out
what makes a turn usable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from finetune.data.messages import BESIDES, decoded, kind, tools_of
from finetune.data.rows import Role, RowFault

TextForm = Literal["chatml_text", "inst_text", "human_text"]
FormName = Literal["messages", "sharegpt", "prompt_completion", "alpaca"] | TextForm


@dataclass(frozen=True)
class Form:
    """How the rows of a source are to be read.

    Attributes:
        columns: our name for a column, or a key of a turn, to the user's.
        roles: every role name that the rows may use, to ours; see `known_role`.
    """

    name: FormName
    columns: Mapping[str, str]
    roles: Mapping[str, Role]

    @cached_property
    def read(self) -> frozenset[str]:
        """The columns of a row that this form reads."""
        return frozenset(own for column, own in self.columns.items() if column not in ("role", "content", "train"))

    def known_role(self, name: str) -> Role | None:
        """Ours for a role's name as it is, or else for its name in small letters."""
        return self.roles.get(name) or self.roles.get(name.strip().lower())


class Turn(NamedTuple):
    """A turn as it was found.

    `train` is False where the row says so, `unread` holds keys that nobody reads, `besides` those that only a template
    does, as they were found; `tools` stands at the first turn.
    """

    role: Any
    content: Any
    train: bool = True
    unread: Mapping[str, Any] | None = None
    besides: Mapping[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


_CALLS = ("function_call", "tool_call")  # names of a role whose content is a call, in ShareGPT's form
# Keys in use for "learn this turn", 0 or 1: axolotl (train, training, train_on_turn), OpenAI and mistral-finetune
# (weight), ms-swift (loss), slime (step_loss_mask), others; and for "leave it out": torchtune (masked). A plain `mask`
# is used both ways, so it is not read but named.
_LEARN = frozenset(("train", "training", "train_on_turn", "trainable", "weight", "loss", "loss_mask", "step_loss_mask"))
_LEAVE_OUT = frozenset(("masked",))


def turns_of(row: Any, form: Form) -> list[Turn]:
    """The turns of a row in its order.

    Raises:
        RowFault: the row does not have the form.
    """
    if not isinstance(row, Mapping):
        raise RowFault(f"the row is {kind(row)}, not a mapping")
    if form.name == "messages" or form.name == "sharegpt":
        return _with_tools(row, form, _with_system(row, form, _list_turns(row, form, "messages")))
    if form.name == "prompt_completion":
        prompt = [turn._replace(train=False) for turn in _text_or_turns(row, form, "prompt", "user")]
        turns = [*prompt, *_text_or_turns(row, form, "completion", "assistant")]
        return _with_tools(row, form, _with_system(row, form, turns))
    if form.name == "alpaca":
        return _with_system(row, form, list(_alpaca_turns(row, form)))
    text = _required(row, form, "text")
    if not isinstance(text, str):
        raise RowFault(f"`{form.columns['text']}` is {kind(text)}, not a string")
    return [Turn(role, said) for role, said in spoken_in(text, form.name, form.columns["text"])]


# ---- forms with a list of turns -------------------------------------------------------------------------------------


def _list_turns(row: Mapping[str, Any], form: Form, column: str) -> list[Turn]:
    name = form.columns[column]
    value = listed(decoded(_required(row, form, column), f"`{name}` is"))
    if not isinstance(value, list):
        raise RowFault(f"`{name}` is {kind(value)}, not a list")
    if not value:
        raise RowFault(f"`{name}` is empty")
    return [_turn(item, form) for item in value]


def listed(value: Any) -> Any:
    """Turns that are kept as lists of roles, of contents and so on, as `datasets` does it, one by one."""
    if not isinstance(value, Mapping):
        return value
    columns = {key: of_key for key, of_key in value.items() if of_key is not None}
    if not columns or not all(isinstance(of_key, list) for of_key in columns.values()):
        return value
    if len({len(of_key) for of_key in columns.values()}) > 1:
        raise RowFault(f"{' and '.join(f'`{key}`' for key in columns)} are lists of different lengths")
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _turn(item: Any, form: Form) -> Turn:
    role, content = form.columns["role"], form.columns["content"]
    if isinstance(item, Mapping) and item.get(role) in _CALLS and form.known_role(item[role]) is None:
        item = {**item, role: "assistant", content: None, "tool_calls": item.get(content)}
    if not isinstance(item, Mapping) or role not in item:
        raise RowFault(f"a turn is not a mapping with `{role}` and `{content}`")
    if len(item) == 2 and content in item:
        return Turn(item[role], item[content])
    if item.get("function_call"):
        raise RowFault("a turn has a `function_call`; write it as `tool_calls`: [{function: {name, arguments}}]")
    if content not in item and not item.get("tool_calls"):
        raise RowFault(f"a turn is not a mapping with `{role}` and `{content}`")
    own = form.columns.get("train")
    learn, leave_out = (_LEARN, _LEAVE_OUT) if own is None else (frozenset((own,)), frozenset[str]())
    flags, unread, besides = {}, {}, {}
    known = form.known_role(item[role]) if isinstance(item[role], str) else None
    for key, value in item.items():
        if value is None or key in (role, content):
            continue
        if key in learn:
            flags[key] = _flag(key, value)
        elif key in leave_out:
            flags[key] = not _flag(key, value)
        elif value in ("", [], {}):
            continue
        elif key in BESIDES.get(known or "assistant", ()):
            besides[key] = value
        else:
            unread[str(key)] = value
    if len(set(flags.values())) > 1:
        raise RowFault(f"{' and '.join(f'`{key}`' for key in flags)} of a turn disagree")
    said = item.get(content)
    if said is None and "tool_calls" in besides:
        said = ""
    return Turn(item[role], said, all(flags.values()), unread or None, besides or None)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise RowFault(f"a turn's `{key}` is neither 0 nor 1")
    return bool(value)


def _text_or_turns(row: Mapping[str, Any], form: Form, column: str, role: str) -> list[Turn]:
    value = _required(row, form, column)
    return [Turn(role, value)] if isinstance(value, str) else _list_turns(row, form, column)


def _with_system(row: Mapping[str, Any], form: Form, turns: list[Turn]) -> list[Turn]:
    """The turns with the system prompt of a column of its own in front."""
    if "system" not in form.columns:
        return turns
    system = row.get(form.columns["system"])
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise RowFault(f"`{form.columns['system']}` is {kind(system)}, not a string")
    first = turns[0]
    if isinstance(first.role, str) and form.known_role(first.role) == "system":
        if first.content != system:
            raise RowFault(f"`{form.columns['system']}` and the system message differ")
        return turns
    return [Turn("system", system), *turns]


def _with_tools(row: Mapping[str, Any], form: Form, turns: list[Turn]) -> list[Turn]:
    """The turns with the tools of a column of its own at the first."""
    name = form.columns["tools"]
    tools = tools_of(row.get(name), name)
    return [turns[0]._replace(tools=tools), *turns[1:]] if tools else turns


# ---- Alpaca ---------------------------------------------------------------------------------------------------------


def _alpaca_turns(row: Mapping[str, Any], form: Form) -> Iterator[Turn]:
    for question, answer in _history(row, form):
        yield Turn("user", question)
        yield Turn("assistant", answer)
    instruction, output = _required(row, form, "instruction"), _required(row, form, "output")
    extra = row.get(form.columns["input"])
    if extra is not None and not isinstance(extra, str):
        raise RowFault(f"`{form.columns['input']}` is {kind(extra)}, not a string")
    if extra and isinstance(instruction, str):
        instruction = f"{instruction}\n\n{extra}" if instruction else extra
    yield Turn("user", instruction)
    yield Turn("assistant", output)


def _history(row: Mapping[str, Any], form: Form) -> list[list[Any]]:
    """Earlier exchanges, as LLaMA-Factory has them: a list of [question, answer]."""
    name = form.columns["history"]
    value = decoded(row.get(name), f"`{name}` is")
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RowFault(f"`{name}` is not a list of [question, answer]")
    return value


def _required(row: Mapping[str, Any], form: Form, column: str) -> Any:
    value = row.get(form.columns[column])
    if value is None:
        raise RowFault(f"`{form.columns[column]}` is missing")
    return value


# ---- conversations that are written as one text ---------------------------------------------------------------------


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
