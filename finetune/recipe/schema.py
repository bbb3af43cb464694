"""The recipe as types: what a run is, in nine sections.

Every section is frozen, typed strictly (no text becomes a number) and refuses keys it does not know. Descriptions
are the docstrings below the attributes; editors show them by way of the JSON Schema. Nothing here reads files:
`load_recipe` does, and turns what pydantic finds into errors with lines. `training` is a plain dict because its
keys are those of the installed TRL; `training.py` checks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from finetune.moe import ATTENTION_PROJECTIONS, why_no_lora
from finetune.recipe.faults import Fault
from finetune.recipe.training import check_training, training_schema

Text = Annotated[str, Field(min_length=1)]
SELF_MADE = "recipe_faults"
"""Type of the pydantic errors that carry our own `Fault`s, under this key of their context."""


class Section(BaseModel):
    """What all sections share."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, given: Any) -> Any:
        """`router:` with every key commented out reads as null; it means a section that says nothing."""
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        sections = {name for name in fields if fields[name].annotation == dict[str, Any] or _is_section(fields[name])}
        return {key: {} if value is None and key in sections else value for key, value in given.items()}


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


class ModelSection(Section):
    """The base model and how it is held in memory."""

    path: Text
    """Folder or hub id of a Mixtral, Qwen3-MoE or OLMoE checkpoint; "./" and "../" start at the recipe's folder."""
    revision: Text | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of what is not quantized and of the arithmetic; auto: bfloat16 on a GPU that has it, float32 on the CPU."""
    attn_implementation: Text = "auto"
    """Name of a transformers attention function; auto: "varlen" (no padding, no mask) where it runs, else "sdpa"."""
    experts_backend: Literal["auto", "grouped", "loop"] = "auto"
    """Experts in one grouped product (bfloat16, H100 or later) or one by one (least memory); auto: the faster one."""
    fused_layers: Literal["auto"] | bool = "auto"
    """RMSNorm and rotary embedding by liger-kernel; auto: on a GPU, where it is installed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto takes a GPU when there is one."""


class QuantizationSection(Section):
    """What is stored in 4 bits."""

    experts: Literal["nf4"] = "nf4"
    """NF4 in blocks of 64 with double quantization, expert by expert."""
    attention: Literal["nf4", "16bit"] = "nf4"
    """q/k/v/o projections: NF4, or left in 16 bits."""


class LoraSection(Section):
    """The adapter of `method: attention_lora`."""

    r: Annotated[int, Field(gt=0)] = 16
    """Rank."""
    alpha: Annotated[int, Field(gt=0)] = 32
    """The update is scaled by alpha / r, or by alpha / sqrt(r) with rank stabilization."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    """Attention projections that get an adapter, in every layer."""
    use_rslora: bool = False
    """Rank-stabilized scaling."""
    use_dora: bool = False
    """Weight-decomposed adapters: a magnitude per output besides."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _attention_only(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []
        path, allowed = ("trainable", "lora", "target_modules"), ", ".join(ATTENTION_PROJECTIONS)
        refused = [no for name in names if isinstance(name, str) and (no := why_no_lora(name)) is not None]
        if refused:
            raise _custom([Fault(path, no.what, allowed, no.fix) for no in refused])
        return given

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            path = ("trainable", "lora", "target_modules")
            raise _custom([Fault(path, f"{', '.join(twice)} named twice", fix="name each module once")])
        return names


class TrainableSection(Section):
    """Which parameters train."""

    method: Literal["attention_lora", "non_moe"] = "attention_lora"
    """LoRA on the attention, or everything but the experts (norms, embeddings, head and attention) in full."""
    lora: LoraSection = LoraSection()
    """Read by `method: attention_lora` only."""
    router: bool = False
    """Train the routers too, in float32 and in full, whatever the method."""
    router_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """With `router: true`: the routers' own learning rate, under the run's schedule; null: the run's."""


DataFormat = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "chatml_text", "inst_text", "human_text"
]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# JSON has one kind of number, and 1 is a weight too.
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DataSource(Section):
    """One more set to train on, with rows of its own form."""

    path: Text
    """File, folder or hub id; "./" and "../" start at the recipe's folder."""
    split: Text = "train"
    """Name of a split, or a slice of one as in `train[:1000]`."""
    weight: Weight = 1.0
    """Rows drawn from it, relative to the other sources."""
    format: DataFormat = "auto"
    """As `data.format`."""
    columns: dict[str, str] = {}
    """As `data.columns`."""
    roles: dict[str, str] = {}
    """As `data.roles`."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Its first rows only."""


class DataSection(Section):
    """Conversations to train and to evaluate on. What the assistant says is supervised, nothing else."""

    train: Text
    """JSON lines, JSON, Parquet, CSV or Arrow file, a folder of them, or hub id; "./" starts at the recipe's folder."""
    train_split: Text = "train"
    """Name of a split, or a slice of one as in `train[:1000]`."""
    more: Annotated[tuple[DataSource, ...], Field(strict=False)] = ()
    """Further sets to train on, interleaved with `train` by weight."""
    train_weight: Weight = 1.0
    """With `more`: rows drawn from `train`, relative to the other sources."""
    mixture: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """With `more`, an epoch ends when every set has been seen whole (small ones again), or when the first one has."""
    streaming: bool = False
    """Read hub ids as a stream, without downloading them whole."""
    eval: Text | None = None
    """Held-out data, as `train`; without it `eval_split` is taken from `train`."""
    eval_split: Text | None = None
    """Split to evaluate on."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the conversations of `train`, drawn by `training.seed`; equal ones stay on one side."""
    eval_rows: Annotated[int, Field(gt=0)] | None = None
    """Hold out so many conversations of `train`, drawn as `eval_fraction`."""
    format: DataFormat = "auto"
    """How a row holds its conversation; auto looks at the first row."""
    columns: dict[str, str] = {}
    """Our name of a column to the data's: `{prompt: question, completion: answer}`."""
    roles: dict[str, str] = {}
    """The data's name of a role to ours: `{customer: user, agent: assistant}`."""
    template: Text = "auto"
    """mistral-v1, mistral-v3, chatml, model (the tokenizer's own), a .jinja file; auto: what the tokenizer is for."""
    loss_on: Literal["all", "last", "completion"] = "all"
    """Every assistant turn, the last, or the completion of a prompt; a turn with `train: false` is never learnt."""
    too_long: Literal["truncate", "drop", "split", "cut"] = "truncate"
    """Longer than `training.max_length`: end at a turn's end, leave out, make several rows, or cut anywhere."""
    deduplicate: Literal["off", "exact", "near"] = "off"
    """Keep one of equal conversations, or of those that share most of their words (MinHash)."""
    max_refused: Share = 0.05
    """Largest share of rows that may be unusable; training refuses to start beyond it."""
    tokens_per_batch: Annotated[int, Field(gt=0)] | None = None
    """Batches of so many tokens, padding included, in place of a number of rows; without packing."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Train on the first rows only."""
    max_eval_rows: Annotated[int, Field(gt=0)] | None = None
    """Evaluate on the first rows only."""

    @property
    def evaluates(self) -> bool:
        """Whether anything is held out."""
        return any(value is not None for value in (self.eval, self.eval_split, self.eval_fraction, self.eval_rows))

    @model_validator(mode="after")
    def _held_out_once(self) -> DataSection:
        named = "`eval`" if self.eval is not None else "`eval_split`" if self.eval_split is not None else None
        if self.eval_fraction is not None and self.eval_rows is not None:
            what = "`eval_fraction` and `eval_rows` both say how many conversations are held out"
            raise _custom([Fault(("data", "eval_rows"), what, fix="keep one of the two")])
        drawn = "eval_fraction" if self.eval_fraction is not None else "eval_rows"
        if named is not None and (self.eval_fraction is not None or self.eval_rows is not None):
            what = f"`{drawn}` draws the held-out conversations from `train`, and {named} names others"
            raise _custom([Fault(("data", drawn), what, fix="keep one of the two")])
        return self


class MemorySection(Section):
    """How much of the device a run may use."""

    budget_gib: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """GiB that this process may use, to which activations are planned; null: what is free on the device."""


class RouterAlarmsSection(Section):
    """When a router needs a look, compared with the base."""

    action: Literal["off", "warn", "stop"] = "warn"
    """Raise none, say it and go on, or save a checkpoint and stop."""
    load_change: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 40.0
    """Largest change of an expert's load on the probe, in multiples of what chance shows; null never alarms."""
    dead_experts: bool = True
    """An expert that the base used gets less than a tenth of an even share."""
    entropy: Share = 0.5
    """Smallest share of the base's entropy, of a token's choice and of the load; 0 never alarms."""


class RouterSection(Section):
    """Watching and steering the routers."""

    log: bool = True
    """Log load, MaxVio, entropy, z-loss, repetition and what else docs/router_metrics.md names."""
    metrics: Literal["brief", "detailed"] = "brief"
    """A dozen scalars, or every metric of every layer besides. The metrics file has the layers either way."""
    probe_tokens: Annotated[int, Field(ge=0)] = 4096
    """Tokens of held-out data (of training data without any) on which the run is compared with its base; 0: none."""
    probe_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two such comparisons; null: with each evaluation, or at most ten times a run without any."""
    alarms: RouterAlarmsSection = RouterAlarmsSection()
    """What is said, or stops the run, when a router goes wrong."""
    aux: Literal["off", "monitor", "train"] = "monitor"
    """Balance and z-loss of the routers: left alone, watched among the metrics, or trained on beside the loss."""
    balance_coef: Coefficient = 0.01
    """With `aux: train`: weight of the load-balancing loss per layer, which is 1 when even."""
    z_coef: Coefficient = 0.001
    """With `aux: train`: weight of the z-loss, the mean of logsumexp(router logits) squared."""
    figures: bool = True
    """Write the heat map of layer x expert load."""


class LoggingSection(Section):
    """Where metrics go besides the JSON-lines file, which is always written."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; offline needs neither an account nor a network."""
    tensorboard: bool = False
    """TensorBoard, into the folder `tensorboard` of `output.dir`; needs the extra `loggers`."""
    trackio: bool = False
    """trackio, into its database on this machine (TRACKIO_DIR); needs the extra `loggers`."""
    project: Text = "moe-qlora"
    """Project of Weights & Biases and of trackio."""
    run_name: Text | None = None
    """Name of the run in both; they invent one otherwise. trackio continues an earlier run of the same name."""


class PushSection(Section):
    """A repository on the Hugging Face Hub; its token is that of `hf auth login`, or HF_TOKEN."""

    repo_id: Text
    """name or owner/name."""
    private: bool = False
    """A new repository is private, and an existing public one is refused."""
    branch: Text | None = None
    """Branch to write to, made where there is none; null: the default branch."""


class OutputSection(Section):
    """What a run leaves behind."""

    dir: Text
    """Folder for adapter, checkpoints, metrics and figures; relative to the working directory."""
    push_to_hub: PushSection | None = None
    """Where the adapter goes at the end, with a model card; null: nowhere. `finetune push` does the same later."""


class Recipe(Section):
    """One run, fully described."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    trainable: TrainableSection = TrainableSection()
    data: DataSection
    training: dict[str, Any] = Field(default={}, validate_default=True)
    """Passed to TRL's `SFTConfig`; only what differs from its defaults need be said."""
    memory: MemorySection = MemorySection()
    router: RouterSection = RouterSection()
    logging: LoggingSection = LoggingSection()
    output: OutputSection

    @field_validator("training")
    @classmethod
    def _training_fits_trl(cls, given: dict[str, Any]) -> dict[str, Any]:
        values, faults = check_training(given)
        if faults:
            raise _custom(faults)
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        trainable, router, data, training = self.trainable, self.router, self.data, self.training
        faults = []
        if trainable.method == "non_moe" and self.quantization.attention == "nf4":
            what = "`trainable.method: non_moe` trains the attention in full, and NF4 weights cannot be trained"
            fix = "set `quantization.attention: 16bit`, or train with `trainable.method: attention_lora`"
            faults.append(Fault(("quantization", "attention"), what, "16bit", fix))
        if trainable.router_learning_rate is not None and not trainable.router:
            what = "`trainable.router_learning_rate` is the routers', and they do not train"
            fix = "remove it, or set `trainable.router: true`"
            faults.append(Fault(("trainable", "router_learning_rate"), what, "null", fix))
        if router.aux == "train" and router.balance_coef == router.z_coef == 0:
            what = "`router.aux: train` has nothing to train on: `router.balance_coef` and `router.z_coef` are both 0"
            fix = "set one of the coefficients, or `router.aux: monitor`"
            faults.append(Fault(("router", "aux"), what, "off, monitor", fix))
        if training.get("eval_strategy", "no") != "no" and not data.evaluates:
            what = "`training.eval_strategy` asks for evaluation, and there is nothing to evaluate on"
            fix = "set `data.eval`, `data.eval_split` or `data.eval_fraction`, or `training.eval_strategy: no`"
            faults.append(Fault(("training", "eval_strategy"), what, None, fix))
        if data.tokens_per_batch is not None and training.get("packing"):
            what = "`training.packing` fills rows to `training.max_length`; batches by tokens are of rows as they are"
            faults.append(Fault(("data", "tokens_per_batch"), what, None, "remove one of the two"))
        if faults:
            raise _custom(faults)
        return self


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors. `training` lists the fields of the installed TRL."""
    schema = Recipe.model_json_schema()
    training = schema["properties"]["training"]
    schema["properties"]["training"] = training_schema() | {"description": training["description"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _custom(faults: list[Fault]) -> PydanticCustomError:
    text = "; ".join(fault.what if fault.fix is None else f"{fault.what} ({fault.fix})" for fault in faults)
    return PydanticCustomError(SELF_MADE, "{text}", {"text": text, SELF_MADE: faults})
