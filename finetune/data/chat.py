"""Chat templates that say which tokens are the assistant's.

Why: no Mistral template of TRL or of the hub marks the assistant's text, so a mask cannot be derived from it. How:
`MISTRAL_V1` carries `{% generation %}` markers and gives the ids of mistral-common's finetuning encoding; a template is
only put on a tokenizer after a probe conversation came out as it must. Leaves out rendering and
encoding (`rendering.py`, `encoding.py`), where control tokens spelled out in a message stay ordinary text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from finetune.data.encoding import encoder_of
from finetune.data.rendering import GENERATION_MARKER, MISTRAL_V1, Conversation
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["mistral-v1", "model"]
_PROBE: Conversation = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
_OPEN, _CLOSE = ["▁[", "INST", "]"], ["▁[", "/", "INST", "]"]


def apply_template(tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> None:
    """Sets `tokenizer.chat_template` to one that marks the assistant's tokens.

    Args:
        tokenizer: changed in place, and left as it was if this raises.
        template: `mistral-v1`, or `model` for the template that the tokenizer brings along.

    Raises:
        DataError: `mistral-v1` on a tokenizer that splits its markers otherwise than Mixtral's, `model` on a
            tokenizer that has no template or one without generation markers, or any on a tokenizer that cannot keep
            typed control tokens ordinary text.
    """
    if template == "model":
        _require_markers(tokenizer)
        encoder_of(tokenizer)
        return
    before = tokenizer.chat_template
    tokenizer.chat_template = MISTRAL_V1
    try:
        _require_mistral_v1(tokenizer)
    except DataError:
        tokenizer.chat_template = before
        raise


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of whole conversations, and beside them 1 for every token that the template marks as the assistant's.

    Raises:
        Refused: the template does not take a conversation.
    """
    encoded = encoder_of(tokenizer).encode(conversations)
    return [row.ids.tolist() for row in encoded], [row.is_assistant.astype(int).tolist() for row in encoded]


def _require_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        own = tokenizer.get_chat_template()
    except ValueError as missing:
        raise DataError(
            "the model's tokenizer has no chat template of its own",
            where=f"data.template: model, tokenizer of {tokenizer.name_or_path}",
            allowed="mistral-v1, model",
            fix="set data.template: mistral-v1, or use a model whose tokenizer has a chat template",
        ) from missing
    if not GENERATION_MARKER.search(own):
        raise DataError(
            "the model's chat template does not mark the assistant's text, so nothing could be supervised",
            where=f"data.template: model, chat template of {tokenizer.name_or_path}",
            allowed="a template with {% generation %} ... {% endgeneration %} around the assistant's text",
            fix="set data.template: mistral-v1, or put the markers into the model's chat template",
        )


def _require_mistral_v1(tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders two exchanges and compares the pieces with those of mistral-common."""
    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    expected = [bos, *_OPEN, "▁a", *_CLOSE, "▁b", eos, *_OPEN, "▁c", *_CLOSE, "▁d", eos]
    supervised = ["▁b", eos, "▁d", eos]
    [ids], [mask] = encode(tokenizer, [_PROBE])
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    marked = [piece for piece, is_assistant in zip(pieces, mask, strict=True) if is_assistant]
    if pieces == expected and marked == supervised:
        return
    raise DataError(
        f"this tokenizer does not give the tokens of the Mistral v1 format: {' '.join(pieces)}",
        where=f"data.template: mistral-v1, tokenizer of {tokenizer.name_or_path}",
        allowed=f"a tokenizer that gives {' '.join(expected)}",
        fix="set data.template: model, or use the tokenizer of Mixtral 8x7B",
    )
