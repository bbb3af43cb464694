"""From a body's messages or prompt to token ids, in the forms that OpenAI's clients send.

Text stays text: a control token that somebody typed is not one (the engine's encoders see to that). Only a prompt of
token ids can hold control tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.data.messages import ROLES, ContentFault, text_of
from finetune.errors import DataError
from finetune.serve.refusal import Refusal

if TYPE_CHECKING:
    from finetune.infer.engine import Engine


def chat_ids(engine: Engine, messages: list[Any]) -> tuple[int, ...]:
    """Ids of a conversation that the assistant is to answer.

    Raises:
        Refusal: a message of another form, content other than text, an order that the template does not take.
    """
    if not messages:
        raise Refusal(400, "messages is empty; give at least one", param="messages")
    plain = [_message(message, f"messages.{number}") for number, message in enumerate(messages)]
    try:
        return engine.encode_chat(plain)
    except DataError as error:
        raise Refusal.of(error, "messages") from None


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} is not an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise Refusal(400, f"{where}.role is {role!r:.80}; allowed: {allowed}", param=f"{where}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise Refusal(400, f"{where}.{name} is not supported", param=f"{where}.{name}", code="unsupported_value")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    """The text, as training reads it."""
    try:
        return text_of(content)
    except ContentFault as fault:
        at = ".".join(str(step) for step in (where, fault.part, fault.key) if step is not None)
        message = f"{at}: {fault}; allowed: a string, or a list of parts of type text"
        code = "unsupported_value" if fault.key == "type" else None
        raise Refusal(400, message, param=at, code=code) from None


def prompt_ids(engine: Engine, prompt: Any) -> list[tuple[int, ...]]:
    """Ids of each prompt of: a text, several, token ids, several lists of them.

    Raises:
        Refusal: another form, or ids that the tokenizer does not have.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refusal(400, f"prompt is {_shown(prompt)}; {_FORMS}", param="prompt")
    if all(isinstance(one, str) for one in prompt):
        return [_text_ids(engine, text) for text in prompt]
    if all(type(one) is int for one in prompt):
        return [_checked(engine, prompt)]
    if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompt):
        return [_checked(engine, ids) for ids in prompt]
    raise Refusal(400, f"prompt is a mixed list; {_FORMS}", param="prompt")


_FORMS = "allowed: a text, a list of texts, a list of token ids, a list of such lists"


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else "null" if value is None else f"of type {type(value).__name__}"


def _text_ids(engine: Engine, text: str) -> tuple[int, ...]:
    try:
        return engine.encode_text(text)
    except DataError as error:
        raise Refusal.of(error, "prompt") from None


def _checked(engine: Engine, ids: list[int]) -> tuple[int, ...]:
    size = len(engine.tokenizer)
    for token in (min(ids), max(ids)):
        if not 0 <= token < size:
            raise Refusal(400, f"prompt holds the token id {token}; allowed: 0 to {size - 1}", param="prompt")
    return tuple(ids)
