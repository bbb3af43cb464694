"""Adapters as they were trained: their own tokenizer and template under every name, the base that they name or are
given, merges that equal stock PEFT, and one verdict on settings that would answer otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.adapter.adapter import Adapter
from finetune.adapter.settings import IDLE_FIELDS, READ_FIELDS, read_lora_settings
from finetune.errors import AdapterError, DataError, ModelError
from finetune.evaluate.models import open_compared
from finetune.infer.engine import Engine
from finetune.infer.generation import generate
from finetune.infer.request import FinishedEvent, Request, Sampling, TokenEvent
from finetune.infer.residency import EngineSettings
from finetune.moe.load import load_tokenizer
from tests.export.tunings import tuned
from tests.running import refused, run_finetune
from tests.serve.serving import Serving, serving

QUESTION: Any = [{"role": "user", "content": "Hi"}]
ASKED = "{% for m in messages %}{{ bos_token }}Q: {{ m['content'] }} A:{% endfor %}"
TOLD = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<answer>"
SETTINGS = EngineSettings(max_batch=4, max_length=128, kv_gib=0.25)


def edited(folder: Path, name: str, **changes: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def foreign(saved_adapter: Path, tmp_path: Path) -> Path:
    """An adapter as another toolkit leaves it: nothing but PEFT's two files."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(saved_adapter / name, folder / name)
    return folder


# ---- tokenizer and chat template ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speakers(small_mixtral: Path, saved_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters, with two templates, of a base that has none."""
    root = tmp_path_factory.mktemp("speakers")
    edited(shutil.copytree(small_mixtral, root / "base"), "tokenizer_config.json", chat_template=None)
    for name, template in (("asked", ASKED), ("told", TOLD)):
        folder = shutil.copytree(saved_adapter, root / name)
        (folder / "chat_template.jinja").write_text(template)
        edited(folder, "base.json", path=str(root / "base"))
    return root / "asked", root / "told"


@pytest.fixture(scope="module")
def engine(speakers: tuple[Path, Path]) -> Iterator[Engine]:
    asked, told = speakers
    with Engine.load(str(asked), adapters={"told": str(told)}, device="cpu", settings=SETTINGS) as made:
        yield made


def by_transformers(folder: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(folder).apply_chat_template(QUESTION, return_dict=True)["input_ids"])


def tokens(engine: Engine, ids: tuple[int, ...], model: str) -> list[int]:
    request = Request(ids, Sampling(max_new_tokens=6, ignore_eos=True), model)
    return [event.token for event in engine.stream(request) if isinstance(event, TokenEvent)]


def test_each_name_is_asked_by_its_own_template(engine: Engine, speakers: tuple[Path, Path]) -> None:
    for name, folder in zip(("asked", "told"), speakers, strict=True):
        assert engine.encode_chat(QUESTION, name) == by_transformers(folder)
    with pytest.raises(DataError, match="no chat template"):
        engine.encode_chat(QUESTION, "base")
    # `generate` asks the first model, whose base has no template.
    answer = generate(engine, "Hi", Sampling(max_new_tokens=6))
    assert answer.prompt_tokens == len(by_transformers(speakers[0]))


def test_over_http_too(engine: Engine, speakers: tuple[Path, Path]) -> None:
    def ask(served: Serving, model: str) -> httpx.Response:
        asked = {"max_tokens": 6, "temperature": 0, "logprobs": True, "ignore_eos": True}
        return httpx.post(f"{served.url}/chat/completions", json={"model": model, "messages": QUESTION, **asked})

    with serving(engine) as served:
        for name, folder in zip(("asked", "told"), speakers, strict=True):
            ids, said = by_transformers(folder), ask(served, name).json()
            assert said["usage"]["prompt_tokens"] == len(ids)
            own = AutoTokenizer.from_pretrained(folder)
            expected = [own.convert_ids_to_tokens(token).replace("▁", " ") for token in tokens(engine, ids, name)]
            assert [one["token"] for one in said["choices"][0]["logprobs"]["content"]] == expected
        refusal = ask(served, "base")
        assert refusal.status_code == 400
        assert "no chat template" in refusal.json()["error"]["message"]


def test_each_name_ends_by_its_own_end_of_sequence(saved_adapter: Path, tmp_path: Path) -> None:
    ids = (1, 450, 4996)  # the small model's embeddings are tied: it says the last token again
    other = shutil.copytree(saved_adapter, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])
    tokenizer.save_pretrained(other)
    adapters = {"other": str(other)}
    with Engine.load(str(saved_adapter), name="tuned", adapters=adapters, device="cpu", settings=SETTINGS) as engine:
        last = [list(engine.stream(Request(ids, Sampling(max_new_tokens=3), name)))[-1] for name in engine.names]
    reasons = [
        (name, end.reason) for name, end in zip(engine.names, last, strict=True) if isinstance(end, FinishedEvent)
    ]
    assert reasons == [("tuned", "length"), ("base", "length"), ("other", "stop")]


def test_a_tokenizer_with_more_tokens_than_the_base_has(engine: Engine, saved_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_adapter, tmp_path / "wide")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {number}>" for number in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(AdapterError, match="tokenizer has 32005 tokens, the base's embedding 32000"):
        Adapter.open(folder).tokenizer_on(engine.loaded)


# ---- which base -----------------------------------------------------------------------------------------------


def test_an_adapter_without_base_json_runs_on_the_base_that_is_named(
    foreign: Path, small_mixtral: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(small_mixtral, tmp_path / "moved")
    edited(foreign, "adapter_config.json", base_model_name_or_path="gone/away")
    with pytest.raises(AdapterError, match="the base that the adapter names cannot be read") as caught:
        Engine.load(str(foreign), device="cpu")
    assert "fix: name the base, a folder or hub id, with --base" in str(caught.value)
    ran = run_finetune("generate", foreign, "--base", moved, "--prompt", "Hi", "--max-new-tokens", 2, "--device", "cpu")
    assert ran.status == 0, ran.stderr
    with Engine.load(str(moved), adapters={"x": str(foreign)}, device="cpu", settings=SETTINGS) as engine:
        assert engine.names == ("moved", "x")
    edited(foreign, "adapter_config.json", base_model_name_or_path=str(small_mixtral))
    named = Adapter.open(foreign).require_base()
    assert (named.path, named.attention) == (str(small_mixtral), "nf4")
    edited(foreign, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="does not say which base it was trained on"):
        Adapter.open(foreign).require_base()


def test_a_base_that_is_named_for_no_adapter(small_mixtral: Path, saved_adapter: Path, tmp_path: Path) -> None:
    says = (
        f"--base names the base of an adapter, and there is none in {small_mixtral}",
        f"where: --base {saved_adapter}",
        "fix: leave --base out, or give the adapter's folder instead of a model's",
    )
    base = ("--base", saved_adapter, "--device", "cpu")
    refused(tmp_path, "generate", small_mixtral, *base, "--prompt", "Hi", says=says)
    refused(tmp_path, "serve", small_mixtral, *base, "--adapter", f"x={saved_adapter}", says=says)
    refused(tmp_path, "chat", small_mixtral, *base, "--residency", "offload", says=says)
    refused(tmp_path, "router", "analyze", small_mixtral, *base, says=says)
    with pytest.raises(AdapterError, match="there is none in") as caught:
        open_compared(str(small_mixtral), [str(small_mixtral)], base=str(saved_adapter))
    assert f"{small_mixtral} or {small_mixtral}" in str(caught.value)
    # Where one of several is an adapter, it is that one's.
    assert len(open_compared(str(small_mixtral), [str(saved_adapter)], base=str(small_mixtral))) == 2


@pytest.mark.parametrize(
    "command",
    ["merge", "evaluate", "generate --prompt Hi", "chat", "serve", "router drift", "router analyze", "adapter inspect"],
)
def test_a_base_without_a_name(saved_adapter: Path, tmp_path: Path, command: str) -> None:
    first, *others = command.split()
    output = ("--output", tmp_path / "merged") if command == "merge" else ()
    with pytest.raises(typer.BadParameter, match="it is empty; name a folder or hub id, or leave --base out"):
        run_finetune(first, *others, saved_adapter, "--base", " ", *output)
    assert not list(tmp_path.iterdir())


def test_a_damaged_folder_is_not_taken_for_one_that_never_had_the_file(saved_adapter: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(saved_adapter, tmp_path / "damaged")
    (damaged / "tokenizer_config.json").unlink()
    (damaged / "tokenizer.json").write_text("{")
    adapter = Adapter.open(damaged)
    assert adapter.tokenizer_of == str(damaged)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(adapter.tokenizer_of)
    (damaged / "base.json").unlink()
    (damaged / "base.json").symlink_to(damaged / "base.json")
    with pytest.raises(AdapterError, match=r"base\.json"):
        Adapter.open(damaged)


def test_the_base_is_stored_as_its_adapters_were_trained(
    small_mixtral: Path, saved_adapter: Path, tmp_path: Path
) -> None:
    wide = edited(shutil.copytree(saved_adapter, tmp_path / "wide"), "base.json", attention="16bit")
    with Engine.load(str(small_mixtral), adapters={"wide": str(wide)}, device="cpu", settings=SETTINGS) as engine:
        assert engine.loaded.base.attention == "16bit"
    with pytest.raises(AdapterError, match="trained with the attention in nf4") as caught:
        Engine.load(str(wide), adapters={"nf4": str(saved_adapter)}, device="cpu", settings=SETTINGS)
    assert "attention in 16bit" in str(caught.value)


# ---- merging what another toolkit trained ---------------------------------------------------------------------


def stock_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """A float32 model with an adapter that stock PEFT made and saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    made.save_pretrained(folder)
    return made.eval()


def test_an_unrecorded_merge_equals_stock_peft_and_claims_nothing(small_mixtral: Path, tmp_path: Path) -> None:
    live = stock_adapter(small_mixtral, tmp_path / "stock")
    ran = run_finetune("merge", tmp_path / "stock", "--format", "fp16", "--output", tmp_path / "merged")
    assert ran.status == 0, ran.stderr
    assert (
        "does not say what it was trained on (it has no base.json): it is merged onto its base's 16-bit" in ran.stdout
    )
    about = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (about["onto"], about["trained_on"]) == ("original", None)
    serving_text = (tmp_path / "merged" / "SERVING.md").read_text()
    assert "The adapter does not say what it was trained on" in serving_text
    assert "was trained with" not in serving_text
    assert "this is the model that was trained" not in serving_text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.randint(3, 32000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (live, merged))
    # Measured 3e-9: float16 rounds the merged weights once.
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-6
    assert torch.equal(p.argmax(-1), q.argmax(-1))


def test_onto_trained_is_the_users_word_and_nf4_says_so(foreign: Path, small_mixtral: Path, tmp_path: Path) -> None:
    for format, onto in (("bf16", ("--onto", "trained")), ("nf4", ("--rows", 0))):
        ran = run_finetune("merge", foreign, "--format", format, *onto, "--output", tmp_path / format)
        assert ran.status == 0, ran.stderr
        assert ("merged onto the 4-bit values of its base" in ran.stdout) == (format == "nf4")
        serving_text = (tmp_path / format / "SERVING.md").read_text()
        assert "was trained with" not in serving_text


# ---- settings of PEFT -----------------------------------------------------------------------------------------

CHANGES_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "of_a_later_peft")
REFUSED: dict[str, Any] = {
    "fan_in_fan_out": True,
    "layers_to_transform": [0],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "megatron_config": {"a": 1},
    "trainable_token_indices": [5],
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
}


def test_every_field_of_peft_has_a_verdict() -> None:
    """Fails when a PEFT with a new field is installed: decide whether an adapter that uses it computes W + s B A."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} == {*READ_FIELDS, *IDLE_FIELDS, *REFUSED}


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": how} for how in CHANGES_BASE] + [{name: value} for name, value in REFUSED.items()],
    ids=[*CHANGES_BASE, *REFUSED],
)
def test_what_would_not_answer_as_trained_is_refused_by_name(foreign: Path, changes: dict[str, Any]) -> None:
    edited(foreign, "adapter_config.json", **changes)
    [(name, value)] = changes.items()
    with pytest.raises(AdapterError, match="is not LoRA of one rank on the attention") as caught:
        read_lora_settings(foreign)
    assert f"{name} is {value!r}" in str(caught.value)
    assert ("changes the base's own weights" in str(caught.value)) == (name == "init_lora_weights")


def test_every_command_has_the_same_verdict_before_anything_is_loaded(foreign: Path, small_mixtral: Path) -> None:
    edited(foreign, "adapter_config.json", init_lora_weights="olora")
    of_base = ("--base", small_mixtral)
    out = ("--output", foreign.parent / "out")
    rows = ("--data", foreign / "adapter_config.json")
    for args in (
        ("generate", foreign, *of_base, "--prompt", "Hi"),
        ("chat", foreign, *of_base),
        ("serve", foreign, *of_base, "--port", 0),
        ("serve", small_mixtral, "--port", 0, "--adapter", f"x={foreign}"),
        ("merge", foreign, *of_base, *out),
        ("merge", foreign, *of_base, *out, "--format", "gguf"),
        ("evaluate", foreign, *of_base, *rows, "--compare", "base"),
        ("adapter", "inspect", foreign, *of_base),
        ("router", "drift", foreign, *of_base),
    ):
        says = ("is not LoRA of one rank on the attention: init_lora_weights is 'olora', which changes the base",)
        ran = refused(foreign.parent, *args, says=says)
        assert "Loading weights" not in ran.stderr, args


@pytest.mark.parametrize("how", [False, "gaussian", "eva", "orthogonal", "mica"])
def test_mere_initializations_load_and_equal_stock_peft(
    foreign: Path, saved_adapter: Path, small_mixtral: Path, how: str | bool
) -> None:
    edited(foreign, "adapter_config.json", init_lora_weights=how)
    adapter = Adapter.open(foreign, base=str(small_mixtral))
    found = dict(adapter.put_on(adapter.load_base(device="cpu")).model.named_parameters())
    stock = AutoModelForCausalLM.from_pretrained(small_mixtral, dtype=torch.float32)
    expected = dict(PeftModel.from_pretrained(stock, str(saved_adapter)).named_parameters())
    for name, weight in expected.items():
        if "lora_" in name:
            assert torch.equal(found[name].float(), weight), name


def test_parts_of_the_attention_merge_with_the_comparison(
    small_mixtral: Path, conversations: Path, tmp_path: Path
) -> None:
    tuned(small_mixtral, tmp_path / "adapter", target_modules=("q_proj", "v_proj"))
    args = ("--data", conversations, "--rows", 2, "--device", "cpu")
    ran = run_finetune("merge", tmp_path / "adapter", "--output", tmp_path / "merged", *args)
    assert ran.status == 0, ran.stderr
    report = json.loads((tmp_path / "merged" / "fidelity.json").read_text())["fidelity"]
    # bf16 rounds the values of all of the attention once; the adapter moves far more.
    assert report["kl"] < 1e-4
    assert report["greedy_agreement"] > 0.97
