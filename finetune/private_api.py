"""Every private interface of another package that this one uses, each with the reason why no public one would do.

Upstream may move any of these in a minor version, hence the upper bounds in pyproject.toml. `tests/test_upstream.py`
goes through this file and names what has moved: read its use here, then the package's new way, then raise the bound.
`tests/test_house.py` refuses private names of other packages anywhere else.

A private method that a class of ours overrides, or a private attribute that it inherits, has to stay in that class;
`INHERITED` lists those. Packages are imported inside the functions: this file costs nothing to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Inherited(NamedTuple):
    """What a class of ours takes from the private side of its base."""

    base: str
    """The upstream class, as `module:name`."""
    methods: Mapping[str, tuple[str, ...]]
    """Overridden or called -> the arguments by which we call the base's, in order."""
    attributes: tuple[str, ...] = ()


INHERITED: dict[str, Inherited] = {
    # One class keeps the story of a step in upstream's loop: a skipped step, an exact resume, losses summed over
    # processes, checkpoints of the adapter alone. Callbacks may not change what these return.
    "finetune.train.trainer:MoeTrainer": Inherited(
        "trl:SFTTrainer",
        {
            "_prepare_for_training": (),
            "_run_epoch": (),
            "_get_grad_norm": ("model", "grad_norm"),
            "_maybe_log_save_evaluate": ("tr_loss", "grad_norm", "model", "trial"),
            "_save_checkpoint": ("model", "trial"),
            "_save_optimizer_and_scheduler": ("output_dir",),
            "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
            "_prepare_inputs": ("inputs",),
        },
        ("_metrics", "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"),
    ),
    # The two hooks of a quantizer plugin; transformers documents them for that, under these names.
    "finetune.moe.quantizer:Moe4bitQuantizer": Inherited(
        "transformers.quantizers.base:HfQuantizer",
        {"_process_model_before_weight_loading": ("model",), "_process_model_after_weight_loading": ("model",)},
    ),
    # `model.to(dtype)` must not round the scales; a forward pass reads 256 parameters, too many for `get_parameter`.
    "finetune.moe.experts:QuantizedExperts": Inherited(
        "torch.nn:Module", {"_apply": ("fn", "recurse")}, ("_parameters",)
    ),
    # Limits on a request's head and on slow clients, which uvicorn has no options for.
    "finetune.web.protocol:LimitedProtocol": Inherited(
        "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol", {"_unset_keepalive_if_required": ()}
    ),
}

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Path components that FSDP, activation checkpointing and torch.compile put between a module and its parent."""

LOGIT_TILE = (4096, 32768)
"""(tokens, vocabulary) of the one tile of logits that TRL's chunked loss holds; it can be read from no option.

trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE and trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE.
"""

# ---- torch ----------------------------------------------------------------------------------------------------------


def flash_attention_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """torch's flash attention over boundaries: output, logsumexp, dropout state (twice), debug mask.

    `scaled_dot_product_attention` takes no boundaries, and `varlen_attn` no deterministic backward pass.
    """
    import torch

    return torch.ops.aten._flash_attention_forward(*args, **options)


def flash_attention_backward(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; see `flash_attention_forward`."""
    import torch

    return torch.ops.aten._flash_attention_backward(*args, **options)


def cudnn_attention(*args: Any, **options: Any) -> tuple[Any, ...]:
    """cuDNN's attention with its logsumexp, which flash's backward pass needs and no public call returns."""
    import torch

    return torch.ops.aten._scaled_dot_product_cudnn_attention(*args, **options)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fails when the device gets there: a public assertion would synchronize once a forward pass."""
    import torch

    torch._assert_async(condition, message)


def move_own_tensors(module: torch.nn.Module, device: torch.device) -> None:
    """Moves a module's own parameters and buffers, not its children's, which `Module.to` would move too."""
    module._apply(lambda tensor: tensor.to(device), recurse=False)


# ---- transformers ---------------------------------------------------------------------------------------------------


def mark_initialized(parameter: torch.nn.Parameter) -> None:
    """Keeps transformers from initializing a parameter that no checkpoint key names: our packed expert weights."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def save_own_names(model: Any) -> None:
    """Makes `save_pretrained` write the module's names: the hub's per-expert ones cannot be made from 4-bit."""
    model._weight_conversions = []


def attention_of(config: Any) -> str:
    """The attention that a model's config was loaded with; the public argument is only ever read at loading."""
    return config._attn_implementation


def set_device(args: Any, device: torch.device) -> None:
    """What `args.device` says from now on. In a launch accelerate calls the CPU "cpu:0", which transformers 5.17 gives
    to torch.load, which knows only "cpu"."""
    args._setup_devices = device


def train_batch_size(trainer: Any) -> int:
    """Rows of a batch on this process, after upstream's search for a batch that fits has lowered it."""
    return trainer._train_batch_size


def without_unused_columns(trainer: Any, rows: Any, description: str) -> Any:
    """The rows without the columns that the model's forward does not take, as upstream's own loaders drop them."""
    return trainer._remove_unused_columns(rows, description=description)


# ---- others ---------------------------------------------------------------------------------------------------------


def register_lora_layers(config: Any, layers: Mapping[type, type]) -> None:
    """Makes PEFT build these LoRA layers: its documented way for custom models, private while it is experimental."""
    config._register_custom_module(layers)


def dataset_fingerprint(rows: Any) -> str:
    """The hash by which `datasets` knows a table and what was done to it; its public API has no name for it."""
    return rows._fingerprint


def harness_task_kinds() -> tuple[Any, Any]:
    """The kinds of lm-evaluation-harness that are one task; groups and tags are the others."""
    from lm_eval.tasks._index import Kind

    return Kind.TASK, Kind.PY_TASK
