"""What README and docs/ say is so: the Python runs, links lead somewhere, numbers are the recorded ones.

Their commands run in test_docs_commands.py.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from finetune.infer.engine import Engine
from finetune.infer.request import Request, Sampling
from finetune.recipe.load import load_recipe
from tests.conftest import REPOSITORY
from tests.running import run_finetune
from tests.serve.serving import serving

PAGES = {path: path.read_text(encoding="utf-8") for path in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"))}
TEXT = "\n".join(PAGES.values())


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_python_runs(tmp_path: Path) -> None:
    (code,) = (block for block in blocks("python") if "Moe4bitConfig" in block)
    code = code.replace("outputs/tiny-mixtral-4bit", str(tmp_path / "saved"))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moe_4bit"


def test_the_client_streams() -> None:
    (code,) = (block for block in blocks("python") if "OpenAI" in block)
    with Engine.load(str(REPOSITORY / "recipes" / "tiny-mixtral" / "model"), name="run", device="cpu") as engine:
        ids = engine.encode_chat([{"role": "user", "content": "Who are you?"}])
        expected = "".join(event.text for event in engine.stream(Request(ids, Sampling(max_new_tokens=24))))
        with serving(engine) as served:
            code = code.replace("http://127.0.0.1:8000/v1", served.url)
            code = code.replace("stream=True", "stream=True, temperature=0, max_tokens=24")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (recipe,) = (block for block in blocks("yaml") if block.startswith("model:"))
    assert yaml.safe_load(recipe)["model"]
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").training["learning_rate"] == 2e-4


def test_the_error_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    (shown,) = (block for block in blocks("text") if block.startswith("$ finetune"))
    command, _, message = shown.partition("\n")
    ran = run_finetune(*shlex.split(command)[2:])
    assert ran.status == 2
    assert ran.stderr == message


def test_every_command_and_file_exists() -> None:
    shown = run_finetune("--help").stdout
    for command in set(re.findall(r"`finetune (\w+)", TEXT)):
        assert re.search(rf"^│ {command} ", shown, re.MULTILINE), command
    for script in set(re.findall(r"scripts/\w+\.(?:sh|py)", TEXT)):
        assert (REPOSITORY / script).is_file(), script
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)


def test_the_index_names_every_page_and_the_readme_is_short() -> None:
    index = PAGES[REPOSITORY / "docs" / "README.md"]
    assert not [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index]
    assert len(PAGES[REPOSITORY / "README.md"].splitlines()) <= 200


def test_messages_of_the_troubleshooting_page_are_said() -> None:
    """Each that stands in backticks in its first column is in the code, or in that of torch or the shell."""
    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "finetune").rglob("*.py"))
    code = re.sub(r"""["']\s*f?["']""", "", code)
    page = PAGES[REPOSITORY / "docs" / "troubleshooting.md"]
    for row in re.findall(r"^\| (.+?) \|", page, re.MULTILINE):
        for said in re.findall(r"`([^`]+)`", row):
            assert said in code or said in ("command not found: finetune", "CUDA out of memory"), said


def test_which_gpu_is_the_recorded_table() -> None:
    for path in sorted((REPOSITORY / "bench" / "results" / "h200").glob("recipe-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        peak, speed = run["memory"]["peak"]["allocated"] / 2**30, run["trainer"]["tokens_per_second"]
        cells = f"| {run['batch']} x {run['length']} | {peak:.1f} GiB | {speed:,.0f} "
        assert len(rows_with(cells)) == 1, path.stem


RECORDED = REPOSITORY / "bench" / "results" / "h100-80gb"


def rows_with(*cells: str) -> list[str]:
    return [line for line in TEXT.splitlines() if line.startswith("| ") and all(cell in line for cell in cells)]


@pytest.mark.parametrize("path", sorted(RECORDED.glob("train-*.json")), ids=lambda path: path.stem)
def test_the_table_is_the_recorded_one(path: Path) -> None:
    """The table's numbers are those of the raw JSON lines, and its row is theirs."""
    run = json.loads(path.read_text())
    (row,) = rows_with(f"**{run['trainer']['tokens_per_second']:,.0f}**", f"| {run['trainer_over_bare']:.1%} |")
    assert row.startswith(f"| {run['batch']} x {run['length']}")
    assert ("memory.budget_gib" in row) is (run["overrides"] != [])
    assert ("`non_moe`" in row) is (run["method"] == "non_moe")
    assert f"| {run['trainer_over_bare']:.1%} |" in row
    assert f"| {run['trainer_over_roofline']:.0%} |" in row
    assert f"| {run['memory']['peak']['allocated'] / 2**30:.1f} GiB |" in row
    assert abs(run["memory"]["estimate_error_percent"]) <= 0.1


def test_the_peers_are_the_recorded_ones() -> None:
    for peer in json.loads((RECORDED / "peers.json").read_text())["peers"]:
        if peer["status"] == "measured":
            peak = f"{peer['peak_allocated_bytes'] / 2**30:.1f} GiB"
            # In the README, and in docs/speed.md beside our rows.
            assert len(rows_with(f"| {peer['tokens_per_second']:,.0f} |", peak)) == 2


def test_the_cost_of_watching_is_the_recorded_one() -> None:
    line = json.loads((RECORDED / "router.json").read_text(encoding="utf-8"))
    text = " ".join(TEXT.split())
    assert (line["batch"], line["length"], line["random_weights"]) == (8, 1024, True)
    assert f"the capture costs {line['capture_share']:+.2%} of a step" in text
    error = line["capture_ms_standard_error"] / 1e3 / line["seconds_per_step_off"]
    assert f"(within the measurement's error of {error:.1%}) and {line['capture_peak_bytes'] / 2**20:.0f} MiB" in text


def test_the_numbers_of_the_data_path_are_the_recorded_ones() -> None:
    line = json.loads((REPOSITORY / "bench" / "results" / "cpu" / "data.json").read_text(encoding="utf-8"))
    text = " ".join(TEXT.split())
    assert f"{line['rows']:,} conversations ({line['tokens'] / 1e6:.0f} M tokens)" in text
    assert f"in {line['over_bare']:.2f} times what `datasets.map` takes" in text
    assert f"in {line['ours']['peak_bytes'] / 2**30:.2f} GiB of memory" in text
    assert f"packs to {line['bundled_packing_efficiency']:.1%} real tokens" in text
    large = json.loads((REPOSITORY / "bench" / "results" / "cpu" / "data-5gb.json").read_text(encoding="utf-8"))
    assert f"file of {large['file_bytes'] / 1e9:.1f} GB takes {large['ours']['peak_bytes'] / 2**30:.2f} GiB" in text


def test_the_speed_of_answers_is_the_recorded_one() -> None:
    line = json.loads((RECORDED / "decode.json").read_text(encoding="utf-8"))
    text = " ".join(TEXT.split())
    for context in (128, 4096):
        cells = [
            f"{row['tokens_per_second']:,.0f} ({row['share_of_limit']:.0%})"
            for row in line["rows"]
            if row["context"] == context
        ]
        assert f"| {context:,} | {' | '.join(cells)} |" in text
    assert f"read at {line['prefill_tokens_per_second']:,.0f} tokens/s" in text
    assert f"after {line['first_token_prompt']} comes in {line['first_token_seconds'] * 1e3:.0f} ms" in text
    assert f"bitsandbytes-parametrized model: {line['peer']['tokens_per_second']:.1f} tokens/s" in text
    server = json.loads((RECORDED / "server.json").read_text(encoding="utf-8"))
    assert server["clients"] == 16
    assert server["ratio"] > 0.95


def test_the_speed_on_a_small_card_is_the_recorded_one() -> None:
    line = json.loads((RECORDED / "offload.json").read_text(encoding="utf-8"))
    text = " ".join(TEXT.split())
    for routing in ("own", "trace"):
        cells = [
            f"{row['tokens_per_second']:.1f} ({row['hit_rate']:.0%})"
            for row in line["offload"]
            if row["routing"] == routing
        ]
        assert f" | {' | '.join(cells)} |" in text
    assert f"over the link at {line['link_bytes_per_second'] / 1e9:.0f} GB/s" in text
    low = [json.loads((RECORDED / f"decode-{name}.json").read_text(encoding="utf-8")) for name in ("hqq2", "hqq3")]
    peaks = [f"{run['peak_allocated_bytes'] / 2**30:.1f}" for run in low]
    speeds = [f"{run['rows'][0]['tokens_per_second']:.0f}" for run in low]
    assert f"resident in {peaks[0]} or {peaks[1]} GiB at its peak" in text
    assert f"answers at {speeds[0]} or {speeds[1]} tokens/s" in text


ON_CPU = REPOSITORY / "bench" / "results" / "cpu"


def test_what_a_merge_keeps_is_the_recorded_table() -> None:
    line = json.loads((ON_CPU / "fidelity.json").read_text(encoding="utf-8"))
    for model in line["comparison"]["models"][1:]:
        form = {"kl": ".1e", "greedy_agreement": ".2%", "top_k_overlap": ".2%", "kl_routed_alike": ".1e"}
        cells = " | ".join(f"{model[key]['value']:{shape}}" for key, shape in form.items())
        assert len(rows_with(f" | {cells} |")) == 1, model["model"]
    for size in line["survival"][1:]:
        kept = " | ".join(f"{size['formats'][name]['kept']:.1%}" for name in ("nf4", "bf16", "fp16"))
        assert len(rows_with(f"| {size['scale']:.1%} | {kept} |")) == 1, size["scale"]


def test_what_a_merge_keeps_on_smollm2_is_the_recorded_one() -> None:
    line = json.loads((ON_CPU / "fidelity-smollm2.json").read_text(encoding="utf-8"))
    _, _, default, fp16, computed = line["comparison"]["models"]
    said = [
        f"{model['kl']['value']:.1e} and {model['greedy_agreement']['value']:.2%}"
        for model in (default, fp16, computed)
    ]
    text = " ".join(TEXT.split())
    assert f"it is {said[0]}, with fp16 attention {said[1]}, and computing in bfloat16 {said[2]}" in text
    assert 1 - default["routed_alike"]["value"] == pytest.approx(1 / 6, abs=0.01)


def test_what_four_bits_cost_is_the_recorded_table() -> None:
    """docs/four_bit.md: mean and standard deviation over the seeds, and of the paired differences."""
    page = (REPOSITORY / "docs" / "four_bit.md").read_text(encoding="utf-8")
    runs = [json.loads(text) for text in (ON_CPU / "four_bit.json").read_text(encoding="utf-8").splitlines()]
    loss = {(run["kind"], run["seed"]): run["loss"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    assert len(seeds) >= 3
    for kind in ("nf4", "16bit", "non_moe"):
        own = [loss[kind, seed] for seed in seeds]
        cells = [f"{mean(own):.3f} ± {stdev(own):.3f}"]
        if kind != "16bit":
            paired = [loss[kind, seed] - loss["16bit", seed] for seed in seeds]
            cells.append(f"{mean(paired):+.3f} ± {stdev(paired):.3f}")
        assert " | ".join(cells) in page, (kind, cells)
