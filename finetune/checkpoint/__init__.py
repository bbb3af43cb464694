"""Every file of a model or adapter: read and checked here, before anything is loaded from it.

`json_file` reads JSON and `headers` the headers of safetensors; `schemas` knows what each JSON file holds; `upstream`
blames a file for what upstream raises of it; `folder` looks at a model folder, `resumable` at a run's checkpoints.
"""

from finetune.checkpoint.folder import check_model_folder, incomplete, require_every_expert, shard_files
from finetune.checkpoint.headers import Header, TensorInfo, check_safetensors, read_header, read_tensor_infos
from finetune.checkpoint.json_file import NotJson, parse_json, read_json
from finetune.checkpoint.resumable import Checkpoints, find_checkpoints
from finetune.checkpoint.schemas import NonMoeFile, check_tokenizer_files, read_adapter_config
from finetune.checkpoint.upstream import blamed_on

__all__ = [
    "Checkpoints",
    "Header",
    "NonMoeFile",
    "NotJson",
    "TensorInfo",
    "blamed_on",
    "check_model_folder",
    "check_safetensors",
    "check_tokenizer_files",
    "find_checkpoints",
    "incomplete",
    "parse_json",
    "read_adapter_config",
    "read_header",
    "read_json",
    "read_tensor_infos",
    "require_every_expert",
    "shard_files",
]
