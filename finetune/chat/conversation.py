"""A conversation, and the file that it is saved in.

The file is one JSON line in the `messages` form, so a saved conversation can be trained on. It is read back by the data
room, so any form that training takes can be loaded and continued.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data import Message, Reading, RowFault, Source, first_row, form_of, open_source, to_conversation
from finetune.disk import write_text
from finetune.errors import DataError, OutputError

Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """Questions with their answers, after an optional system message.

    Attributes:
        system: the system message; None for none.
        turns: question and answer, the oldest first.
    """

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str | None = None) -> Messages:
        """The messages for the chat template, with a question that is still to be answered at the end."""
        said: Messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answer in self.turns:
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return said if question is None else [*said, {"role": "user", "content": question}]

    def copy(self) -> Conversation:
        return Conversation(self.system, list(self.turns))


def save_conversation(conversation: Conversation, path: Path, *, replace: bool = False) -> None:
    """Writes the conversation as one JSON line.

    Args:
        replace: whether an existing file is overwritten.

    Raises:
        OutputError: there is nothing to save, the file exists already, or it cannot be written.
    """
    where = str(path)
    if not conversation.turns:
        raise OutputError("nothing has been said yet", where=where, fix="ask something first")
    if path.is_dir():
        raise OutputError("the file cannot be written: it is a folder", where=where, fix="name a file in it")
    if path.exists() and not replace:
        raise OutputError(
            "the file exists already", where=where, fix="choose another name, or replace it with /save! FILE"
        )
    line = json.dumps({"messages": conversation.messages()}, ensure_ascii=False)
    try:
        write_text(path, line + "\n")
    except OSError as fault:
        raise OutputError(
            f"the file cannot be written: {fault.strerror}", where=where, fix="name a file that you may write"
        ) from None


def load_conversation(path: Path) -> Conversation:
    """The first conversation of a file, in any form that training takes.

    Raises:
        DataError: the file cannot be read, or its first conversation does not end with an answer.
    """
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), fix="name a file that /save wrote, or training data")
    source = Source(str(path))
    reader = open_source(source)
    form = form_of(reader, Reading(source))
    position, row = first_row(reader)
    where = reader.locate(position)
    try:
        if isinstance(row, RowFault):
            raise row
        return _conversation_of(to_conversation(row, form), where=where)
    except RowFault as fault:
        raise DataError(str(fault), where=where, fix="correct the row, or name another file") from None


def _conversation_of(messages: Sequence[Message], *, where: str) -> Conversation:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    said = messages[system is not None :]
    roles = [message["role"] for message in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise DataError(
            f"this conversation cannot be continued: its roles are {', '.join(roles) or 'none'}",
            where=where,
            allowed="user and assistant in turn, the assistant last, after an optional system message",
            fix="correct the file, or start over with /reset",
        )
    texts = [message["content"] for message in said]
    return Conversation(system, list(zip(texts[::2], texts[1::2], strict=True)))
