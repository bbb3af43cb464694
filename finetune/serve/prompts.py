"""From a body's messages or prompt to token ids, in the forms that OpenAI's clients send.

Text stays text: a control token that somebody typed is not one (the engine's encoders see to that). Only a prompt of
token ids can hold control tokens.

What cannot fit is refused before it is encoded, where its length alone says so: no token has more characters than the
longest one of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.data import ROLES, ContentFault, text_of
from finetune.errors import DataError
from finetune.serve.fields import MESSAGE_HARMLESS, MESSAGE_REFUSED, PART_HARMLESS, refuse_extras
from finetune.serve.refusal import Refusal

if TYPE_CHECKING:
    from finetune.infer import Engine

_FORMS = "allowed: a text, a list of texts, a list of token ids, a list of such lists"


class Prompts:
    """Makes the prompts of requests to one of an engine's models, each of which has its tokenizer and template."""

    def __init__(self, engine: Engine, model: str | None):
        self._engine, self._model = engine, model
        self._longest_token = max(map(len, engine.tokenizer_of(model).get_vocab()))

    def of_messages(self, messages: list[Any], *, continues: bool) -> tuple[tuple[int, ...], bool]:
        """Ids of a conversation that the assistant is to answer; and whether it goes on in a text of its own.

        Raises:
            Refusal: a message of another form, content other than text, an order that the template does not take, too
                many tokens.
        """
        plain = [_message(message, f"messages.{number}") for number, message in enumerate(messages)]
        self._require_fewer_characters(sum(len(message["content"]) for message in plain), "messages")
        if continues and not plain[-1]["content"] and len(plain) > 1:
            plain.pop()  # nothing to go on from
            continues = False
        try:
            ids = self._engine.encode_chat(plain, self._model, continues=continues)
        except DataError as error:
            raise Refusal.of(error, "messages") from None
        return self._fitting(ids, "messages"), continues

    @staticmethod
    def forms(prompt: Any) -> list[str] | list[list[int]]:
        """The prompts of: a text, several, token ids, several lists of them.

        Raises:
            Refusal: another form.
        """
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise Refusal(400, f"prompt is {_shown(prompt)}; {_FORMS}", param="prompt")
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if all(type(one) is int for one in prompt):
            return [prompt]
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompt):
            return prompt
        raise Refusal(400, f"prompt is a mixed list; {_FORMS}", param="prompt")

    def of_completion(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Ids of one prompt.

        Raises:
            Refusal: too many tokens, or ids that the tokenizer does not have.
        """
        if isinstance(prompt, str):
            self._require_fewer_characters(len(prompt), "prompt")
            try:
                return self._fitting(self._engine.encode_text(prompt, self._model), "prompt")
            except DataError as error:
                raise Refusal.of(error, "prompt") from None
        ids = self._fitting(tuple(prompt), "prompt")
        size = len(self._engine.tokenizer_of(self._model))
        for token in (min(ids), max(ids)):
            if not 0 <= token < size:
                raise Refusal(400, f"prompt holds the token id {token!s:.20}; allowed: 0 to {size - 1}", param="prompt")
        return ids

    def _require_fewer_characters(self, characters: int, where: str) -> None:
        if characters > self._engine.max_length * self._longest_token:
            raise self._too_long(f"{characters} characters, of which no token has over {self._longest_token}", where)

    def _fitting(self, ids: tuple[int, ...], where: str) -> tuple[int, ...]:
        if len(ids) >= self._engine.max_length:  # one is for the answer
            raise self._too_long(f"{len(ids)} tokens", where)
        return ids

    def _too_long(self, has: str, where: str) -> Refusal:
        """In the words by which clients know that they have to shorten a conversation."""
        message = f"This model's maximum context length is {self._engine.max_length} tokens. However, your {where} "
        message += f"resulted in {has}. Please reduce the length of the {where}."
        return Refusal(400, message, param=where, code="context_length_exceeded")


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(400, f"{where} is not an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise Refusal(400, f"{where}.role is {role!r:.80}; allowed: {allowed}", param=f"{where}.role")
    extras = {name: value for name, value in message.items() if name not in ("role", "content")}
    refuse_extras(extras, MESSAGE_REFUSED, MESSAGE_HARMLESS, ("role", "content"), where=f"{where}.")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    """The text, as training reads it."""
    try:
        text = text_of(content)
    except ContentFault as fault:
        at = ".".join(str(step) for step in (where, fault.part, fault.key) if step is not None)
        message = f"{at}: {fault}; allowed: a string, or a list of parts of type text"
        code = "unsupported_value" if fault.key == "type" else None
        raise Refusal(400, message, param=at, code=code) from None
    for number, part in enumerate(content if isinstance(content, list) else ()):
        extras = {name: value for name, value in part.items() if name not in ("type", "text")}
        refuse_extras(extras, {}, PART_HARMLESS, ("type", "text"), where=f"{where}.{number}.")
    return text


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else "null" if value is None else f"of type {type(value).__name__}"
