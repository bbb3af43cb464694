"""`finetune push`: a run's adapter or merged model to the hub, with a card, pictures and its recipe.

The order is by cost: what is wrong with the folder or the token is said before a picture is drawn, and nothing is
written to the hub before the whole push stands. A dry run goes the same way and stops there, without a token.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapter import TRAINING_FILE, data_facts
from finetune.console import Report, gib, strict_json
from finetune.export.card import CARD, RunFacts, base_licence, make_card
from finetune.export.hub import Destination, Hub, kind_of, publish, require_repo_id, require_writable
from finetune.export.published import adapter_files, is_local, merged_files, public_name, public_values
from finetune.recipe import Recipe, resolved_yaml
from finetune.router import run_figures
from finetune.runfolder import RunFolder, run_of

RECIPE, FIGURES = "recipe.yaml", "figures"


def push(
    folder: Path, to: Destination, report: Report, *, merged: Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Pushes what a run trained; returns the document that `--json` prints.

    Args:
        folder: the run's output folder, or its adapter's.
        merged: a merged model of the run, to go instead of its adapter.
        dry_run: only show what would go.

    Raises:
        OutputError: `folder` is not that of a finished run.
        AdapterError, ModelError: it holds no adapter, `merged` no model.
        HubError: as `require_writable` and `publish`.
    """
    run, hub = RunFolder(run_of(folder)), Hub(report)
    require_repo_id(to.repo_id)
    facts = RunFacts.read(run)
    with tempfile.TemporaryDirectory(prefix=".push.", dir=run.root) as scratch:
        files = _weights(facts, merged, Path(scratch))
        if not dry_run:
            to = require_writable(hub, to)
        kind = kind_of(files)
        assert kind is not None
        for picture in run_figures(run, Path(scratch) / FIGURES):
            files[f"{FIGURES}/{picture.name}"] = picture
        files |= {RECIPE: public_recipe(facts.recipe).encode(), TRAINING_FILE: _training(facts)}
        card = make_card(facts, to, kind, files=files, licence=base_licence(hub, facts.base), merged=merged)
        files = {CARD: card.encode(), **files}
        sizes = {path: _size(content) for path, content in files.items()}
        if dry_run:
            return _show(to, sizes, card, report)
        report.line(f"Pushing {len(files)} files, {gib(sum(sizes.values()))}, to {to.repo_id}")
        pushed = publish(hub, to, files, message=f"{kind} by moe-qlora")
    report.line(f"{pushed.url}\nGet it: finetune pull {pushed.repo_id} --revision {pushed.commit} --output DIR")
    return {"repo_id": pushed.repo_id, "commit": pushed.commit, "url": pushed.url, "files": sizes}


def push_after_training(recipe: Recipe, report: Report) -> dict[str, Any]:
    """What `output.push_to_hub` asks for, once the run has come to its end."""
    return push(Path(recipe.output.dir), destination_of(recipe), report)


def destination_of(recipe: Recipe) -> Destination:
    """Where `output.push_to_hub` says."""
    asked = recipe.output.push_to_hub
    assert asked is not None, "the recipe does not push"
    return Destination(asked.repo_id, private=asked.private, branch=asked.branch)


def public_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, its paths by their last parts; it does not push to where this run does."""
    given = (recipe.model.path, recipe.data.train, recipe.data.eval, recipe.data.template, recipe.output.dir)
    names = [name for name in (*given, *(source.path for source in recipe.data.more)) if name is not None]
    values = public_values(recipe.model_dump(mode="json"), names=tuple(filter(is_local, names)))
    values["output"]["push_to_hub"] = None
    return resolved_yaml(Recipe.model_validate(values))


def _weights(facts: RunFacts, merged: Path | None, scratch: Path) -> dict[str, Path | bytes]:
    if merged is not None:
        return merged_files(merged, base=facts.base.path)
    return adapter_files(facts.run.adapter, scratch, base=facts.base.path)


def _training(facts: RunFacts) -> bytes:
    """Data, versions and results, for `finetune adapter inspect` of whoever pulls it."""
    data = data_facts(facts.data)
    data["sources"] = [public_name(source.split(",")[0]) for source in data["sources"]]
    numbers = ("steps", "stopped_by", "train_loss", "eval_loss_first", "eval_loss_last", "trainable_parameters")
    results = {name: facts.summary[name] for name in numbers}
    document = {"data": data, "packages": facts.packages, "results": results}
    return (json.dumps(strict_json(document), indent=2) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _show(to: Destination, sizes: Mapping[str, int], card: str, report: Report) -> dict[str, Any]:
    rows = [(path, f"{size:,}") for path, size in sizes.items()]
    title = f"Would go to {to.repo_id}" + (f", branch {to.branch}" if to.branch else "")
    report.table(title, ("file", "bytes"), [*rows, (f"{len(sizes)} files", f"{sum(sizes.values()):,}")])
    report.line(card)
    return {"repo_id": to.repo_id, "dry_run": True, "files": dict(sizes), "card": card}
