"""Trains recipes in several CPU processes, one after the other: `python training_processes.py PROCESSES RECIPE...`.

A recipe whose file name begins with `fsdp2` runs as `accelerate launch --config_file accelerate_configs/fsdp2.yaml`
would run it. accelerate offers FSDP for devices only; torch's own works over gloo as well, so accelerate is told here
that it has one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from finetune.console import Report
from finetune.recipe.load import load_recipe
from finetune.train.run import train
from tests.conftest import REPOSITORY
from tests.processes import be_processes


def sharding() -> dict[str, str]:
    """What the launch file puts into the environment."""
    config = str(REPOSITORY / "accelerate_configs" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", config, "scripts/train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {key: value for key, value in environment.items() if "FSDP" in key}


def run(recipe: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if "FSDP" in name]:
        del os.environ[name]
    begin = PartialState.__init__
    if recipe.name.startswith("fsdp2"):
        os.environ.update(sharding())

        def as_on_devices(self: PartialState, *args: Any, **kwargs: Any) -> None:
            fresh = not PartialState._shared_state
            begin(self, *args, **kwargs)
            if fresh:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = as_on_devices  # type: ignore[method-assign]
    try:
        train(load_recipe(recipe), Report(as_json=True))
        assert (PartialState().distributed_type == DistributedType.FSDP) is recipe.name.startswith("fsdp2")
    finally:
        PartialState.__init__ = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    be_processes(lambda: [run(Path(recipe)) for recipe in sys.argv[2:]], int(sys.argv[1]))
