"""`finetune push`: what goes and what never does, the card, and that the pulled folder is the adapter again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.export.published import adapter_files, public_values
from finetune.recipe.load import load_recipe
from tests.hub.stand_in import TOKEN, USER, StandIn
from tests.running import contents, refused, run_finetune

REPO = f"{USER}/tuned"
PUSHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "chat_template.jinja",
    "figures/training.png",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


def pushed_files(hub: StandIn, repo: str = REPO) -> dict[str, bytes]:
    return {path: content for path, content in hub.repos[repo].files().items() if path != ".gitattributes"}


def test_the_adapter_goes_and_nothing_else(hub: StandIn, finished_run: Path, tmp_path: Path) -> None:
    before = contents(finished_run)
    ran = run_finetune("push", finished_run, "--repo-id", "tuned", "--json")
    assert ran.status == 0, ran.stderr
    files = pushed_files(hub)
    assert set(files) - {"chat_template.jinja"} == PUSHED - {"chat_template.jinja"}
    assert set(ran.document["files"]) == set(files)
    assert ran.document["commit"] == hub.repos[REPO].branches["main"]
    for secret in (TOKEN, "somewhere-private", str(tmp_path.parent), str(Path.home()) + "/"):
        found = [path for path, content in files.items() if secret.encode() in content and path != "tokenizer.json"]
        assert not found, secret
    assert TOKEN not in ran.stdout + ran.stderr
    adapter = finished_run / "adapter"
    for name in ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert files[name] == (adapter / name).read_bytes()
    assert contents(finished_run) == before


def test_the_card_is_one_that_the_hub_takes(hub: StandIn, finished_run: Path) -> None:
    run_finetune("push", finished_run, "--repo-id", "tuned", "--branch", "rank-4")
    card = ModelCard(hub.repos[REPO].files("rank-4")["README.md"].decode())
    about = card.data.to_dict()
    assert about["datasets"] == ["HuggingFaceH4/no_robots"]
    assert (about["library_name"], about["pipeline_tag"]) == ("peft", "text-generation")
    assert {"qlora", "lora"} <= set(about["tags"])
    assert "base_model" not in about  # a folder has no name there
    for words in (
        "rank 4, alpha 32",
        "| held-out loss, nats per supervised token | 6.000 before training, 5.000 after |",
        "`ffffffffffffffffffffffffffffffff`",
        "![Loss and router imbalance over the steps](figures/training.png)",
        f'PeftModel.from_pretrained(base, "{REPO}", revision="rank-4")',
        f"finetune pull {REPO} --revision rank-4 --output tuned",
        "| `HuggingFaceH4/no_robots` | 32 | messages |",
    ):
        assert words in card.text, words
    assert "None" not in card.text
    assert hub.count("POST", "validate-yaml") == 1  # the client has the hub look at it before anything is sent


def test_a_base_on_the_hub_is_named_with_its_licence(hub: StandIn, finished_run: Path) -> None:
    base = "mistralai/Mixtral-8x7B-v0.1"
    hub.add(base, {"config.json": b"{}"}, license="apache-2.0")
    for name, key in (("base.json", "path"), ("adapter_config.json", "base_model_name_or_path")):
        path = finished_run / "adapter" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: base}))
    assert run_finetune("push", finished_run, "--repo-id", REPO).status == 0
    files = pushed_files(hub)
    about = ModelCard(files["README.md"].decode()).data.to_dict()
    assert (about["base_model"], about["base_model_relation"], about["license"]) == (base, "adapter", "apache-2.0")
    assert json.loads(files["base.json"])["path"] == base
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", dtype' in files["README.md"].decode()


def test_a_dry_run_shows_exactly_what_would_go(
    hub: StandIn, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = contents(finished_run)
    ran = run_finetune("push", finished_run, "--repo-id", REPO, "--dry-run", "--json")
    assert ran.status == 0, ran.stderr
    assert hub.requests == []
    assert contents(finished_run) == before
    shown = run_finetune("push", finished_run, "--repo-id", REPO, "--dry-run").stdout
    assert "adapter_model.safetensors" in shown
    assert "# tuned" in shown
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run_finetune("push", finished_run, "--repo-id", REPO)
    files = pushed_files(hub)
    assert ran.document["files"] == {path: len(content) for path, content in files.items()}
    assert ran.document["card"] == files["README.md"].decode()


def test_the_recipe_that_goes_runs_again_elsewhere(hub: StandIn, finished_run: Path, tmp_path: Path) -> None:
    run_finetune("push", finished_run, "--repo-id", REPO)
    (tmp_path / "theirs.yaml").write_bytes(pushed_files(hub)["recipe.yaml"])
    assert "/" not in yaml.safe_load(pushed_files(hub)["recipe.yaml"])["data"]["eval"].removeprefix("./")
    recipe = load_recipe(tmp_path / "theirs.yaml", ["model.path=m", "data.train=d"])
    assert recipe.trainable.lora.r == 4
    assert recipe.output.push_to_hub is None


def test_pulled_again_it_is_the_same_adapter(hub: StandIn, finished_run: Path, small_mixtral: Path) -> None:
    run_finetune("push", finished_run, "--repo-id", REPO)
    back = finished_run.parent / "back"
    assert run_finetune("pull", REPO, "--output", back).status == 0
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (finished_run / "adapter", back))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    ran = run_finetune("adapter", "inspect", back, "--base", small_mixtral, "--json")
    assert ran.status == 0, ran.stderr
    assert ran.document["data"]["fingerprint"] == "f" * 32
    assert ran.document["recipe"] == str(back / "recipe.yaml")
    says = ("the base of the adapter is not where it was: ./small-mixtral", "name its folder with --base")
    refused(back, "generate", back, "--prompt", "x", says=says)


def test_a_merged_model_goes_with_its_fidelity(hub: StandIn, finished_run: Path, small_mixtral: Path) -> None:
    merged = shutil.copytree(small_mixtral, finished_run.parent / "merged")
    measured = {"tokens": 2148, "kl": 3.9e-4, "greedy_agreement": 0.9967, "reference_loss": 4.3323}
    about = {"merged_from": str(finished_run / "adapter"), "base": str(small_mixtral), "fidelity": measured}
    (merged / "fidelity.json").write_text(json.dumps(about))
    (merged / "SERVING.md").write_text(f"onto `{small_mixtral}` from `{finished_run}/adapter`\n")
    (merged / "pytorch_model.bin").write_bytes(b"\x80")
    ran = run_finetune("push", finished_run, "--repo-id", REPO, "--merged", merged)
    assert ran.status == 0, ran.stderr
    files = pushed_files(hub)
    assert {"config.json", "model.safetensors", "fidelity.json", "SERVING.md", "figures/training.png"} <= set(files)
    assert "pytorch_model.bin" not in files
    assert json.loads(files["fidelity.json"])["merged_from"] == "./adapter"
    assert files["SERVING.md"] == f"onto `./{small_mixtral.name}` from `./adapter`\n".encode()
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "transformers"
    for words in ("| same greedy token | 99.67% |", "| KL(live, merged) | 3.90e-04 nats |", "on 2,148 tokens"):
        assert words in card.text
    says = ("already holds a model, and this is a LoRA adapter",)
    refused(finished_run, "push", finished_run, "--repo-id", REPO, says=says)


def test_a_non_moe_tuning_names_no_folder_in_its_header_either(tmp_path: Path) -> None:
    base = "/home/me/models/mixtral"
    about = {"format": 1, "base": {"path": base, "fingerprint": "ab"}, "router": False}
    tensors = {"model.norm.weight": torch.arange(7.0), "lm_head.weight": torch.arange(30.0).view(5, 6)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "non_moe.safetensors", metadata={"format": "pt", "non_moe": json.dumps(about)})
    (folder / "non_moe.json").write_text(json.dumps(about))
    made = adapter_files(folder, tmp_path, base=base)
    copy = made["non_moe.safetensors"]
    assert isinstance(copy, Path)
    assert b"/home/me" not in copy.read_bytes()
    assert json.loads(made["non_moe.json"]) == {**about, "base": {"path": "./mixtral", "fingerprint": "ab"}}  # type: ignore[arg-type]
    with safe_open(copy, framework="pt") as file:
        assert json.loads(file.metadata()["non_moe"])["base"]["path"] == "./mixtral"
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert adapter_files(folder, tmp_path, base="owner/model")["non_moe.safetensors"] == folder / "non_moe.safetensors"


def test_paths_and_nothing_else_are_shortened() -> None:
    given = {"a": "/x/y/z", "b": ["~/data.jsonl", "owner/name", "q_proj", 3, None], "c": {"d": "../up/f", "e": "a b/c"}}
    made = {"a": "./z", "b": ["./data.jsonl", "owner/name", "q_proj", 3, None], "c": {"d": "./f", "e": "a b/c"}}
    assert public_values(given) == made
    assert public_values("models/mixtral", names=("models/mixtral",)) == "./mixtral"


def test_a_folder_without_a_finished_run_is_refused(hub: StandIn, finished_run: Path, tmp_path: Path) -> None:
    args = ("--repo-id", REPO)
    refused(tmp_path, "push", tmp_path, *args, says=("this is not the folder of a run", "output.dir"))
    aside = finished_run / ".aside.x.partial"
    aside.mkdir()
    (finished_run / "run.json").rename(aside / "run.json")
    says = (
        "the run was put aside by a `finetune train --overwrite` that was cut off",
        "--resume: it puts the run back",
    )
    refused(tmp_path, "push", finished_run, *args, says=says)
    (aside / "run.json").rename(finished_run / "run.json")
    aside.rmdir()
    says = ("there is no merged model to push", "finetune merge RUN/adapter")
    refused(tmp_path, "push", finished_run, *args, "--merged", tmp_path / "nowhere", says=says)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(finished_run / "adapter" / "adapter_model.safetensors")
    (tmp_path / "linked" / "x.safetensors").touch()
    says = ("there is no merged model to push", "finetune merge")
    refused(tmp_path, "push", finished_run, *args, "--merged", tmp_path / "linked", says=says)
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "linked" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "linked" / "model-00002-of-00002.safetensors").symlink_to(finished_run / "metrics.jsonl")
    says = ("1 of the model's shards are links", "model-00002-of-00002.safetensors")
    refused(tmp_path, "push", finished_run, *args, "--merged", tmp_path / "linked", says=says)
    (finished_run / "adapter" / "adapter_model.safetensors").unlink()
    refused(tmp_path, "push", finished_run, *args, says=("there is no adapter to push", "--resume"))
    (finished_run / "summary.json").unlink()
    refused(tmp_path, "push", finished_run, *args, says=("the run has not come to its end", "--resume"))
    refused(tmp_path, "push", finished_run, "--repo-id", "a/b/c", says=("cannot be the name of a repository",))
    assert hub.requests == []


@pytest.mark.slow
def test_a_process_of_its_own_pushes_by_its_environment(
    hub: StandIn, environment: dict[str, str], finished_run: Path
) -> None:
    command = [sys.executable, "-m", "finetune", "push", str(finished_run), "--repo-id", "tuned", "--private"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    assert f"finetune pull {REPO} --revision {hub.repos[REPO].branches['main']}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
