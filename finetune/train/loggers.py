"""Loggers besides the metrics file: Weights & Biases, TensorBoard and trackio, by the recipe's `logging` section.

Why: people compare runs where they keep them. The numbers must be the same everywhere, so nothing here computes any.

How: scalars go by transformers' own callbacks, which all write the `logs` that earlier callbacks filled, under names
that `rewrite_logs` makes of ours: `router/max_vio_worst` becomes `train/router/max_vio_worst`, and
`eval_router/max_vio_worst` becomes `eval/router/max_vio_worst`. The router's pictures (router/media.py) follow under
the same rule, through the run that the scalars' callback opened. All of it stays on this machine unless
`logging.wandb: online`, or a variable of the logger's own (WANDB_*, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL), says
otherwise.

Leaves out: what the loggers themselves sample (hardware), and taking back their points of steps that a resumed run
takes again, except in TensorBoard, which can.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, rewrite_logs

from finetune.errors import FinetuneError, install_command
from finetune.recipe import Recipe
from finetune.router import RouterMedia, RouterMediaCallback, load_heat_map_pixels
from finetune.runfolder import RunFolder


def require_loggers(recipe: Recipe) -> None:
    """Raises a FinetuneError if the recipe asks for a logger whose package is not installed."""
    for package, wanted in (("tensorboard", recipe.logging.tensorboard), ("trackio", recipe.logging.trackio)):
        if wanted and find_spec(package) is None:
            raise FinetuneError(
                f"the package {package} is not installed",
                where=f"logging.{package}: true",
                allowed="true (with the package), false",
                fix=f"{install_command('loggers')}, or set logging.{package}=false",
            )


def logger_callbacks(
    recipe: Recipe, run: RunFolder, vectors: Callable[[], Mapping[str, Sequence[float]]]
) -> list[TrainerCallback]:
    """The callbacks that the recipe asks for, in order; they come after all that add to `logs`.

    Args:
        vectors: `RouterCallback.vectors`, from which the pictures are made.
    """
    callbacks: list[TrainerCallback] = []
    senders: list[Callable[[RouterMedia], None]] = []
    if recipe.logging.wandb != "disabled":
        callbacks.append(_wandb(recipe, run))
        senders.append(_send_to_wandb)
    if recipe.logging.tensorboard:
        callbacks.append(tensorboard := TensorBoard(run.tensorboard))
        senders.append(tensorboard.send)
    if recipe.logging.trackio:
        callbacks.append(Trackio(recipe.logging.project, recipe.logging.run_name))
        senders.append(_send_to_trackio)
    if senders and recipe.router.log:
        draw = load_heat_map_pixels if recipe.router.figures else None
        callbacks.append(RouterMediaCallback(vectors, senders, draw=draw))
    return callbacks


def _wandb(recipe: Recipe, run: RunFolder) -> WandbCallback:
    """wandb's callback by the recipe; offline needs no account. WANDB_* variables that are set win."""
    os.environ.setdefault("WANDB_MODE", recipe.logging.wandb)
    os.environ.setdefault("WANDB_PROJECT", recipe.logging.project)
    os.environ.setdefault("WANDB_DIR", str(run.root))
    if recipe.logging.run_name is not None:
        os.environ.setdefault("WANDB_NAME", recipe.logging.run_name)
    return WandbCallback()


def _send_to_wandb(media: RouterMedia) -> None:
    import wandb  # here and below, because most runs do without

    shown = rewrite_logs(media.named(lambda values: wandb.Histogram(values.tolist()), wandb.Image))
    wandb.log({**shown, "train/global_step": media.step})


class TensorBoard(TensorBoardCallback):
    """Writes to one folder; a resumed run hides what the earlier one wrote after the checkpoint.

    Args:
        folder: gets one event file for each process that trained.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.tb_writer is None and state.global_step > 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)

    def send(self, media: RouterMedia) -> None:
        if self.tb_writer is None:
            return
        for tag, values in rewrite_logs(media.named(lambda values: values, lambda pixels: pixels)).items():
            if values.ndim == 1:
                self.tb_writer.add_histogram(tag, values, media.step)
            else:
                self.tb_writer.add_image(tag, values, media.step, dataformats="HWC")
        self.tb_writer.flush()


class Trackio(TrackioCallback):
    """Writes to trackio's database: TRACKIO_DIR, or its folder in the Hugging Face cache, for all projects.

    Args:
        project: name of the project.
        run_name: name of the run; trackio invents one for None.
    """

    def __init__(self, project: str, run_name: str | None):
        super().__init__()
        self.project, self.run_name = project, run_name

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        # On a copy: were the name an argument of the trainer, wandb would prefer it to WANDB_NAME.
        args = copy.copy(args)
        args.project, args.run_name = self.project, self.run_name
        super().setup(args, state, model, **kwargs)


def _send_to_trackio(media: RouterMedia) -> None:
    import trackio

    shown = rewrite_logs(media.named(trackio.Histogram, trackio.Image))
    trackio.log({**shown, "train/global_step": media.step})


@contextlib.contextmanager
def loggers_in_use(recipe: Recipe) -> Iterator[None]:
    """Around training: the loggers' runs end with it, and what Weights & Biases refuses gets a way on.

    Left to the end of the process, both loggers would print into the report.
    """
    with contextlib.ExitStack() as stack:
        if recipe.logging.wandb != "disabled":
            stack.enter_context(_wandb_in_use(recipe))
        if recipe.logging.trackio:
            stack.callback(_finish_trackio)
        yield


def _finish_trackio() -> None:
    """Ends a run that an error left open."""
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


@contextlib.contextmanager
def _wandb_in_use(recipe: Recipe) -> Iterator[None]:
    """Ends the run that training opened, and turns a missing key or network into a message with a way on."""
    import wandb

    found_open = wandb.run is not None
    try:
        try:
            yield
        except BaseException:
            _finish_wandb(found_open, exit_code=1)
            raise
        _finish_wandb(found_open, exit_code=0)
    except wandb.Error as error:
        raise FinetuneError(
            f"Weights & Biases cannot be used: {error}",
            where=f"logging.wandb: {recipe.logging.wandb}",
            allowed="disabled, offline, online",
            fix="run `wandb login` or set WANDB_API_KEY; or go on with --resume --set logging.wandb=offline",
        ) from error


def _finish_wandb(found_open: bool, *, exit_code: int) -> None:
    import wandb

    if wandb.run is not None and not found_open:
        wandb.finish(exit_code=exit_code)
