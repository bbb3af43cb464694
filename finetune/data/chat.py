"""Chat templates that say which tokens are the assistant's.

Why: no Mistral template of TRL or of the hub marks the assistant's text, so a mask cannot be derived from it. How:
`MISTRAL_V1` carries `{% generation %}` markers and gives the ids of mistral-common's finetuning encoding; a template is
only put on a tokenizer after a probe conversation came out as it must. Leaves out: control tokens spelled out in a
user's text (`<s>`, `</s>`, `<unk>`), which a Hugging Face tokenizer parses as the tokens themselves; `[INST]` is
ordinary text in v1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
TemplateName = Literal["mistral-v1", "model"]
MISTRAL_V1 = (Path(__file__).parent / "templates" / "mistral_v1.jinja").read_text(encoding="utf-8")

# As transformers looks for it before it warns that the mask will be empty.
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

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
        DataError: `mistral-v1` on a tokenizer that splits its markers otherwise than Mixtral's, or `model` on a
            tokenizer that has no template or one without generation markers.
    """
    if template == "model":
        _require_markers(tokenizer)
        return
    before = tokenizer.chat_template
    tokenizer.chat_template = MISTRAL_V1
    fault = _probe_mistral_v1(tokenizer)
    if fault is not None:
        tokenizer.chat_template = before
        raise fault


def encode(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of whole conversations, and beside them 1 for every token that the template marks as the assistant's.

    Raises:
        jinja2.TemplateError: the template refuses a conversation.
    """
    # verbose=False: a conversation beyond the model's length is TRL's to truncate and the audit's to report.
    encoded: Any = tokenizer.apply_chat_template(
        conversations, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    return encoded["input_ids"], encoded["assistant_masks"]


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
    if not _GENERATION_MARKER.search(own):
        raise DataError(
            "the model's chat template does not mark the assistant's text, so nothing could be supervised",
            where=f"data.template: model, chat template of {tokenizer.name_or_path}",
            allowed="a template with {% generation %} ... {% endgeneration %} around the assistant's text",
            fix="set data.template: mistral-v1, or put the markers into the model's chat template",
        )


def _probe_mistral_v1(tokenizer: PreTrainedTokenizerBase) -> DataError | None:
    """Renders two exchanges and compares the pieces with those of mistral-common."""
    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    expected = [bos, *_OPEN, "▁a", *_CLOSE, "▁b", eos, *_OPEN, "▁c", *_CLOSE, "▁d", eos]
    supervised = ["▁b", eos, "▁d", eos]
    [ids], [mask] = encode(tokenizer, [_PROBE])
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    marked = [piece for piece, is_assistant in zip(pieces, mask, strict=True) if is_assistant]
    if pieces == expected and marked == supervised:
        return None
    return DataError(
        f"this tokenizer does not give the tokens of the Mistral v1 format: {' '.join(pieces)}",
        where=f"data.template: mistral-v1, tokenizer of {tokenizer.name_or_path}",
        allowed=f"a tokenizer that gives {' '.join(expected)}",
        fix="set data.template: model, or use the tokenizer of Mixtral 8x7B",
    )
