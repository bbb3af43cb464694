"""Asks mistral-common for the ids that our tokenizer and template must give; runs in an environment of its own.

mistral-common wants a numpy that the training environment does not have, so `scripts/build_tokenizer.py` makes a
virtual environment for it and runs this file there: one JSON document in (`--request`), one out (`--answer`).
Nothing of the package is imported here. What it answers:

- `sha256`, `pieces`: the SentencePiece model's own digest, and every piece as [text, score, kind], by id;
- `texts`: ids of plain texts, without beginning- or end-of-sequence;
- `conversations`: ids of the finetuning encoding and the [start, end) of each assistant turn, or null and the reason
  where mistral-common refuses the conversation. The spans come from encoding every prefix of the conversation; v3 puts
  the system prompt into the last user turn, so there the prefixes before that turn are encoded without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

Message = dict[str, str]


def read_pieces(model: SentencePieceProcessor) -> list[tuple[str, float, str]]:
    """Every piece by id, with its score and its kind: normal, byte, control or unknown."""

    def kind(i: int) -> str:
        if model.is_unknown(i):
            return "unknown"
        if model.is_control(i):
            return "control"
        return "byte" if model.is_byte(i) else "normal"

    return [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(model.get_piece_size())]


class Reference:
    """mistral-common's instruct encoding of the model's version, once as it trains and once as it prompts."""

    def __init__(self, model_file: Path) -> None:
        self._train = MistralTokenizer.from_file(str(model_file), mode=ValidationMode.finetuning)
        self._prompt = MistralTokenizer.from_file(str(model_file), mode=ValidationMode.test)
        self._system_is_last = model_file.suffix == ".v3"

    def conversation(self, messages: list[Message]) -> dict[str, Any]:
        """Ids and assistant spans of one conversation, or the reason why it is refused."""
        try:
            spans = [
                (
                    len(self._ids(self._prompt, self._prefix(messages, turn))),
                    len(self._ids(self._train, self._prefix(messages, turn + 1))),
                )
                for turn, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
            return {"ids": self._ids(self._train, messages), "assistant": spans}
        except MistralCommonException as refusal:
            return {"ids": None, "reason": str(refusal)}

    def _prefix(self, messages: list[Message], length: int) -> list[Message]:
        """The first messages, as they are written within the whole conversation."""
        if self._system_is_last and any(message["role"] == "user" for message in messages[length:]):
            return [message for message in messages[:length] if message["role"] != "system"]
        return messages[:length]

    @staticmethod
    def _ids(tokenizer: MistralTokenizer, messages: list[Message]) -> list[int]:
        training = messages[-1]["role"] == "assistant"
        assistant = FinetuningAssistantMessage if training else AssistantMessage
        make = {"system": SystemMessage, "user": UserMessage, "assistant": assistant}
        request = ChatCompletionRequest(messages=[make[m["role"]](content=m["content"]) for m in messages])
        return list(tokenizer.encode_chat_completion(request).tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="tokenizer.model.v1 of mistral-common, or its v3")
    parser.add_argument("--request", type=Path, required=True, help="JSON: {texts: [...], conversations: [[...], ...]}")
    parser.add_argument("--answer", type=Path, required=True, help="where to write the JSON answer")
    args = parser.parse_args()

    request = json.loads(args.request.read_text(encoding="utf-8"))
    model = SentencePieceProcessor(model_file=str(args.model))
    reference = Reference(args.model)
    answer = {
        "sha256": hashlib.sha256(args.model.read_bytes()).hexdigest(),
        "pieces": read_pieces(model),
        "texts": [model.encode(text) for text in request["texts"]],
        "conversations": [reference.conversation(messages) for messages in request["conversations"]],
    }
    args.answer.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
