"""From the body of an HTTP request to requests to the engine, off the event loop: messages or prompts, in the forms
that OpenAI's clients send, become token ids.

Encoding is the one costly thing that a client can ask for before anything else limits it. Long bodies are encoded one
after the other on a thread of their own, so that short ones never wait for them. Not in processes: the tokenizer works
without the interpreter's lock, and the rest of the longest body that passes the bounds takes tenths of a second.

Text stays text: a control token that somebody typed is ordinary text (the engine's encoders make sure of it). Only a
prompt of token ids can hold control tokens.

A text that is certainly too long is refused before it is encoded: no token has more characters than the longest one of
the vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.data import (
    BESIDES,
    ROLES,
    ContentFault,
    RowFault,
    besides_of,
    require_calls,
    text_of,
    tools_as_text,
    tools_of,
)
from finetune.errors import DataError
from finetune.infer import Request
from finetune.serve.api_error import APIError
from finetune.serve.fields import MESSAGE_HARMLESS, MESSAGE_REFUSED, PART_HARMLESS, refuse_extras
from finetune.serve.request_body import ChatCompletionRequest, CompletionRequest, GenerationRequest, read_request

if TYPE_CHECKING:
    from finetune.infer import Engine
    from finetune.serve.admission import Admission

    RequestKind = type[ChatCompletionRequest] | type[CompletionRequest]

T = TypeVar("T")

SHORT_BYTES = 64 * 2**10  # takes some 20 ms
CONTAINERS = 20_000
_FORMS = "allowed: a text, a list of texts, a list of token ids, a list of such lists"


class Encoding:
    """Turns bodies into requests; short bodies do not wait for long ones."""

    def __init__(self, admission: Admission):
        self._admission = admission
        self._prompts = {name: Prompts(admission.engine, name) for name in admission.engine.names}
        self._short, self._long = ThreadPoolExecutor(1, "encoding"), ThreadPoolExecutor(1, "encoding-long")

    async def understand(self, body: bytes, kind: RequestKind) -> tuple[GenerationRequest, list[Request]]:
        """The requests that a body asks for, prompt by prompt, `n` for each.

        Raises:
            APIError: a body that cannot be understood, an unknown model, a prompt that is too long.
        """
        lane = self._short if len(body) <= SHORT_BYTES else self._long
        return await asyncio.get_running_loop().run_in_executor(lane, self._understand, body, kind)

    def _understand(self, body: bytes, kind: RequestKind) -> tuple[GenerationRequest, list[Request]]:
        parsed = read_request(body, kind, containers=max(CONTAINERS, 2 * self._admission.engine.max_length))
        model = self._admission.require_model(parsed.model)
        made = self._prompts[model]
        if isinstance(parsed, ChatCompletionRequest):
            self._admission.require_capacity(parsed.n or 1)
            ids, continues = made.of_messages(parsed.messages, parsed.tools_shown(), continues=parsed.continues())
            prompts = [ids]
        else:
            assert isinstance(parsed, CompletionRequest)
            continues = True
            texts = made.forms(parsed.prompt)
            self._admission.require_capacity(len(texts) * (parsed.n or 1))
            prompts = [made.of_completion(one) for one in texts]
        samplings = parsed.samplings()
        requests = []
        for ids in prompts:
            after = self._admission.engine.prompt_end(ids, model) if continues else None  # once for all its answers
            requests += [Request(ids, sampling, model, after) for sampling in samplings]
        return parsed, requests


class Prompts:
    """Encodes prompts for one of an engine's models, with its own tokenizer and template."""

    def __init__(self, engine: Engine, model: str | None):
        self._engine, self._model = engine, model
        self._longest_token = max(map(len, engine.tokenizer_of(model).get_vocab()))

    def of_messages(self, messages: list[Any], tools: Any, *, continues: bool) -> tuple[tuple[int, ...], bool]:
        """Ids of a conversation up to the answer, and whether the answer continues the last message.

        Args:
            tools: what the template may list, as the client sent it.

        Raises:
            APIError: a malformed message, call or tool, content other than text, an order of roles that the template
                refuses, tools that it does not write, or too many tokens.
        """
        plain = [_message(message, f"messages.{number}") for number, message in enumerate(messages)]
        if listed := _checked(tools_of, tools, "tools", where="tools"):
            plain[0]["tools"] = listed
        _checked(require_calls, plain, where="messages")
        characters = sum(len(message["content"]) + len(tools_as_text(message)) for message in plain)
        self._require_fewer_characters(characters, "messages")
        if continues and "tool_calls" in plain[-1]:
            message = "the last message calls tools, so there is nothing to answer; add what they answered, role tool"
            raise APIError(400, message, param=f"messages.{len(plain) - 1}.tool_calls")
        if continues and not plain[-1]["content"] and len(plain) > 1:
            plain.pop()  # nothing to go on from
            continues = False
        try:
            ids = self._engine.encode_chat(plain, self._model, continues=continues)
        except DataError as error:
            raise APIError.of(error, "messages") from None
        return self._fitting(ids, "messages"), continues

    @staticmethod
    def forms(prompt: Any) -> list[str] | list[list[int]]:
        """A list of prompts from one text, a list of texts, one list of token ids, or a list of such lists.

        Raises:
            APIError: anything else.
        """
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise APIError(400, f"prompt is {_shown(prompt)}; {_FORMS}", param="prompt")
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if all(type(one) is int for one in prompt):
            return [prompt]
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompt):
            return prompt
        raise APIError(400, f"prompt is a mixed list; {_FORMS}", param="prompt")

    def of_completion(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Ids of one prompt.

        Raises:
            APIError: too many tokens, or ids that the tokenizer does not have.
        """
        if isinstance(prompt, str):
            self._require_fewer_characters(len(prompt), "prompt")
            try:
                return self._fitting(self._engine.encode_text(prompt, self._model), "prompt")
            except DataError as error:
                raise APIError.of(error, "prompt") from None
        ids = self._fitting(tuple(prompt), "prompt")
        size = len(self._engine.tokenizer_of(self._model))
        for token in (min(ids), max(ids)):
            if not 0 <= token < size:
                raise APIError(
                    400, f"prompt holds the token id {token!s:.20}; allowed: 0 to {size - 1}", param="prompt"
                )
        return ids

    def _require_fewer_characters(self, characters: int, where: str) -> None:
        if characters > self._engine.max_length * self._longest_token:
            raise self._too_long(f"{characters} characters, of which no token has over {self._longest_token}", where)

    def _fitting(self, ids: tuple[int, ...], where: str) -> tuple[int, ...]:
        if len(ids) >= self._engine.max_length:  # one is for the answer
            raise self._too_long(f"{len(ids)} tokens", where)
        return ids

    def _too_long(self, has: str, where: str) -> APIError:
        """Worded as OpenAI does, because clients recognize these words and shorten the conversation."""
        message = f"This model's maximum context length is {self._engine.max_length} tokens. However, your {where} "
        message += f"resulted in {has}. Please reduce the length of the {where}."
        return APIError(400, message, param=where, code="context_length_exceeded")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise APIError(400, f"{where} is not an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise APIError(400, f"{where}.role is {role!r:.80}; allowed: {allowed}", param=f"{where}.role")
    honoured = ("role", "content", *BESIDES[ROLES[role]])
    extras = {name: value for name, value in message.items() if name not in honoured}
    refuse_extras(extras, MESSAGE_REFUSED, MESSAGE_HARMLESS, honoured, where=f"{where}.")
    besides = _checked(besides_of, message, ROLES[role], where=where)
    content = message.get("content")
    if content is None and "tool_calls" in besides:
        content = ""
    return {"role": ROLES[role], "content": _content(content, f"{where}.content"), **besides}


def _checked(check: Callable[..., T], *arguments: Any, where: str) -> T:
    """What training makes of it.

    Raises:
        APIError: training refuses it.
    """
    try:
        return check(*arguments)
    except RowFault as fault:
        raise APIError(400, f"{where}: {fault}", param=where) from None


def _content(content: Any, where: str) -> str:
    """The text of a message's content, read as training reads it."""
    try:
        text = text_of(content)
    except ContentFault as fault:
        at = ".".join(str(step) for step in (where, fault.part, fault.key) if step is not None)
        message = f"{at}: {fault}; allowed: a string, or a list of parts of type text"
        code = "unsupported_value" if fault.key == "type" else None
        raise APIError(400, message, param=at, code=code) from None
    for number, part in enumerate(content if isinstance(content, list) else ()):
        extras = {name: value for name, value in part.items() if name not in ("type", "text")}
        refuse_extras(extras, {}, PART_HARMLESS, ("type", "text"), where=f"{where}.{number}.")
    return text


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else "null" if value is None else f"of type {type(value).__name__}"
