"""What the smaller JSON files of a model or adapter hold, key by key; config.json is `arch`'s.

Lax where upstream is lax: keys that are not named here pass. Named are the keys that this toolkit reads, and those of
which a wrong type brings upstream down far from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune.checkpoint.json_file import read_json
from finetune.errors import AdapterError, FinetuneError, ModelError
from finetune.values import Count, FileSchema, Number, check_object

_TokenId = Annotated[int, Field(ge=-1, lt=2**31)]
_Size = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, Field(max_length=100_000)]


class GenerationFile(FileSchema):
    """generation_config.json."""

    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None
    pad_token_id: _TokenId | None = None
    max_length: Count | None = None
    max_new_tokens: Count | None = None
    min_length: _Size | None = None
    min_new_tokens: _Size | None = None
    do_sample: bool | None = None
    num_beams: Count | None = None
    num_return_sequences: Count | None = None
    temperature: Number | None = None
    top_k: _Size | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    repetition_penalty: Number | None = None
    length_penalty: Number | None = None
    no_repeat_ngram_size: _Size | None = None
    suppress_tokens: list[_TokenId] | None = None
    use_cache: bool | None = None
    transformers_version: str | None = None


class _AddedToken(FileSchema):
    content: _Text
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    special: bool = False


class _NamedTemplate(FileSchema):
    name: str
    template: str


_Token = _Text | _AddedToken | None


class SpecialTokensFile(FileSchema):
    """special_tokens_map.json, and the same keys in tokenizer_config.json."""

    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    pad_token: _Token = None
    sep_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None
    additional_special_tokens: list[_Text | _AddedToken] | dict[str, Any] | None = None
    extra_special_tokens: list[_Text | _AddedToken] | dict[str, _Text | _AddedToken] | None = None


class TokenizerFile(SpecialTokensFile):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[float, Field(gt=0)] | None = None
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    model_input_names: list[str] | None = None
    auto_map: dict[str, Any] | list[Any] | None = None
    clean_up_tokenization_spaces: bool | None = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _AddedToken] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    use_fast: bool | None = None


class _TokenizerJson(FileSchema):
    model: dict[str, Any]
    added_tokens: list[_AddedToken]


class AdapterConfigFile(FileSchema):
    """adapter_config.json of a LoRA adapter, as PEFT writes it."""

    peft_type: str
    r: Count
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    inference_mode: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    lora_alpha: Number = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: str = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Number] | None = None
    layers_to_transform: list[int] | int | None = None
    layer_replication: list[list[int]] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class NonMoeFile(FileSchema):
    """non_moe.json, and the same in the header of non_moe.safetensors."""

    format: Literal[1]
    base: dict[str, Any]
    router: bool
    parameters: int = 0


def read_adapter_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, checked.

    Raises:
        AdapterError: missing or damaged, or a value of the wrong type.
    """
    content = read_json(file, kind=AdapterError)
    check_object(
        content,
        AdapterConfigFile,
        kind=AdapterError,
        name=file.name,
        where=str(file),
        fix="use the adapter folder as it was saved",
    )
    return content


def check_tokenizer_files(folder: Path, *, kind: type[FinetuneError] = ModelError) -> None:
    """Checks the JSON files that a tokenizer is read from, where they are.

    Raises:
        FinetuneError: of the given kind; one is damaged, or holds a value of the wrong type.
    """
    schemas: dict[str, type[FileSchema]] = {
        "tokenizer.json": _TokenizerJson,
        "tokenizer_config.json": TokenizerFile,
        "special_tokens_map.json": SpecialTokensFile,
        "added_tokens.json": FileSchema,
    }
    for name, schema in schemas.items():
        if (file := folder / name).exists():
            # Vocabularies of the hub name tokens twice, and the library takes the last.
            content = read_json(file, kind=kind, unique_keys=schema is not _TokenizerJson)
            fix = "use the tokenizer's files as they were saved"
            check_object(content, schema, kind=kind, name=name, where=str(file), fix=fix)
