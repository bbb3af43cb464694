"""The state of a conversation in the terminal: its model, sampling settings, turns and last question."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat.answering import request_for
from finetune.chat.conversation import Conversation, Messages, load_conversation, save_conversation
from finetune.errors import DataError
from finetune.infer import Request, Sampling

if TYPE_CHECKING:
    from finetune.infer import Engine


@dataclass
class Session:
    """One user's conversation with an engine.

    Attributes:
        model: one of the engine's names.
        asked: the last question, whether or not its answer was kept.
        attempts: how often it was asked again; each attempt samples with another seed.
    """

    engine: Engine
    sampling: Sampling
    model: str
    conversation: Conversation = field(default_factory=Conversation)
    asked: str | None = None
    attempts: int = 0
    _kept: bool = field(default=False, init=False)
    _on_disk: Conversation | None = field(default=None, init=False)

    @property
    def is_unsaved(self) -> bool:
        """Whether something was said that no file holds."""
        return bool(self.conversation.turns) and self.conversation != self._on_disk

    def save(self, path: Path, *, replace: bool) -> None:
        """Writes the conversation; raises as `save_conversation`."""
        save_conversation(self.conversation, path, replace=replace)
        self._on_disk = self.conversation.copy()

    def load(self, path: Path) -> None:
        """Continues the first conversation of a file; its last question can be asked again.

        Raises:
            DataError: as `load_conversation`, or the chat template refuses it; the conversation is as before.
        """
        conversation = load_conversation(path)
        self.engine.encode_chat(conversation.messages("?"), self.model)
        self.conversation, self.attempts, self._kept = conversation, 0, True
        self.asked = conversation.turns[-1][0]
        self._on_disk = conversation.copy()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.conversation = Conversation(self.conversation.system)
        self.asked, self.attempts, self._kept = None, 0, False

    def ask(self, question: str) -> Request:
        """The request for an answer to a new question.

        Raises:
            DataError: as `request_for`; the conversation is as before.
        """
        request = self._request(self.conversation.messages(question), attempts=0)
        self.asked, self.attempts, self._kept = question, 0, False
        return request

    def ask_again(self) -> Request:
        """The request for another answer to the last question; the earlier one stays until `keep`.

        Raises:
            DataError: nothing was asked yet, or as `request_for`.
        """
        if self.asked is None:
            raise DataError("nothing has been asked yet", where="/retry", fix="ask something first")
        before = dataclasses.replace(
            self.conversation, turns=self.conversation.turns[: len(self.conversation.turns) - self._kept]
        )
        request = self._request(before.messages(self.asked), attempts=self.attempts + 1)
        self.attempts += 1
        return request

    def keep(self, answer: str) -> None:
        """Adds the answer to the last question to the conversation, in place of an earlier answer to it."""
        assert self.asked is not None, "an answer without a question"
        if self._kept:
            self.conversation.turns.pop()
        self.conversation.turns.append((self.asked, answer))
        self._kept = True

    def tell_system(self, text: str | None) -> None:
        """Changes the system message.

        Raises:
            DataError: the chat template takes no such message.
        """
        told = dataclasses.replace(self.conversation, system=text)
        self.engine.encode_chat(told.messages("?"), self.model)
        self.conversation = told

    def choose(self, model: str) -> None:
        """Switches to another of the engine's models.

        Raises:
            DataError: there is none of this name.
        """
        if model not in self.engine.names:
            raise DataError(
                f"there is no model {model!r}",
                where=f"/model {model}",
                allowed=", ".join(self.engine.names),
                fix="choose one of them; --adapter NAME=PATH loads more",
            )
        self.model = model

    def _request(self, messages: Messages, *, attempts: int) -> Request:
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + attempts) % 2**63)
        return request_for(self.engine, messages, sampling, self.model)


# ---- sampling settings as a user types them: `temperature=0.7 top_p=0.9` ---------------------------------------------

NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def with_settings(sampling: Sampling, given: Sequence[str]) -> Sampling:
    """Sets some fields of a sampling, all of those given or none.

    Args:
        given: `name=value`, each.

    Raises:
        DataError: an unknown name, a value that is no number, or one outside its range.
    """
    values: dict[str, int | float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise DataError(
                f"{text!r} sets nothing", where="/set", allowed="NAME=VALUE", fix="write for example temperature=0.7"
            )
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise DataError(
                f"there is no setting {name!r}",
                where=f"/set {text}",
                allowed=", ".join(NAMES),
                fix=f"did you mean {near[0]}?" if near else "choose one of them",
            )
        values[name] = _number(name, value, whole=isinstance(getattr(Sampling(), name), int))
    return dataclasses.replace(sampling, **values)  # type: ignore[arg-type]


def shown(sampling: Sampling) -> str:
    """All settings in one line, as `with_settings` takes them."""
    return " ".join(f"{name}={getattr(sampling, name)}" for name in NAMES)


def _number(name: str, value: str, *, whole: bool) -> int | float:
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise DataError(
            f"{name} is {value!r}",
            where=f"/set {name}={value}",
            allowed="a whole number" if whole else "a number",
            fix=f"write for example {name}={getattr(Sampling(), name)}",
        ) from None
