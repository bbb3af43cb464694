"""What `fuzz.py` tries: for each kind of input the sound files, and the functions that the commands call with them.

Every kind goes as far as the commands do: recipes to TRL's settings and the memory estimate; files of models, adapters
and non-MoE weights into a loaded model that answers once; data files to rows that train; HTTP bodies to a server on
loopback. The models have two layers and a vocabulary of some hundred bytes, so that a case takes milliseconds.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations as mutate
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from finetune.adapter.adapter import Adapter, is_adapter, load
from finetune.adapter.lora import add_attention_lora
from finetune.adapter.non_moe import unfreeze_non_moe
from finetune.data.chat import apply_template
from finetune.data.prepare import prepare_data
from finetune.errors import FinetuneError
from finetune.infer.engine import Engine
from finetune.infer.residency import EngineSettings
from finetune.memory.needs import preflight
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import check_base, load_base, load_tokenizer
from finetune.recipe.load import load_recipe, resolved_yaml
from finetune.serve.admission import Admission
from finetune.serve.app import make_app
from finetune.serve.auth import read_hosts
from finetune.serve.metrics import Metrics
from finetune.serve.server import Server
from finetune.train.settings import training_arguments
from finetune.web.addresses import bind

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Act = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One changed input: its bytes and name, to be kept, and what to do with it."""

    name: str
    content: bytes
    act: Act


@dataclass(frozen=True)
class Material:
    """Folders of sound inputs; never written to."""

    base: Path
    sharded: Path
    quantized: Path
    adapter: Path
    non_moe: Path


def make_material(root: Path) -> Material:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = Material(*(root / name for name in ("base", "sharded", "quantized", "adapter", "non_moe")))
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
    )
    plain = MixtralForCausalLM(config).to(torch.bfloat16)
    plain.save_pretrained(made.base)
    plain.save_pretrained(made.sharded, max_shard_size="80KB")
    for folder in (made.base, made.sharded, made.quantized):
        tokenizer.save_pretrained(folder)
    lora = load_base(BaseSpec(str(made.base)), device="cpu")
    lora.model.save_pretrained(made.quantized)
    full = load_base(BaseSpec(str(made.base), attention="16bit"), device="cpu")
    unfreeze_non_moe(full.model, full.arch)
    for folder, loaded in ((made.adapter, lora), (made.non_moe, full)):
        folder.mkdir()
        model = add_attention_lora(lora.model, lora.arch, r=2) if loaded is lora else full.model
        Adapter.save(model, folder, base=loaded.base, tokenizer=tokenizer)
    return made


class Kind:
    """Makes cases; lives in a worker process of its own."""

    def __init__(self, material: Material, scratch: Path, load_every: int = 1):
        self.material, self.scratch, self.load_every = material, scratch, load_every

    def case(self, rng: Random) -> Case:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what it started."""


class Recipes(Kind):
    """A recipe file and `--set` options."""

    def __init__(self, material: Material, scratch: Path, load_every: int = 1):
        super().__init__(material, scratch, load_every)
        self.files = [
            {
                "model": {"path": str(material.base), "device": "cpu", "dtype": "auto"},
                "quantization": {"attention": "nf4"},
                "trainable": {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "dropout": 0.1}},
                "data": {
                    "train": "rows.jsonl",
                    "eval_fraction": 0.1,
                    "columns": {},
                    "more": [{"path": "x", "weight": 1.0}],
                },
                "training": {"max_steps": 8, "learning_rate": 1e-4, "max_length": 64, "lr_scheduler_type": "cosine"},
                "memory": {"budget_gib": 1.5},
                "router": {"aux": "train", "alarms": {"entropy": 0.5}, "z_coef": 0.1},
                "logging": {"wandb": "offline"},
                "output": {"dir": "run", "push_to_hub": {"repo_id": "a/b"}},
            }
        ]
        from finetune.recipe.training import open_fields

        self.fields = sorted(open_fields())

    def case(self, rng: Random) -> Case:
        recipe = json.loads(json.dumps(rng.choice(self.files)))
        for _ in range(rng.randrange(3)):
            recipe["training"][rng.choice(self.fields)] = mutate.scalar(rng)
        options = [f"{rng.choice(('training.seed', 'model.path', 'x', 'data'))}={mutate.scalar(rng)}"]
        content = mutate.json_of(rng, json.dumps(recipe, indent=1).encode()) if rng.random() < 0.7 else b""
        content = content or mutate.text_of(rng, recipe)
        file, sets = self.scratch / "recipe.yaml", options if rng.random() < 0.1 else []

        def act() -> None:
            file.write_bytes(content)
            read = load_recipe(file, sets)
            resolved_yaml(read)
            device = torch.device("cpu")
            training_arguments(read, device)
            preflight(read, device, device_bytes=rng.choice((None, 8 * 2**30)))

        return Case(f"recipe.yaml {sets}", content, act)


class Files(Kind):
    """Changed files in a folder that a command opens."""

    names: tuple[tuple[str, str], ...]

    def __init__(self, material: Material, scratch: Path, load_every: int = 1):
        super().__init__(material, scratch, load_every)
        self.sources: dict[tuple[str, str], bytes] = {}
        for folder, name in self.names:
            whole = getattr(material, folder)
            shutil.copytree(whole, scratch / folder, dirs_exist_ok=True)
            found = [whole / name] if "*" not in name else sorted(whole.glob(name))[:1]
            self.sources |= {(folder, file.name): file.read_bytes() for file in found}
        base = material.adapter / "base.json"
        assert str(material.base) in base.read_text()

    def changed(self, rng: Random, raw: bytes) -> bytes:
        return mutate.json_of(rng, raw)

    def case(self, rng: Random) -> Case:
        (folder, name), raw = rng.choice(list(self.sources.items()))
        content = self.changed(rng, raw) if not name.endswith(".safetensors") else mutate.safetensors_of(rng, raw)
        file = self.scratch / folder / name
        whole = rng.randrange(self.load_every) == 0

        def act() -> None:
            file.write_bytes(content)
            try:
                if whole:
                    answer(file.parent)
                else:
                    check(file.parent)
            finally:
                file.write_bytes(raw)

        return Case(f"{folder}/{name}", content, act)


class Json(Files):
    """config.json and every other JSON file."""

    names = (
        ("base", "config.json"),
        ("base", "generation_config.json"),
        ("base", "tokenizer_config.json"),
        ("base", "tokenizer.json"),
        ("quantized", "config.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "base.json"),
        ("adapter", "tokenizer_config.json"),
        ("non_moe", "base.json"),
    )


class Headers(Files):
    """Headers of safetensors, and the index of a sharded model."""

    names = (
        ("base", "model.safetensors"),
        ("quantized", "model.safetensors"),
        ("adapter", "adapter_model.safetensors"),
        ("non_moe", "non_moe.safetensors"),
        ("sharded", "model.safetensors.index.json"),
        ("sharded", "model-*.safetensors"),
    )


def check(folder: Path) -> None:
    """All that commands ask of a folder before they load its weights."""
    adapter = Adapter.open(folder) if is_adapter(folder) else None
    spec = BaseSpec(str(folder)) if adapter is None else adapter.require_base()
    check_base(spec)
    load_tokenizer(str(folder))


def answer(folder: Path) -> None:
    """Loads whatever lies there, and runs it on four tokens."""
    loaded = load(str(folder), device="cpu")
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([[1, 2, 3, 4]]))


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
    {"text": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"},
    {"text": "### Human: a### Assistant: b"},
]


class Data(Kind):
    """Rows and files: JSON lines, JSON, CSV, Parquet, Arrow."""

    def __init__(self, material: Material, scratch: Path, load_every: int = 1):
        super().__init__(material, scratch, load_every)
        os.environ["MOE_QLORA_CACHE"] = str(scratch / "cache")
        self.tokenizer = load_tokenizer(str(material.base))
        apply_template(self.tokenizer, "model")
        settings = {
            "model": {"path": str(material.base)},
            "data": {"train": "x", "template": "model", "max_refused": 1.0},
            "training": {"max_length": 64, "dataset_num_proc": 1},
            "output": {"dir": "run"},
        }
        recipe = scratch / "recipe.yaml"
        recipe.write_text(json.dumps(settings))
        self.recipe = load_recipe(recipe)

    def case(self, rng: Random) -> Case:
        row, ending = rng.choice(ROWS), rng.choice(("jsonl", "jsonl", "json", "csv", "parquet", "arrow"))
        rows = [mutate.value_of(rng, row) if rng.random() < 0.4 else row for _ in range(6)]
        content = as_file(rng, rows, row, ending)
        if rng.random() < 0.5:
            content = mutate.bytes_of(rng, content)
        file = self.scratch / f"rows.{ending}"
        choices = {
            "too_long": rng.choice(("truncate", "drop", "split", "cut")),
            "loss_on": rng.choice(("all", "last")),
            "deduplicate": rng.choice(("off", "exact", "near")),
        }
        packing = rng.random() < 0.3

        def act() -> None:
            file.write_bytes(content)
            data = self.recipe.data.model_copy(update={"train": str(file), **choices})
            training = {**self.recipe.training, "packing": packing}
            try:
                prepare_data(self.recipe.model_copy(update={"data": data, "training": training}), self.tokenizer)
            finally:
                shutil.rmtree(self.scratch / "cache", ignore_errors=True)

        return Case(file.name, content, act)


def as_file(rng: Random, rows: list[Any], row: dict[str, Any], ending: str) -> bytes:
    """Rows in a format; a columnar one takes rows of the first one's types only, and repeats it where they differ."""
    if ending == "jsonl":
        return b"".join(mutate.text_of(rng, value) + b"\n" for value in rows)
    if ending == "json":
        return mutate.text_of(rng, rows if rng.random() < 0.5 else {"train": rows})
    if ending == "csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(row)
        writer.writerows([json.dumps(value) for value in row.values()] for _ in rows)
        return text.getvalue().encode()
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        table = pa.Table.from_pylist([row] * len(rows))
    sink = pa.BufferOutputStream()
    if ending == "parquet":
        with contextlib.suppress(pa.ArrowException):
            pyarrow.parquet.write_table(table, sink)
            return bytes(sink.getvalue())
        return b""
    writing = pa.ipc.new_stream if rng.random() < 0.5 else pa.ipc.new_file
    with writing(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


class ServerError(Exception):
    """A 5xx answer, one that is not in OpenAI's form, or none at all: what no body may cause."""


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SETTINGS = {"temperature": 0.7, "top_p": 0.9, "n": 1, "stop": ["x"], "seed": 1, "max_tokens": 2}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": "base", "messages": [{"role": "user", "content": "a"}], "logprobs": True, **SETTINGS}),
    (CHAT, {"messages": PARTS, "stream": True, "top_logprobs": 2, "logprobs": True}),
    (COMPLETIONS, {"prompt": "a", "top_k": 3, "repetition_penalty": 1.1, "min_p": 0.1, "logprobs": 1}),
    (COMPLETIONS, {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}),
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be brief.", "name": "x"},
                *PARTS,
                {"role": "assistant", "content": "</s>", "refusal": None, "tool_calls": []},
                {"role": "user", "content": "And?"},
            ],
            **{"max_completion_tokens": 2, "add_generation_prompt": True, "response_format": {"type": "text"}},
            **{"tools": [], "tool_choice": "none", "logit_bias": {}, "user": "me", "ignore_eos": True},
        },
    ),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "echo": False, "best_of": 1, "stream_options": None}),
]


class Http(Kind):
    """Bodies of requests, to a server on loopback over the engine."""

    def __init__(self, material: Material, scratch: Path, load_every: int = 1):
        super().__init__(material, scratch, load_every)
        self.engine = Engine.load(str(material.base), device="cpu", settings=EngineSettings(max_batch=4))
        admission = Admission(self.engine, Metrics(self.engine.stats), max_waiting=64)
        bound, ready = bind("127.0.0.1", 0), threading.Event()
        app = make_app(admission, max_body_bytes=2**20, key=None, hosts=read_hosts((), bound, None), origins=())
        self.server = Server(app, admission, ready=ready.set)
        threading.Thread(target=self.server.run, kwargs={"sockets": [bound]}, daemon=True).start()
        assert ready.wait(30)
        self.port = bound.getsockname()[1]

    def case(self, rng: Random) -> Case:
        path, body = rng.choice(BODIES)
        content = mutate.json_of(rng, json.dumps({"max_tokens": 2, **body}).encode())
        headers = {"Content-Type": rng.choice(("application/json",) * 9 + ("text/plain",))}
        headers |= {"Content-Encoding": "gzip"} if rng.random() < 0.02 else {}

        def act() -> None:
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            with contextlib.closing(client):
                try:
                    client.request("POST", path, content, headers)
                    response = client.getresponse()
                    text = response.read()
                except (OSError, http.client.HTTPException) as error:
                    raise ServerError(f"no answer: {error!r}") from None
            if response.status not in (200, 400, 404, 413, 415, 429) or b"Traceback" in text:
                raise ServerError(f"{response.status}: {text[:300]!r}")
            if response.status != 200:
                error = json.loads(text)["error"]
                if error.keys() != {"message", "type", "param", "code"}:
                    raise ServerError(f"{response.status}: {text[:300]!r}")
                raise FinetuneError(str(error["message"]))
            streamed = response.headers["content-type"] != "application/json"
            if not (text.endswith(b"data: [DONE]\n\n") if streamed else json.loads(text)["choices"]):
                raise ServerError(f"not an answer: {text[:300]!r}")

        return Case(path, content, act)

    def close(self) -> None:
        self.server.begin_stop(at_once=True)


KINDS: dict[str, type[Kind]] = {"recipe": Recipes, "json": Json, "headers": Headers, "data": Data, "http": Http}


@contextlib.contextmanager
def opened(name: str, material: Material, scratch: Path, load_every: int) -> Iterator[Kind]:
    scratch.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name](material, scratch, load_every)
    try:
        yield kind
    finally:
        kind.close()
