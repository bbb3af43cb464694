"""The private names of other packages that this one uses still exist, and take what they are given.

Each is a reason for an upper bound in pyproject.toml. A test that fails names what moved: look at its use, then at the
package's new way, before the bound is raised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import PreTrainedModel

# What is called or overridden -> arguments that it must go on taking.
METHODS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "transformers.Trainer._run_epoch": (transformers.Trainer._run_epoch, set()),
    "transformers.Trainer._get_grad_norm": (transformers.Trainer._get_grad_norm, {"model", "grad_norm"}),
    "transformers.Trainer._maybe_log_save_evaluate": (
        transformers.Trainer._maybe_log_save_evaluate,
        {"tr_loss", "grad_norm", "model", "trial"},
    ),
    "transformers.Trainer._prepare_for_training": (transformers.Trainer._prepare_for_training, set()),
    "transformers.Trainer._save_checkpoint": (transformers.Trainer._save_checkpoint, {"model", "trial"}),
    "transformers.Trainer._save_optimizer_and_scheduler": (
        transformers.Trainer._save_optimizer_and_scheduler,
        {"output_dir"},
    ),
    "transformers.Trainer._load_from_checkpoint": (
        transformers.Trainer._load_from_checkpoint,
        {"resume_from_checkpoint", "model"},
    ),
    "transformers.Trainer._remove_unused_columns": (
        transformers.Trainer._remove_unused_columns,
        {"dataset", "description"},
    ),
    "peft.LoraConfig._register_custom_module": (peft.LoraConfig._register_custom_module, {"mapping"}),
    "torch.nn.Module._apply": (torch.nn.Module._apply, {"fn", "recurse"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_private_method_takes_what_it_is_given(name: str) -> None:
    method, needed = METHODS[name]
    assert needed <= set(inspect.signature(method).parameters), name


# torch's own operators that kernels/varlen.py calls.
OPERATORS = ("_flash_attention_forward", "_flash_attention_backward", "_scaled_dot_product_cudnn_attention")


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_has_the_operator(name: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    wanted = {"query", "key", "value"}
    assert wanted <= {argument.name for argument in schema.arguments}, name


def test_transformers_writes_by_the_conversions_that_are_emptied() -> None:
    """moe/quantizer.py sets `_weight_conversions` on the model so that save_pretrained keeps the module's names."""
    from transformers import core_model_loading

    assert "_weight_conversions" in inspect.getsource(core_model_loading), "transformers: _weight_conversions"
    source = inspect.getsource(inspect.getmodule(PreTrainedModel) or PreTrainedModel)
    assert "_is_hf_initialized" in source, "transformers: _is_hf_initialized"
    assert "_attn_implementation" in source, "transformers: _attn_implementation"
