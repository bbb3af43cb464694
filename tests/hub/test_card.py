"""The card in every form: what is pushed decides what it says on loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finetune.export.card import RunFacts, make_card
from finetune.export.hub import Destination, Kind
from finetune.moe.base_spec import BaseSpec
from finetune.runfolder import RunFolder

TO = Destination("ada/tuned")
PLAIN, NF4 = {"model_type": "mixtral"}, {"quantization_config": {"quant_method": "moe_4bit"}}


def card(run: Path, kind: Kind, files: set[str], *, base: str | None = None, merged: Path | None = None) -> ModelCard:
    facts = RunFacts.read(RunFolder(run))
    if base is not None:
        facts = replace(facts, base=BaseSpec(base, "abc", "nf4", "0" * 64))
    licence = {"license": "other", "license_name": "research-only", "license_link": "https://example.org/licence"}
    text = make_card(facts, TO, kind, files={*files, "figures/training.png"}, licence=licence, merged=merged)
    assert "None" not in text
    assert "\n\n\n\n" not in text
    return ModelCard(text)


def test_an_adapter_of_a_base_on_the_hub(finished_run: Path) -> None:
    made = card(finished_run, "LoRA adapter", {"adapter_config.json"}, base="owner/base")
    assert made.data.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "datasets": ["HuggingFaceH4/no_robots"],
        "library_name": "peft",
        "license": "other",
        "license_name": "research-only",
        "license_link": "https://example.org/licence",
        "pipeline_tag": "text-generation",
        "tags": ["moe-qlora", "mixture-of-experts", "qlora", "sft", "lora"],
    }
    for words in (
        "[owner/base](https://huggingface.co/owner/base), revision `abc`",
        "[research-only](https://example.org/licence), the base's",
        'AutoModelForCausalLM.from_pretrained("owner/base", dtype="bfloat16"',
        'AutoModelForCausalLM.from_pretrained("ada/tuned", dtype="bfloat16"',
    ):
        assert words in made.text
    assert "stands for it" not in made.text


def test_a_non_moe_tuning(finished_run: Path) -> None:
    made = card(finished_run, "non-MoE tuning", {"non_moe.json"}, base="owner/base").text
    assert "the base's own parameters outside of the experts" in made
    assert "finetune generate tuned" in made
    assert "PeftModel" not in made


@pytest.mark.parametrize(
    ("config", "file", "says", "says_not"),
    [
        (NF4, "model.safetensors", "from finetune import Moe4bitConfig  # registers the storage of the", "GGUF"),
        (PLAIN, "model.safetensors", "or whatever serves a plain checkpoint (SERVING.md", "import finetune"),
        (None, "tuned-q8_0.gguf", "LM Studio read `tuned-q8_0.gguf`; SERVING.md", "finetune pull"),
    ],
    ids=["nf4", "plain", "gguf"],
)
def test_a_merged_model(
    finished_run: Path, tmp_path: Path, config: dict[str, object] | None, file: str, says: str, says_not: str
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    files = {file, "SERVING.md"}
    if config is not None:
        (merged / "config.json").write_text(json.dumps(config))
        files.add("config.json")
    made = card(finished_run, "model", files, base="owner/base", merged=merged)
    assert made.data.to_dict()["base_model_relation"] == "finetune"
    assert says in made.text
    assert says_not not in made.text
    assert "What merging changed" not in made.text


def test_the_routers_are_shown_where_they_were_watched(finished_run: Path) -> None:
    line = {"step": 8, "router/max_vio_worst": 0.91, "router/drift/overlap_mean": 0.827}
    with (finished_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    pictures = {"figures/router_load.png", "figures/router_drift.png"}
    made = card(finished_run, "LoRA adapter", {"adapter_config.json", *pictures}).text
    assert "got 1.91 even shares" in made
    assert "82.7% of the base's choices were kept" in made
    for picture in pictures:
        assert f"]({picture})" in made
