"""The model card of a run: what it is, where it comes from, how it trained, how to load it, with the hub's metadata.

Everything is read from the run's own files, so that a card can be made again and says nothing that was not recorded.
The metadata is built and checked by huggingface_hub's own classes; the licence is the base's, because a tuning of a
model is a work derived from it. A key of which nothing is known is left out.

Leaves out: the pictures (router/plots.py) and what the other files say (published.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from finetune.checkpoint import read_json
from finetune.disk import write_text
from finetune.errors import HubError, ModelError, OutputError
from finetune.export.hub import Destination, Hub, Kind
from finetune.export.published import is_local, public_name
from finetune.jsonl import read_metrics
from finetune.memory import EXPERT_FORMATS
from finetune.moe import QUANT_METHOD, BaseSpec
from finetune.recipe import Recipe
from finetune.report import environment
from finetune.run_files import DataFile, FidelityFile, RunFile, SummaryFile, held_out_loss, recorded, recorded_recipe
from finetune.runfolder import RunFolder, set_aside

CARD = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_FIDELITY = {
    "reference_loss": ("completion loss, live adapter", "{:.4f} nats"),
    "candidate_loss": ("completion loss, merged", "{:.4f} nats"),
    "kl": ("KL(live, merged)", "{:.2e} nats"),
    "greedy_agreement": ("same greedy token", "{:.2%}"),
    "top_k_overlap": ("same experts chosen", "{:.2%}"),
    "max_logit_difference": ("largest difference of a logit", "{:.3g}"),
}


@dataclass(frozen=True)
class RunFacts:
    """What a finished run recorded."""

    run: RunFolder
    recipe: Recipe
    base: BaseSpec
    summary: Mapping[str, Any]
    data: Mapping[str, Any]
    packages: Mapping[str, str | None]

    @classmethod
    def read(cls, run: RunFolder) -> RunFacts:
        """
        Raises:
            OutputError: a file of the run is missing or damaged, or the run has not come to its end.
        """
        if set_aside(run.root):
            raise OutputError(
                "the run was put aside by a `finetune train --overwrite` that was cut off",
                where=str(run.root),
                fix="start `finetune train` with the run's recipe and --resume: it puts the run back",
            )
        if not run.run_file.is_file():
            raise OutputError(
                "this is not the folder of a run",
                where=str(run.root),
                allowed="a folder that `finetune train` wrote, with run.json and adapter/ in it",
                fix="name the run's output.dir",
            )
        if not (run.root / "summary.json").is_file():
            raise OutputError(
                "there is no adapter to push: the run has not come to its end",
                where=str(run.root),
                fix="continue it with `finetune train --resume`",
            )
        return cls(
            run,
            recorded_recipe(run.run_file, kind=OutputError, fix="push it with the version that trained it"),
            BaseSpec.read(run.adapter),
            recorded(run.root / "summary.json", SummaryFile),
            recorded(run.data, DataFile),
            recorded(run.run_file, RunFile).get("packages") or {},
        )


def base_licence(hub: Hub, base: BaseSpec) -> dict[str, str]:
    """The licence keys of the base's own card: from its folder, or from the hub; empty where nobody says."""
    if is_local(base.path):
        return _folder_licence(base)
    try:
        info = hub.ask(
            "read the base's licence", base.path, lambda: hub.api.model_info(base.path, revision=base.revision)
        )
    except HubError:
        return {}
    return _licence_of({} if info.card_data is None else info.card_data.to_dict())


def _folder_licence(base: BaseSpec) -> dict[str, str]:
    card = Path(base.path) / CARD
    return _licence_of((metadata_load(card) if card.is_file() else None) or {})


def _licence_of(found: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(found[key]) for key in _LICENCE_KEYS if found.get(key)}


def make_card(
    facts: RunFacts,
    to: Destination | None,
    kind: Kind,
    *,
    files: Collection[str],
    licence: Mapping[str, str] | None,
    merged: Path | None = None,
) -> str:
    """README.md of the repository, metadata first.

    Args:
        to: the repository; None for the card of a folder that has not been published.
        files: what goes besides, by path in the repository.
        licence: as `base_licence` returns it; None where nobody was asked.
        merged: folder of the merged model, where that is what goes.
    """
    data = metadata(facts, kind, licence or {})
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(facts, to, kind, files, licence, merged)}"))


def write_adapter_card(run: RunFolder) -> None:
    """The card of a finished run's own adapter folder, which names no folder of this machine; the hub is not asked.

    Raises:
        OutputError: as `RunFacts.read`.
    """
    facts = RunFacts.read(run)
    licence = _folder_licence(facts.base) if is_local(facts.base.path) else None
    kind: Kind = "LoRA adapter" if _is_lora(facts.recipe) else "non-MoE tuning"
    write_text(run.adapter / CARD, make_card(facts, None, kind, files=(), licence=licence))


def metadata(facts: RunFacts, kind: Kind, licence: Mapping[str, str]) -> ModelCardData:
    """The keys by which the hub finds and sorts a model."""
    recipe, on_hub = facts.recipe, not is_local(facts.base.path)
    names = [recipe.data.train, *(source.path for source in recipe.data.more)]
    sets = list(dict.fromkeys(name for name in names if not is_local(name)))
    method = ["lora", *(["dora"] if recipe.trainable.lora.use_dora else [])] if _is_lora(recipe) else ["non-moe"]
    relation = "adapter" if kind == "LoRA adapter" else "finetune"
    given: dict[str, Any] = {
        "base_model": facts.base.path if on_hub else None,
        "base_model_relation": relation if on_hub else None,
        "datasets": sets or None,
        "library_name": {"LoRA adapter": "peft", "non-MoE tuning": "moe-qlora", "model": "transformers"}[kind],
        "pipeline_tag": "text-generation",
        "tags": ["moe-qlora", "mixture-of-experts", "qlora", "sft", *method],
        **licence,
    }
    return ModelCardData(**{key: value for key, value in given.items() if value is not None})


def _body(
    facts: RunFacts,
    to: Destination | None,
    kind: Kind,
    files: Collection[str],
    licence: Mapping[str, str] | None,
    merged: Path | None,
) -> str:
    base, recipe, public = facts.base, facts.recipe, public_name(facts.base.path)
    on_hub = not is_local(base.path)
    shown = f"[{public}](https://huggingface.co/{public})" if on_hub else f"`{public}` (a local folder)"
    return (
        environment(Path(__file__).parent, escape=False)
        .get_template("card.md.jinja")
        .render(
            title=to.repo_id.rpartition("/")[2] if to else facts.run.root.absolute().name,
            repo_id=to.repo_id if to else "ADAPTER_FOLDER",
            published=to is not None,
            branch=to.branch if to else None,
            branch_argument=f', revision="{to.branch}"' if to and to.branch else "",
            kind=kind,
            summary=_summary(facts, kind, shown),
            base_shown=shown,
            base_public=public,
            on_hub=on_hub,
            revision=base.revision,
            fingerprint=base.fingerprint,
            licence_shown=_licence_shown(licence),
            trained=_trained(recipe),
            experts=EXPERT_FORMATS[base.experts],
            attention={"nf4": "NF4", "16bit": "16 bits"}[base.attention],
            run=facts.summary,
            held_out=held_out_loss(facts.summary),
            data=_data(facts.data),
            versions=", ".join(
                f"{name} {facts.packages.get(name)}" for name in ("torch", "transformers", "trl", "peft")
            ),
            version=facts.packages.get("moe-qlora"),
            pictures={name: f"figures/{name}.png" in files for name in ("training", "router_load", "router_drift")},
            router=_router(facts),
            fidelity=_fidelity(merged),
            merged=_merged(merged, files),
            limits="The adapter fits the base named above and no other, not even one of equal shape."
            if kind != "model"
            else "It is its base with the update added to the attention, not a model trained anew.",
        )
    )


def _summary(facts: RunFacts, kind: Kind, base: str) -> str:
    how = f"trained by QLoRA on {base}, its experts in 4 bits" if _is_lora(facts.recipe) else f"tuned from {base}"
    return {
        "LoRA adapter": f"A LoRA adapter on the attention, {how}.",
        "non-MoE tuning": f"Everything but the experts, {how} with its experts frozen in 4 bits.",
        "model": f"A merged model: the attention's update, {how}, is part of its weights.",
    }[kind]


def _is_lora(recipe: Recipe) -> bool:
    return recipe.trainable.method == "attention_lora"


def _trained(recipe: Recipe) -> str:
    lora, router = recipe.trainable.lora, " and the routers in full" if recipe.trainable.router else ""
    if not _is_lora(recipe):
        return f"attention, norms, embeddings and head in full{router}"
    scaling = " (rank-stabilized)" if lora.use_rslora else ""
    name = "DoRA" if lora.use_dora else "LoRA"
    return f"{name}, rank {lora.r}, alpha {lora.alpha}{scaling}, on {', '.join(lora.target_modules)}{router}"


def _licence_shown(licence: Mapping[str, str] | None) -> str:
    if licence is None:
        return "the base's"
    name = licence.get("license_name") or licence.get("license")
    if name is None:
        return "the base's; its card does not say which"
    link = licence.get("license_link")
    return f"{f'[{name}]({link})' if link else name}, the base's"


def _data(document: Mapping[str, Any]) -> dict[str, Any]:
    train, *held_out = document["parts"]
    sources = [
        {"name": f"`{public_name(source['where'].split(',')[0])}`", "used": source["used"], "form": source["form"]}
        for source in train["sources"]
    ]
    return {
        "sources": sources,
        "examples": train["examples"],
        "tokens": train["tokens"],
        "supervised_share": train["supervised_share"],
        "fingerprint": train.get("fingerprint", "not recorded"),  # by runs before it was
        "held_out": held_out[0]["examples"] if held_out else 0,
        "template": public_name(document["template"]),
        "loss_on": {"all": "every answer", "last": "the last answer", "completion": "the completion"}[
            document["loss_on"]
        ],
    }


def _router(facts: RunFacts) -> str:
    """What the last numbers in the metrics say of the routing."""
    last: dict[str, Any] = {}
    for record in read_metrics(facts.run.metrics):
        last |= {name: value for name, value in record.items() if value is not None}
    said = []
    if "router/max_vio_worst" in last:
        said.append(
            f"At the end, the busiest expert of any layer got {1 + last['router/max_vio_worst']:.2f} even shares."
        )
    if "router/drift/overlap_mean" in last:
        said.append(f"On the run's probe, {last['router/drift/overlap_mean']:.1%} of the base's choices were kept.")
    return " ".join(said)


def _merged(folder: Path | None, files: Collection[str]) -> dict[str, Any]:
    config = read_json(folder / "config.json") if folder is not None and "config.json" in files else {}
    return {
        "quantized": (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD,
        "gguf": next((name for name in files if name.endswith(".gguf")), None),
        "serving": "SERVING.md" in files,
    }


def _fidelity(merged: Path | None) -> dict[str, Any] | None:
    """The table of a merged folder that was compared with its live adapter."""
    if merged is None or not (merged / "fidelity.json").is_file():
        return None
    found = recorded(merged / "fidelity.json", FidelityFile, kind=ModelError).get("fidelity")
    if not found:
        return None
    rows = [(name, form.format(found[key])) for key, (name, form) in _FIDELITY.items() if key in found]
    return {"tokens": found["tokens"], "rows": rows}
