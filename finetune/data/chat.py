"""The choice of a chat template, proven on the tokenizer before it is used.

Why: a template that does not fit the tokenizer trains a format that nobody will ask for. How: `auto` looks at the
tokenizer's control tokens; the Mistral templates are only put on a tokenizer after a probe conversation gave the tokens
that mistral-common gives, any other one after its assistant turns could be told. Leaves out rendering and encoding
(`rendering.py`, `encoding.py`), where control tokens spelled out in a message stay ordinary text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.data.encoding import Refused, encoder_of
from finetune.data.rendering import CHATML, MISTRAL_V1, MISTRAL_V1_SPACED, MISTRAL_V3, MISTRAL_V3_SPACED
from finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["auto", "mistral-v1", "mistral-v3", "chatml", "model"]
ALLOWED = "auto, mistral-v1, mistral-v3, chatml, model, or a path that ends in .jinja"
_PROBE = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
_MISTRAL = {"mistral-v1": (MISTRAL_V1, MISTRAL_V1_SPACED), "mistral-v3": (MISTRAL_V3, MISTRAL_V3_SPACED)}
_V1_MARKERS = (["▁[", "INST", "]"], ["▁[", "/", "INST", "]"])
_V3_MARKERS = (["[INST]"], ["[/INST]"])
_CHATML_MARKERS = ["<|im_start|>", "<|im_end|>"]


def apply_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Sets `tokenizer.chat_template` to one that says which tokens are the assistant's.

    Args:
        tokenizer: changed in place, and left as it was if this raises.
        template: `auto` for the format that the tokenizer was made for, `mistral-v1` (Mixtral 8x7B Instruct),
            `mistral-v3` (8x22B Instruct and later), `chatml`, `model` for the template that the tokenizer brings along,
            or the path of a Jinja file.

    Returns:
        the template's name, or its path: what `auto` chose, and else what was asked for.

    Raises:
        DataError: a template that is not there or not one, one that does not fit the tokenizer, one whose assistant
            turns cannot be told, or any on a tokenizer that cannot keep typed control tokens ordinary text.
    """
    name = _choose(tokenizer) if template == "auto" else template
    before = tokenizer.chat_template
    try:
        _put(tokenizer, name)
    except DataError:
        tokenizer.chat_template = before
        raise
    return name


def _put(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if name in _MISTRAL:
        _put_mistral(tokenizer, name)
    elif name == "chatml":
        _require_special(tokenizer, name, _CHATML_MARKERS)
        tokenizer.chat_template = CHATML
        _require_turns(tokenizer, name)
    elif name == "model":
        _require_own(tokenizer)
        _require_turns(tokenizer, name)
    elif name.endswith(".jinja"):
        tokenizer.chat_template = _read(name)
        _require_turns(tokenizer, name)
    else:
        raise DataError(f"unknown chat template {name!r}", where="data.template", allowed=ALLOWED, fix="choose one")


def _choose(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML before v1: its tokens are put into Mixtral's tokenizer, which splits the v1 markers as ever."""
    special = set(tokenizer.all_special_tokens) | _added_specials(tokenizer)
    if {"[INST]", "[/INST]"} <= special:
        return "mistral-v3"
    if special.issuperset(_CHATML_MARKERS):
        return "chatml"
    ids = tokenizer(" [INST] a [/INST]", add_special_tokens=False)["input_ids"]
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    if "".join(pieces).lstrip("▁") == "[INST]▁a▁[/INST]" and pieces[-4:] == _V1_MARKERS[1]:
        return "mistral-v1"
    raise DataError(
        "no chat template of ours fits this tokenizer",
        where=f"data.template: auto, tokenizer of {tokenizer.name_or_path}",
        allowed="a tokenizer with the special tokens [INST] and [/INST], or <|im_start|> and <|im_end|>, or one that "
        "splits [INST] as Mixtral's does",
        fix="set data.template: model for the template that the tokenizer brings along, or the path of a .jinja file",
    )


def _added_specials(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _require_special(tokenizer: PreTrainedTokenizerBase, name: str, markers: list[str]) -> None:
    special = set(tokenizer.all_special_tokens) | _added_specials(tokenizer)
    missing = [marker for marker in markers if marker not in special]
    if missing:
        raise DataError(
            f"this tokenizer does not have the control tokens {' and '.join(missing)}",
            where=f"data.template: {name}, tokenizer of {tokenizer.name_or_path}",
            allowed=f"a tokenizer with the special tokens {' and '.join(markers)}",
            fix="set data.template: auto, or use the tokenizer of a model that was made for this format",
        )


def _require_own(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.get_chat_template()
    except ValueError as missing:
        raise DataError(
            "the model's tokenizer has no chat template of its own",
            where=f"data.template: model, tokenizer of {tokenizer.name_or_path}",
            allowed=ALLOWED,
            fix="set data.template: mistral-v1, or use a model whose tokenizer has a chat template",
        ) from missing


def _read(path: str) -> str:
    fix = "give the path of a Jinja chat template, relative to where finetune is started"
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(f"the chat template cannot be read: {fault}", where=path, allowed=ALLOWED, fix=fix) from fault


def _require_turns(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Two exchanges must be taken, and both answers be found."""
    try:
        [row] = encoder_of(tokenizer).encode([_PROBE])
    except Refused as refusal:
        raise DataError(
            str(refusal),
            where=f"data.template: {name}, tried with two exchanges on the tokenizer of {tokenizer.name_or_path}",
            allowed="a template with {% generation %} ... {% endgeneration %} around the assistant's text, or one that "
            "writes a conversation as its prompt with the generation prompt, and then the answer",
            fix="set data.template: auto or mistral-v1, or put the markers into a copy of it and set its path",
        ) from refusal
    marked = tokenizer.decode(row.ids[row.supervised])
    if "b" not in marked or "d" not in marked:
        raise DataError(
            f"the chat template marks {marked!r} as the assistant's where it said 'b' and 'd'",
            where=f"data.template: {name}, chat template of {tokenizer.name_or_path}",
            allowed="a template with {% generation %} ... {% endgeneration %} around the assistant's text",
            fix="set data.template: auto or mistral-v1, or correct the markers in a copy of the template",
        )


def _put_mistral(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Renders two exchanges and compares the pieces with those of mistral-common."""
    if name == "mistral-v3":
        _require_special(tokenizer, name, ["[INST]", "[/INST]"])
    bos, eos = str(tokenizer.bos_token), str(tokenizer.eos_token)
    start, end = _V3_MARKERS if name == "mistral-v3" else _V1_MARKERS
    expected = [bos, *start, "▁a", *end, "▁b", eos, *start, "▁c", *end, "▁d", eos]
    tried = []
    for source in _MISTRAL[name]:
        tokenizer.chat_template = source
        [row] = encoder_of(tokenizer).encode([_PROBE])
        pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(row.ids.tolist())]
        marked = [piece for piece, is_supervised in zip(pieces, row.supervised, strict=True) if is_supervised]
        if pieces == expected and marked == ["▁b", eos, "▁d", eos]:
            return
        tried.append(" ".join(pieces))
    raise DataError(
        f"this tokenizer does not give the tokens of the {name.replace('-', ' ').title()} format: {tried[0]}",
        where=f"data.template: {name}, tokenizer of {tokenizer.name_or_path}",
        allowed=f"a tokenizer that gives {' '.join(expected)}",
        fix="set data.template: auto or model, or use the tokenizer of "
        + ("Mixtral 8x22B" if name == "mistral-v3" else "Mixtral 8x7B"),
    )
