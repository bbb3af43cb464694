"""Every launch file under accelerate_configs/ is one that the installed accelerate reads, and does what it says."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import MixtralConfig

from finetune.moe.arch import MoeArch, experts_path

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "accelerate_configs").glob("*.yaml"))}


def launch_arguments(name: str) -> Namespace:
    """What `accelerate launch --config_file` makes of a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS[name]), "scripts/train.py", "recipe"])
    return _validate_launch_command(arguments)[0]


def test_the_four_strategies_are_there():
    assert sorted(CONFIGS) == ["cpu", "fsdp2", "multi_gpu", "single_gpu"]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it_and_leaves_precision_to_the_recipe(name: str):
    config = load_config_from_file(str(CONFIGS[name]))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "no"
    assert launch_arguments(name).mixed_precision == "no"


@pytest.mark.parametrize("name", CONFIGS)
def test_it_shows_the_line_that_launches_it(name: str):
    assert f"accelerate launch --config_file accelerate_configs/{name}.yaml " in CONFIGS[name].read_text()


@pytest.mark.parametrize(("name", "processes"), [("cpu", 2), ("multi_gpu", 2)])
def test_several_processes_go_through_torchrun(name: str, processes: int):
    # With MULTI_CPU and no MPI, accelerate would start one process without a word.
    arguments = launch_arguments(name)
    assert arguments.multi_gpu
    assert arguments.num_processes == processes
    assert arguments.use_cpu == (name == "cpu")


def test_single_gpu_is_one_plain_process():
    arguments = launch_arguments("single_gpu")
    assert not arguments.multi_gpu
    assert not arguments.use_fsdp
    assert (arguments.num_processes, arguments.gpu_ids) == (1, "0")


def test_fsdp2_wraps_decoder_layers_and_leaves_the_experts_alone():
    assert load_config_from_file(str(CONFIGS["fsdp2"])).distributed_type == DistributedType.FSDP
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    with patch_environment(**{key: value for key, value in environment.items() if os.environ.get(key) != value}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["MixtralDecoderLayer"]
    assert not plugin.activation_checkpointing
    assert not plugin.cpu_ram_efficient_loading
    layers = MoeArch.from_config(MixtralConfig().to_dict()).layers
    for path in (experts_path(0), f"base_model.model.{experts_path(layers - 1)}"):
        assert re.fullmatch(plugin.ignored_modules, path)
    assert not re.fullmatch(plugin.ignored_modules, "model.layers.0.mlp.gate")
