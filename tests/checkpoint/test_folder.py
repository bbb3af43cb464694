"""Every fault of a model folder, told in one message that names the place and the way out.

Truth: folders broken by hand, byte by byte, and the safetensors library that refuses them too.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.checkpoint.folder import check_model_folder, incomplete, require_every_expert, shard_files
from finetune.checkpoint.headers import TensorInfo, check_safetensors, read_tensor_infos
from finetune.checkpoint.resumable import Checkpoints, find_checkpoints
from finetune.errors import AdapterError, FinetuneError, ModelError, OutputError
from tests.models import save_fused, tiny_model

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder in two shards."""
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.arange(6.0).view(2, 3)}, folder / SHARDS[0])
    save_file({"b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(1)}, folder / SHARDS[1])
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def message(check: Callable[[], object], kind: type[FinetuneError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        check()
    return str(caught.value)


# ---- the folder ---------------------------------------------------------------------------------------------------


def test_a_whole_folder_passes(folder: Path) -> None:
    assert check_model_folder(folder) == {"model_type": "mixtral"}
    assert shard_files(folder) == [folder / SHARDS[0], folder / SHARDS[1]]
    file = folder / SHARDS[1]
    c, b = read_tensor_infos(file)
    assert (c, b) == (TensorInfo("c", "F32", (1,), file, c.start), TensorInfo("b", "BF16", (4,), file, b.start))
    # bfloat16's one is 0x3f80.
    assert file.read_bytes()[c.start :] == bytes(4) + b"\x80\x3f" * 4
    assert b.start == c.start + 4


def test_a_missing_folder_names_its_neighbours(folder: Path) -> None:
    (folder.parent / "olmoe").mkdir()
    (folder.parent / "notes.txt").touch()
    text = message(lambda: check_model_folder(folder.parent / "mixtrall"))
    assert text.startswith(f"the model folder '{folder.parent / 'mixtrall'}' does not exist\n")
    assert "allowed: a folder with config.json and safetensors, or a hub id like mistralai/Mixtral-8x7B-v0.1" in text
    assert text.endswith(f"fix: check the path; '{folder.parent}' holds mixtral, olmoe")


def test_a_missing_folder_without_neighbours(tmp_path: Path) -> None:
    assert message(lambda: check_model_folder(tmp_path / "none" / "such")).endswith("fix: check the path")


def test_a_file_is_no_folder(folder: Path) -> None:
    assert "config.json' is a file\n" in message(lambda: check_model_folder(folder / "config.json"))


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    text = message(lambda: check_model_folder(folder))
    assert text.startswith("there is no config.json\n")
    assert f"where: {folder}" in text
    assert "fix: name a folder that transformers or peft saved" in text


def test_no_safetensors(folder: Path) -> None:
    for file in (INDEX, *SHARDS):
        (folder / file).unlink()
    (folder / "pytorch_model.bin").touch()
    text = message(lambda: check_model_folder(folder))
    assert text.startswith("the folder holds no safetensors weights\n")
    assert f"where: {folder}" in text
    assert f"allowed: model.safetensors or {INDEX} with its shards" in text
    assert "fix: convert the checkpoint to safetensors" in text


def test_a_single_file_wins_over_an_index(folder: Path) -> None:
    """As in transformers, which would load it and never look at the shards."""
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / SHARDS[0]).unlink()
    assert shard_files(folder) == [folder / "model.safetensors"]


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    text = message(lambda: check_model_folder(folder))
    assert text.startswith(f"1 of 2 shards are missing: {SHARDS[1]}\n")
    assert f"where: {folder / INDEX}" in text
    assert "fix: download or copy the missing files again" in text


@pytest.mark.parametrize("weight_map", [{}, [], None, "model.safetensors"])
def test_an_index_without_shards(folder: Path, weight_map: object) -> None:
    write_index(folder, weight_map)
    text = message(lambda: check_model_folder(folder))
    assert text.startswith(f"{INDEX} does not fit: `weight_map` cannot be ")
    assert "allowed: weight_map: " + ("one entry or more" if weight_map == {} else "a mapping") in text


def test_an_index_that_is_not_json(folder: Path) -> None:
    (folder / INDEX).write_text("")
    assert f"{INDEX} is not valid JSON" in message(lambda: check_model_folder(folder))


# ---- one safetensors file -----------------------------------------------------------------------------------------


def refused_by_the_library(file: Path) -> bool:
    try:
        load_file(file)
    except SafetensorError:
        return True
    return False


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = {"a": entry([2], 0, 8)}
BROKEN = {
    "empty file": (b"", "truncated: 0 bytes are too few for a safetensors header"),
    "cut in the length": (with_header(ONE)[:5], "truncated: 5 bytes are too few for a safetensors header"),
    "cut in the header": (
        with_header(ONE, bytes(8))[:40],
        "truncated or corrupt: its header claims 61 bytes, the file has 40",
    ),
    "cut in the data": (with_header(ONE, bytes(7)), "truncated or corrupt: 76 bytes where its header places 77"),
    "trailing garbage": (with_header(ONE, bytes(9)), "truncated or corrupt: 78 bytes where its header places 77"),
    "absurd header length": (
        struct.pack("<Q", 2**63) + bytes(64),
        "truncated or corrupt: its header claims 9223372036854775808 bytes, the file has 72",
    ),
    "header of zeros": (with_header(bytes(32)), "corrupt: its header is not JSON"),
    "header not in UTF-8": (with_header(b'{"\xff": 1}'), "corrupt: its header is not JSON"),
    "header is a list": (with_header([1, 2]), "corrupt: its header is not a JSON object"),
    "entry without offsets": (with_header({"a": {"dtype": "F32", "shape": [2]}}), "does not place its tensors"),
    "entry is a number": (with_header({"a": 3}), "does not place its tensors"),
    "offsets too short": (with_header({"a": {**entry([2], 0, 8), "data_offsets": []}}), "does not place its tensors"),
    "offsets not numbers": (with_header({"a": entry([2], 0, "8")}, bytes(8)), "does not place its tensors"),  # type: ignore[arg-type]
    "shape is a number": (with_header({"a": {**entry([2], 0, 8), "shape": 2}}, bytes(8)), "does not place its tensors"),
    "shape of another size": (with_header({"a": entry([3], 0, 8)}, bytes(8)), "corrupt: "),
    "unknown dtype": (with_header({"a": entry([2], 0, 8, "F31")}, bytes(8)), "corrupt: "),
    "hole between tensors": (with_header({**ONE, "b": entry([2], 16, 24)}, bytes(24)), "corrupt: "),
    "overlapping tensors": (with_header({**ONE, "b": entry([2], 4, 12)}, bytes(12)), "corrupt: "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(folder: Path, case: str) -> None:
    content, expected = BROKEN[case]
    file = folder / SHARDS[1]
    file.write_bytes(content)
    assert refused_by_the_library(file), "the case is not a broken file"
    text = message(lambda: check_model_folder(folder))
    assert text.startswith(f"{SHARDS[1]} is ")
    assert expected in text
    assert f"where: {file}" in text
    assert text.endswith("fix: download or copy the file again")
    assert "Traceback" not in text


def test_every_truncation_and_no_whole_file_is_refused(folder: Path) -> None:
    file = folder / SHARDS[0]
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert "truncated" in message(lambda: check_safetensors(file))
    file.write_bytes(whole)
    check_safetensors(file)


def test_files_that_are_odd_but_whole_pass(folder: Path) -> None:
    file = folder / SHARDS[0]
    save_file({}, file)
    check_safetensors(file)
    save_file({"a": torch.zeros(0, 3), "b": torch.tensor(1.0)}, file, metadata={"format": "pt"})
    check_safetensors(file)
    assert {info.shape for info in read_tensor_infos(file)} == {(0, 3), ()}


def test_a_broken_adapter_is_an_adapter_error(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(b"12345")
    for check in (
        lambda: check_safetensors(file, kind=AdapterError),
        lambda: [*read_tensor_infos(file, kind=AdapterError)],
    ):
        assert "adapter_model.safetensors is truncated" in message(check, AdapterError)


# ---- every expert -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_expert_must_be_there(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "whole", max_shard_size="300KB")
    require_every_expert(tmp_path / "whole", 4)
    text = message(lambda: require_every_expert(tmp_path / "whole", 5))
    assert text.startswith("6 weights are missing from the checkpoint\n")  # three projections of two layers
    assert "experts.4." in text
    assert "and 2 more" in text
    assert "fix: download the checkpoint again" in text


def test_one_missing_expert_is_named(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    text = message(lambda: require_every_expert(tmp_path, 4))
    assert text.startswith("1 weight is missing from the checkpoint\n")
    assert f"where: {name}\n" in text


def test_fused_layout_has_no_experts_to_count(tmp_path: Path) -> None:
    save_fused(tiny_model("mixtral"), tmp_path / "fused")
    require_every_expert(tmp_path / "fused", 4)


def test_missing_weights_are_counted() -> None:
    text = str(incomplete([f"layer.{i}" for i in range(6)]))
    assert "6 weights are missing" in text
    assert "where: layer.0, layer.1, layer.2, layer.3 and 2 more" in text
    assert "random weights in it would train and answer nonsense" in text


# ---- a run's checkpoints ------------------------------------------------------------------------------------------


def a_checkpoint(folder: Path, step: int) -> Path:
    """As the trainer writes one."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"lora_A": torch.ones(8, 4)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(300.0)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


DAMAGE = {
    "adapter_model.safetensors": (
        "there is no adapter_model.safetensors",
        "adapter_model.safetensors is truncated or corrupt: its header",
    ),
    "adapter_config.json": ("there is no adapter_config.json", "adapter_config.json is not valid JSON"),
    "optimizer.pt": ("there is no optimizer.pt", "optimizer.pt is truncated or corrupt: File is not a zip file"),
    "scheduler.pt": ("there is no scheduler.pt", "scheduler.pt is truncated or corrupt"),
    "rng_state.pth": ("there is no rng_state.pth", "rng_state.pth is truncated or corrupt"),
    "trainer_state.json": ("checkpoint-8 was not written to its end", "trainer_state.json is not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_counts(tmp_path: Path, name: str) -> None:
    earlier, newest = a_checkpoint(tmp_path, 4), a_checkpoint(tmp_path, 8)
    (tmp_path / "checkpoint-best").mkdir()  # none of ours
    assert find_checkpoints(tmp_path, only_model=False) == Checkpoints(newest, ())
    file = newest / name
    whole = file.read_bytes()
    missing, broken = DAMAGE[name]
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    cases = [(None, missing), (whole[:-3] if "json" in name else whole[:40], broken), (b"\0" * len(whole), "")]
    for content, says in [*cases, *([(flipped, "Bad CRC-32")] if name.endswith(("pt", "pth")) else [])]:
        file.unlink() if content is None else file.write_bytes(content)
        found = find_checkpoints(tmp_path, only_model=False)
        assert found.newest == earlier
        (line,) = found.passed
        assert line.startswith("checkpoint-8 ")
        assert says in line


def test_without_a_whole_checkpoint_a_run_starts_again_or_says_why_not(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path, only_model=False) == Checkpoints(None, ())
    (a_checkpoint(tmp_path, 8) / "trainer_state.json").unlink()
    # Killed in its first save: there is nothing to lose.
    assert find_checkpoints(tmp_path, only_model=False).newest is None
    (a_checkpoint(tmp_path, 4) / "optimizer.pt").write_bytes(b"PK")
    text = message(lambda: find_checkpoints(tmp_path, only_model=False), OutputError)
    assert text.startswith(
        "there is no whole checkpoint to continue from: checkpoint-8 was not written to its end; "
        "checkpoint-4 is damaged: optimizer.pt is truncated or corrupt: "
    )
    assert "start the run again with --overwrite instead of --resume" in text
    # A run that saves its weights alone has no other files.
    assert find_checkpoints(tmp_path, only_model=True).newest == tmp_path / "checkpoint-4"


def test_each_process_has_its_random_state(tmp_path: Path) -> None:
    path = a_checkpoint(tmp_path, 4)
    for process in range(2):
        shutil.copy(path / "rng_state.pth", path / f"rng_state_{process}.pth")
    (path / "rng_state.pth").unlink()
    # Fewer processes or more may go on with it, as upstream allows.
    for processes in (1, 2, 3):
        assert find_checkpoints(tmp_path, only_model=False, processes=processes).newest == path
    (path / "rng_state_1.pth").write_bytes(b"")
    assert "rng_state_1.pth is " in message(
        lambda: find_checkpoints(tmp_path, only_model=False, processes=2), OutputError
    )
