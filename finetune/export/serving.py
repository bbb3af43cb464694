"""What a merged folder says of itself: merge.json for programs; SERVING.md for people, with which engine reads it, by
which command, and what the folder is not.

Ollama gets a Modelfile beside its GGUF, with the prompt format of the model's own chat template where it is Mistral's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.disk import write_json, write_text

MERGE_FILE, SERVING_FILE = "merge.json", "SERVING.md"
_EXPERTS = {
    "trained": "The experts' weights are the values of the NF4 experts that the adapter was trained with: this is the "
    "model that was trained, in 16 bits.",
    "original": "The experts' weights are the original 16-bit ones, while the adapter was trained with 4-bit ones: a "
    "model that nobody trained. Compare it with the adapter before it serves.",
}
_UNRECORDED = {
    "trained": "The experts' weights are the values of NF4 experts, in 16 bits. The adapter does not say what it was "
    "trained on: compare this model with it before it serves.",
    "original": "The experts' weights are the original 16-bit ones. The adapter does not say what it was trained on: "
    "compare this model with it before it serves.",
}
_KEPT = "Attention is in bfloat16; the experts' bytes are those that the adapter was merged onto."
_NOT_RUN = "The commands of other programs follow their documentation; they are not run by the tests of moe-qlora."
# Ollama's template language for `[INST] system, blank line, user [/INST] answer</s>`.
_MISTRAL_TEMPLATE = (
    '{{- range $index, $_ := .Messages }}{{- if eq .Role "user" }}[INST] '
    "{{ if and (eq $index 1) $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }} [/INST]"
    '{{- else if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}{{ end }}'
)


def write_about(folder: Path, about: Mapping[str, Any], *, name: str, chat_template: str | None = None) -> None:
    """Writes merge.json, SERVING.md, and for a GGUF the Modelfile, into a folder that is being filled.

    Args:
        about: what merge.json says.
        name: the folder's name when it is done.
    """
    write_json(folder / MERGE_FILE, about)
    text = {"gguf": _gguf, "nf4": _nf4}.get(about["format"], _standard)(about, name)
    write_text(folder / SERVING_FILE, text)
    if about["format"] == "gguf":
        write_text(folder / "Modelfile", modelfile(next(iter(about["files"])), chat_template))


def modelfile(gguf: str, chat_template: str | None) -> str:
    """What `ollama create` reads."""
    lines = [f"FROM ./{gguf}"]
    if chat_template and "[INST]" in chat_template:
        lines += [f'TEMPLATE """{_MISTRAL_TEMPLATE}"""', 'PARAMETER stop "</s>"', 'PARAMETER stop "[INST]"']
    return "\n".join(lines) + "\n"


def _origin(about: Mapping[str, Any]) -> str:
    adapters = "\n".join(f"- {a['factor']:g} x `{a['path']}` ({a['kind']})" for a in about["adapters"])
    head = f"Merged by moe-qlora onto `{about['base']}` (--onto {about['onto']}) from"
    known = about["trained_on"] is not None
    experts = _KEPT if about["format"] == "nf4" else (_EXPERTS if known else _UNRECORDED)[about["onto"]]
    return f"{head}\n\n{adapters}\n\n{experts}\n"


def _standard(about: Mapping[str, Any], name: str) -> str:
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[about["format"]]
    return f"""# Serving `{name}`

{_origin(about)}
A plain {dtype} checkpoint in the hub's layout: transformers 4 and 5 load it without this toolkit.

| engine | what it reads | command |
|---|---|---|
| vLLM | this folder | `vllm serve ./{name} --dtype {dtype}` |
| SGLang | this folder | `python -m sglang.launch_server --model-path ./{name} --dtype {dtype}` |
| TGI | this folder | `text-generation-launcher --model-id ./{name} --dtype {dtype}` |
| Ollama, llama.cpp, LM Studio | not this folder: a GGUF | `finetune merge ADAPTER --format gguf --output {name}-gguf` |
| `finetune serve` | this folder, experts quantized to NF4 again | `finetune serve ./{name}` |

For several GPUs add vLLM's and SGLang's `--tensor-parallel-size N`, TGI's `--num-shard N`.

{_NOT_RUN}
"""


def _nf4(about: Mapping[str, Any], name: str) -> str:
    return f"""# Serving `{name}`

{_origin(about)}
| engine | what it reads | command |
|---|---|---|
| `finetune serve` | this folder | `finetune serve ./{name}` |
| transformers | this folder | `from finetune import Moe4bitConfig`; `AutoModelForCausalLM.from_pretrained("{name}")` |
| vLLM, SGLang, TGI | not this folder: 16 bits | `finetune merge ADAPTER --format bf16 --output {name}-bf16` |
| Ollama, llama.cpp, LM Studio | not this folder: a GGUF | `finetune merge ADAPTER --format gguf --output {name}-gguf` |
"""


def _gguf(about: Mapping[str, Any], name: str) -> str:
    file = next(iter(about["files"]))
    return f"""# Serving `{name}`

{_origin(about)}
One GGUF in {about["type"]}, with tokenizer and chat template inside.

| engine | what it reads | command |
|---|---|---|
| Ollama | the Modelfile | `ollama create {name} -f Modelfile && ollama run {name}` |
| llama.cpp | the GGUF | `llama-server -m {file} --jinja` |
| LM Studio | the GGUF | `lms import {file}` |
| vLLM, SGLang, TGI | not this folder: 16 bits | `finetune merge ADAPTER --format bf16 --output {name}-bf16` |

{_NOT_RUN}
"""
