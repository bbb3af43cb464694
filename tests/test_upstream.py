"""The private names of other packages that finetune/private_api.py uses still exist, and take what they are given.

Each is a reason for an upper bound in pyproject.toml. A test that fails names what moved: look at its use, then at the
package's new way, before the bound is raised.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl.kernels.chunked_logprob
import trl.trainer.utils
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils
from transformers import core_model_loading

from finetune import private_api
from finetune.private_api import INHERITED, LOGIT_TILE, WRAPPERS


def parameters(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)


@pytest.mark.parametrize("name", INHERITED)
def test_a_class_finds_what_it_takes_over(name: str) -> None:
    """Also that the list is whole: our class replaces no private method of its base that is not listed."""
    ours, (path, methods, attributes) = resolve_name(name), INHERITED[name]
    base = resolve_name(path)
    assert issubclass(ours, base), name
    for method, arguments in methods.items():
        given = [each for each in parameters(getattr(base, method)) if each != "self"]
        assert tuple(given[: len(arguments)]) == arguments, f"{path}.{method}"
    source = "".join(inspect.getsource(each) for each in base.__mro__ if each is not object)
    for attribute in attributes:
        assert f"self.{attribute}" in source or hasattr(base(), attribute), f"{path}.{attribute}"
    replaced = {each for each in vars(ours) if each.startswith("_") and not each.startswith("__")} & set(dir(base))
    assert replaced - {"_abc_impl"} <= set(methods), name


def operator_takes(name: str, *arguments: str) -> bool:
    """By the schema of torch's operator, in this order from the first."""
    schema = getattr(torch.ops.aten, name).default._schema
    return tuple(argument.name for argument in schema.arguments[: len(arguments)]) == arguments


QKV = ("query", "key", "value")
BOUNDARIES = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
# What private_api.py calls or reads -> whether upstream still has it as we use it.
USED: dict[str, Callable[[], bool]] = {
    "_flash_attention_forward": lambda: operator_takes(
        "_flash_attention_forward", *QKV, *BOUNDARIES, "return_debug_mask"
    ),
    "_flash_attention_backward": lambda: operator_takes(
        "_flash_attention_backward", "grad_out", *QKV, "out", "logsumexp", *BOUNDARIES, "rng_state", "unused"
    ),
    "_scaled_dot_product_cudnn_attention": lambda: operator_takes(
        "_scaled_dot_product_cudnn_attention",
        *QKV,
        *("attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask"),
    ),
    "_assert_async": lambda: torch._assert_async(torch.tensor(True), "a message") is None,
    "_apply": lambda: parameters(torch.nn.Module._apply)[1:] == ["fn", "recurse"],
    "_is_hf_initialized": lambda: "_is_hf_initialized" in inspect.getsource(transformers.PreTrainedModel),
    "_weight_conversions": lambda: "_weight_conversions" in inspect.getsource(core_model_loading),
    "_attn_implementation": lambda: (
        transformers.MixtralConfig(attn_implementation="sdpa")._attn_implementation == "sdpa"
    ),
    "_setup_devices": lambda: "return self._setup_devices" in inspect.getsource(transformers.TrainingArguments),
    "_train_batch_size": lambda: "self._train_batch_size" in inspect.getsource(transformers.Trainer),
    "_remove_unused_columns": lambda: (
        parameters(transformers.Trainer._remove_unused_columns)[1:] == ["dataset", "description"]
    ),
    "_register_custom_module": lambda: parameters(peft.LoraConfig._register_custom_module)[1:] == ["mapping"],
    "_fingerprint": lambda: bool(datasets.Dataset.from_dict({"a": [1]})._fingerprint),
    "_index": lambda: find_spec("lm_eval") is None or len(private_api.harness_task_kinds()) == 2,
}


@pytest.mark.parametrize("name", USED)
def test_upstream_has_it_as_it_is_used(name: str) -> None:
    assert USED[name](), name


def test_every_private_name_of_the_file_is_checked() -> None:
    tree = ast.parse(Path(private_api.__file__).read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    read |= {part for module in modules for part in module.split(".")}
    assert {name for name in read if name.startswith("_") and not name.startswith("__")} == set(USED)


def test_the_tile_is_the_one_of_the_installed_trl() -> None:
    tile = trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert tile == LOGIT_TILE


def test_wrappers_are_called_as_upstream_calls_them() -> None:
    compiled = dict(torch.compile(torch.nn.Linear(1, 1)).named_children())
    names = {_common_utils.FSDP_WRAPPED_MODULE, checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE, *compiled}
    assert names == WRAPPERS
