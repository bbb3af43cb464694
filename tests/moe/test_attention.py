"""Packed and padded batches through whole models: against separate forward passes and against sdpa."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.moe import attention
from finetune.moe.attention import FullRows, LazyMask, read_packing, resolve_attention, varlen_mask
from finetune.moe.base_spec import BaseSpec
from finetune.moe.load import load_base
from finetune.router.capture import RouterCapture
from tests.models import EXPERTS, FAMILIES, tiny_model, tokens

LENGTHS = [5, 1, 9, 1, 4]


def model_with(name: str, family: str = "mixtral", *, hook: bool = True, **overrides: Any) -> PreTrainedModel:
    """A float64 model; the loop over experts, because the grouped product has no float64."""
    model = tiny_model(family, dtype=torch.float64, **overrides)
    model.set_experts_implementation("eager")
    model.set_attn_implementation(name)
    if hook:
        read_packing(model)
    return model


def documents(lengths: list[int] = LENGTHS) -> list[Tensor]:
    return list(tokens(1, sum(lengths), seed=3)[0].split(lengths))


def packed_batch(docs: list[Tensor], **collator: Any) -> dict[str, Any]:
    """TRL's real padding-free batch, as it reaches the model."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, **collator)
    batch = dict(collate([{"input_ids": torch.cat(docs).tolist(), "seq_lengths": [len(doc) for doc in docs]}]))
    del batch["labels"]
    return batch


def padded_batch(rows: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Rows of (padding before, real tokens, padding after)."""
    ids, mask = tokens(len(rows), sum(rows[0]), seed=4), torch.zeros(len(rows), sum(rows[0]), dtype=torch.int64)
    for row, (before, real, _) in enumerate(rows):
        mask[row, before : before + real] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    """Of a scalar that weighs every logit differently."""
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this must not be called")


@pytest.mark.parametrize(
    ("family", "heads"), [*((family, {}) for family in FAMILIES), ("mixtral", {"num_key_value_heads": 1})]
)
def test_a_packed_row_is_its_documents_alone(
    family: str, heads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's collator; neither sdpa's mask nor transformers' look into the positions is asked for."""
    model, docs = model_with("varlen", family, **heads), documents()
    separate = [model(doc[None], use_cache=False).logits[0] for doc in docs]
    wanted = gradients(model, torch.cat(separate))
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", refuse)
    logits = model(**packed_batch(docs), use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat(separate), rtol=1e-9, atol=1e-10)
    assert_same_gradients(gradients(model, logits), wanted)


@pytest.mark.parametrize("told_by", ["trl", "position_ids", "position_ids, no hook"])
def test_no_document_sees_another(told_by: str) -> None:
    """Bit by bit: all experts take part in every token, so that nothing but attention could carry a change over."""
    model = model_with("varlen", hook="no hook" not in told_by, num_experts_per_tok=EXPERTS)

    def logits(docs: list[Tensor]) -> Tensor:
        batch = packed_batch(docs)
        if told_by != "trl":
            batch = {name: batch[name] for name in ("input_ids", "position_ids")}
        # With a cache transformers does not look for packing; the hook does.
        return model(**batch, use_cache=told_by == "position_ids").logits[0]

    docs = documents()
    with torch.no_grad():
        before = logits(docs).split(LENGTHS)
        for changed in range(len(docs)):
            other = [(doc + 1) % 160 if index == changed else doc for index, doc in enumerate(docs)]
            after = logits(other).split(LENGTHS)
            assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [
                index != changed for index in range(len(docs))
            ]


def test_packing_told_by_position_ids_alone_is_served_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, docs = model_with("varlen"), documents()
    expected = model(**packed_batch(docs)).logits
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    rows = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    torch.testing.assert_close(model(torch.cat(docs)[None], position_ids=rows).logits, expected)
    # Two rows, each packed otherwise, and two rows that are not packed.
    ids = torch.cat(docs).view(2, -1)
    ends = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    found = model(ids, position_ids=ends).logits
    parts = [ids[0, :4], ids[0, 4:], ids[1, :1], ids[1, 1:]]
    alone = torch.cat([model(part[None]).logits[0] for part in parts])
    torch.testing.assert_close(found.flatten(0, 1), alone)
    torch.testing.assert_close(model(ids, position_ids=torch.arange(10)[None]).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_mask_agree_with_sdpa(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(3, 11)
    reference = model_with("sdpa", family)
    expected = reference(ids, use_cache=False).logits
    wanted = gradients(reference, expected)
    model = model_with("varlen", family)
    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", refuse)
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    assert_same_gradients(gradients(model, logits), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 8, 0), (0, 8, 0)],
        [(0, 8, 0), (0, 3, 5), (0, 1, 7)],
        [(0, 8, 0), (3, 5, 0), (7, 1, 0)],
        [(2, 4, 2), (0, 8, 0), (1, 6, 1)],
    ],
    ids=["none", "right", "left", "both"],
)
def test_padding_never_reaches_a_real_token(
    rows: list[tuple[int, int, int]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients of the real tokens, and the router's counts, are sdpa's; no mask is made."""
    batch = padded_batch(rows)
    real = batch["attention_mask"].bool()
    results = []
    for name in ("sdpa", "varlen"):
        model = model_with(name, family)
        if name == "varlen":
            monkeypatch.setattr(attention, "sdpa_mask", refuse)
        with RouterCapture(model, num_experts=EXPERTS, top_k=2) as capture:
            logits = model(**batch, use_cache=False).logits[real]
        results.append((logits, gradients(model, logits), capture.snapshot("eval")))
    (expected, wanted, watched), (found, gave, counted) = results
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert_same_gradients(gave, wanted)
    assert counted.tokens == watched.tokens == int(real.sum())
    assert torch.equal(counted.counts, watched.counts)


def test_a_mask_with_holes_is_left_to_sdpa() -> None:
    batch = padded_batch([(0, 8, 0), (1, 6, 1)])
    batch["attention_mask"][1, 3] = 0
    expected = model_with("sdpa")(**batch).logits
    assert torch.equal(model_with("varlen")(**batch).logits, expected)


def test_filler_of_packed_rows_is_not_counted_as_text() -> None:
    """The hook that tells the packing must not hide it from the router's watch, whichever came first."""
    batch = packed_batch(documents(), pad_to_multiple_of=16)
    filler = batch["input_ids"].shape[1] - sum(LENGTHS)
    assert filler > 0
    for name in ("sdpa", "varlen"):
        model = model_with(name)
        with RouterCapture(model, num_experts=EXPERTS, top_k=2) as capture:
            model(**batch, use_cache=False)
        assert capture.snapshot("eval").tokens == sum(LENGTHS)


@pytest.mark.parametrize("window", [1, 3, 9, 64])
def test_sliding_windows(window: int) -> None:
    """Packed: against sdpa on each document alone. Padded: against sdpa."""
    reference, model = model_with("sdpa", sliding_window=window), model_with("varlen", sliding_window=window)
    docs = documents()
    alone = torch.cat([reference(doc[None], use_cache=False).logits[0] for doc in docs])
    torch.testing.assert_close(model(**packed_batch(docs), use_cache=False).logits[0], alone)
    batch = padded_batch([(0, 12, 0), (4, 8, 0), (0, 7, 5)])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], reference(**batch).logits[real])


def test_what_varlen_does_not_serve_gets_the_mask_inside_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, as an example: packed documents stay apart on sdpa's road too."""
    model, docs = model_with("varlen", num_experts_per_tok=EXPERTS), documents()
    expected = model(**packed_batch(docs)).logits
    monkeypatch.setattr(attention, "varlen_attention", refuse)
    model.config.attention_dropout = 1e-300
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1e-300  # never drops, and is not 0
    model.train()
    torch.testing.assert_close(model(**packed_batch(docs), use_cache=False).logits, expected)


def test_the_mask_inside_documents_is_the_one_written_out() -> None:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    length = int(cu_seqlens[-1])
    lazy = varlen_mask(1, length, length, mask_function=masking_utils.causal_mask_function)
    assert isinstance(lazy, LazyMask)
    mask = lazy.sdpa(cu_seqlens)
    assert mask is not None
    owner = [index for index, count in enumerate(LENGTHS) for _ in range(count)]
    for query, key in itertools.product(range(length), repeat=2):
        assert bool(mask[0, 0, query, key]) == (key <= query and owner[key] == owner[query])
    assert lazy.sdpa(cu_seqlens) is mask
    assert lazy.sdpa(None) is None


def test_a_custom_mask_of_four_dimensions_is_obeyed() -> None:
    ids = tokens(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[:, :, :, 1] = False
    mask[:, :, 1, 1] = True
    expected = model_with("sdpa")(ids, attention_mask=mask).logits
    assert torch.equal(model_with("varlen")(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_generation_gives_sdpas_tokens(cache: str, sliding_window: int | None) -> None:
    """Greedy, a prompt padded on the left beside one that is not; prefilling is varlen's, decoding sdpa's."""
    batch = padded_batch([(0, 9, 0), (4, 5, 0)])
    generated = [
        model_with(name, sliding_window=sliding_window).generate(
            **batch,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for name in ("sdpa", "varlen")
    ]
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    torch.testing.assert_close(torch.stack(generated[0].scores), torch.stack(generated[1].scores))


def test_one_token_at_a_time_is_the_whole_row() -> None:
    model, ids = model_with("varlen"), tokens(2, 7)
    whole, past, steps = model(ids).logits, None, []
    for position in range(7):
        output = model(ids[:, position : position + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    batch = packed_batch(documents()) if kind == "packed" else padded_batch([(0, 8, 0), (2, 5, 1)])
    results = []
    for checkpointed in (False, True):
        model = model_with("varlen").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        results.append(gradients(model, model(**batch, use_cache=False).logits))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


def test_the_hook_leaves_other_attention_alone() -> None:
    model, docs = model_with("varlen"), documents()
    model.set_attn_implementation("sdpa")
    batch = {name: packed_batch(docs)[name] for name in ("input_ids", "position_ids")}
    expected = model_with("sdpa", hook=False)(**batch, use_cache=False).logits
    assert torch.equal(model(**batch, use_cache=False).logits, expected)


def test_auto_is_varlen_where_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_attention("auto", cpu, torch.float32, 48) == "varlen"
    assert resolve_attention("eager", cpu, torch.float32, 48) == "eager"
    monkeypatch.setattr(attention, "flash_serves", lambda device, dtype, head_dim: dtype == torch.bfloat16)
    assert resolve_attention("auto", gpu, torch.bfloat16, 128) == "varlen"
    assert resolve_attention("auto", gpu, torch.float32, 128) == "sdpa"
    assert resolve_attention("varlen", gpu, torch.float32, 128) == "varlen"


def test_a_loaded_model_has_it_and_saves_nothing_of_it(small_mixtral: Path, tmp_path: Path) -> None:
    model = load_base(BaseSpec(str(small_mixtral)), device="cpu").model
    assert model.config._attn_implementation == "varlen"
    explicit = load_base(BaseSpec(str(small_mixtral)), device="cpu", attn_implementation="eager").model
    assert explicit.config._attn_implementation == "eager"
    model.config.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()
    ids = tokens(1, 12)
    ends = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, position_ids=ends).logits[0, :5]
        torch.testing.assert_close(packed, explicit(ids[:, :5]).logits[0], rtol=1e-4, atol=1e-4)


def test_full_rows_are_said_to_be_full_and_others_are_not() -> None:
    """TRL's padding collator; the boundaries of a batch without padding are those of its rows."""
    collate = FullRows(DataCollatorForLanguageModeling(pad_token_id=0))
    rows = [{"input_ids": list(range(5, 5 + length))} for length in (6, 6, 4)]
    full, padded = collate(rows[:2]), collate(rows)
    assert full["cu_seq_lens_q"].tolist() == full["cu_seq_lens_k"].tolist() == [0, 6, 12]
    assert (full["max_length_q"], full["max_length_k"]) == (6, 6)
    assert "cu_seq_lens_q" not in padded
    packing = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = [{"input_ids": [5, 6, 7], "seq_lengths": [1, 2]}]
    assert FullRows(packing)(packed)["cu_seq_lens_q"].tolist() == packing(packed)["cu_seq_lens_q"].tolist()


def test_full_rows_reach_the_kernel_as_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("varlen")
    ids = tokens(3, 8)
    batch = FullRows(DataCollatorForLanguageModeling(pad_token_id=0))([{"input_ids": row.tolist()} for row in ids])
    del batch["labels"]
    seen: list[int | None] = []
    kernel = attention.varlen_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["rows"])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", spy)
    assert torch.equal(model(**batch, use_cache=False).logits, model(ids, use_cache=False).logits)
    docs = documents()
    model(**packed_batch(docs), use_cache=False)
    layers = model.config.num_hidden_layers
    assert seen == [3] * layers + [3] * layers + [None] * layers
