"""A message: its role, its text, what it calls. One rule for training, checks, serving, chat and generation.

Why: a conversation that is written one way in training and another way in serving is two conversations. How: text parts
are joined by a blank line and empty ones left out, as mistral-common does up to its tokenizer v13 (`normalize.py`,
`_aggregate_content_chunks`); v15 joins them by nothing. Tools become what transformers' `apply_chat_template`
documents: {type: function, function: schema}, and calls {type: function, id, function: {name, arguments}} with the
arguments as an object. Leaves out content other than text, and calls inside the text of an answer, which are text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.data.rows import Role, RowFault

# As clients and data sets write them; `developer` is OpenAI's newer name for what a template calls the system.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}

SYSTEM_COLUMNS = ("system_prompt", "system")  # names in use for a column with the system prompt


class ContentFault(RowFault):
    """What is wrong with a message's content, `part` of it where it is a list, or `key` of that part."""

    def __init__(self, reason: str, part: int | None = None, key: str | None = None) -> None:
        super().__init__(reason)
        self.part, self.key = part, key


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of type text.

    Raises:
        ContentFault: it is something else; the texts are few, so that faults of many rows group.
    """
    if isinstance(content, list):
        texts = [_text_of_part(part, number) for number, part in enumerate(content)]
        content = "\n\n".join(text for text in texts if text)
    if not isinstance(content, str):
        raise ContentFault(f"the content of a turn is {kind(content)}, not a string")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: neither Arrow nor a tokenizer takes it
            raise ContentFault("the content of a turn is not valid Unicode (a lone surrogate)") from None
    return content


def _text_of_part(part: Any, number: int) -> str:
    if not isinstance(part, Mapping):
        reason = f"the content of a turn is a list with {kind(part)} in it, not a string or text parts"
        raise ContentFault(reason, number)
    if part.get("type") != "text":
        reason = f"the content of a turn has a part of type {shortened(part.get('type'))}; only text is taken"
        raise ContentFault(reason, number, "type")
    if not isinstance(part.get("text"), str):
        raise ContentFault(f"the text of a content part is {kind(part.get('text'))}, not a string", number, "text")
    return part["text"]


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "a mapping", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def shortened(value: Any) -> str:
    """A value in a message: a string in quotes, its beginning if it is long; of anything else what it is."""
    if not isinstance(value, str):
        return kind(value)
    return repr(value if len(value) <= 40 else value[:40] + "...")  # repr escapes what does not print


def flow(mapping: Mapping[str, str]) -> str:
    """A mapping as one writes it in a recipe: `{prompt: question}`; names that YAML may misread stand in quotes."""
    pairs = (": ".join(word if word.isidentifier() else json.dumps(word) for word in pair) for pair in mapping.items())
    return f"{{{', '.join(pairs)}}}"


# ---- tools, calls and reasoning -------------------------------------------------------------------------------------


REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys of a turn that nobody but the chat template reads, by the role that has them; calls by another are a fault.
BESIDES: Mapping[Role, tuple[str, ...]] = {
    "system": ("tool_calls",),
    "user": ("tool_calls",),
    "assistant": ("tool_calls", *REASONING),
    "tool": ("tool_calls", "tool_call_id", "name"),
}


_PLAIN = frozenset(("role", "content", "train"))
_DEEPEST = 64  # a schema is a dozen deep; templates and their sandbox walk it by recursion


def tools_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The tools of a conversation, none where the value is empty.

    Args:
        value: a list of schemas, or JSON of one in a string.
        name: the column, for messages.

    Raises:
        RowFault: it is something else, or a tool has no name.
    """
    tools = decoded(value, f"`{name}` is")
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RowFault(f"`{name}` is {kind(tools)}, not a list of tools")
    return _writable([_tool(tool, name) for tool in tools], f"`{name}`")


def _tool(tool: Any, name: str) -> dict[str, Any]:
    flat = isinstance(tool, Mapping) and not isinstance(tool.get("function"), Mapping)
    schema = tool if flat else tool["function"] if isinstance(tool, Mapping) else None
    if not isinstance(schema, Mapping) or not _is_name(schema.get("name")):
        raise RowFault(f"`{name}` holds {kind(tool)} that does not name a function")
    return {"type": "function", "function": dict(schema)} if flat else dict(tool)


def calls_of(value: Any) -> list[dict[str, Any]]:
    """The calls of an assistant's turn, one or a list, or JSON of that in a string; none where the value is empty.

    Raises:
        RowFault: they are no list of calls, one has no name, or its arguments are no JSON object.
    """
    calls = decoded(value, "what a turn calls is")
    if not calls:
        return []
    if not isinstance(calls, list | Mapping):
        raise RowFault(f"the tool calls of a turn are {kind(calls)}, not a list of calls")
    return [_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise RowFault("a tool call does not name a function")
    arguments = decoded(function.get("arguments"), "the arguments of a tool call are")
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, Mapping):
        raise RowFault(f"the arguments of a tool call are {kind(arguments)}, not a JSON object")
    named = {"id": _id(call["id"])} if call.get("id") not in (None, "") else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": dict(arguments)}}


def besides_of(turn: Mapping[str, Any], role: Role) -> dict[str, Any]:
    """What a turn holds for the template besides its content: calls, whose answer it is, reasoning.

    Raises:
        RowFault: one of them is not what it should be.
    """
    found: dict[str, Any] = {}
    if calls := calls_of(turn.get("tool_calls")):
        if role != "assistant":
            raise RowFault(f"a turn of role {shortened(role)} calls tools")
        found["tool_calls"] = _writable(calls, "a tool call")
    for key in BESIDES[role][1:]:
        value = turn.get(key)
        if value in (None, ""):
            continue
        value = _id(value) if key == "tool_call_id" else value
        if not isinstance(value, str):
            raise RowFault(f"`{key}` of a turn is {kind(value)}, not a string")
        found[key] = _writable(value, f"`{key}` of a turn")
    return found


def _id(value: Any) -> Any:
    """The id of a call, which some write as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _writable(value: Any, what: str) -> Any:
    """The value, which a chat template writes as JSON for a tokenizer; a RowFault where one of the two cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(f"{what} is not valid Unicode (a lone surrogate)") from None
    except TypeError:  # Parquet has dates, bytes and decimals
        raise RowFault(f"{what} holds a value that JSON does not have") from None
    except RecursionError:
        raise RowFault(f"{what} is nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for each in level for inner in _inside(each)]
    if level:
        raise RowFault(f"{what} is nested deeper than {_DEEPEST} levels")
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def require_calls(conversation: Iterable[Mapping[str, Any]]) -> None:
    """Raises a RowFault for a tool's message that follows neither a call nor another tool's message."""
    called = False
    for message in conversation:
        if message["role"] == "tool" and not called:
            raise RowFault("a tool answers where nothing called it")
        called = message["role"] == "tool" or "tool_calls" in message


def besides(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a checked message holds besides role and content, without the tools of its conversation."""
    return {key: message[key] for key in BESIDES.get(message["role"], ()) if key in message}


def tools_as_text(message: Mapping[str, Any]) -> str:
    """The tools, calls and reasoning of a message as one text, the same for the same; empty where it has none."""
    if message.keys() <= _PLAIN:  # nearly every message, and this is asked of each
        return ""
    told = besides(message) | ({"tools": message["tools"]} if "tools" in message else {})
    return json.dumps(told, sort_keys=True, ensure_ascii=False) if told else ""


def is_said(message: Mapping[str, Any]) -> bool:
    """Whether a turn says or calls anything."""
    return bool(message["content"].strip()) or bool(besides(message))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def decoded(value: Any, told: str) -> Any:
    """The value of JSON in a string, as a CSV cell holds it; "" of a blank one, and any other value as it is.

    Raises:
        RowFault: the string is not JSON, or Python cannot read it; the text begins with `told`, "`tools` is" for
            example.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else ""
    except json.JSONDecodeError:
        reason = "a string that is not JSON"
    except RecursionError:
        reason = "JSON that is nested too deeply"
    except ValueError:
        reason = f"JSON with a number of more than {sys.get_int_max_str_digits():,} digits"
    raise RowFault(f"{told} {reason}")
