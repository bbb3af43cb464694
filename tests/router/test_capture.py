"""Each real token is counted exactly once, whatever wraps the model and however the batch is made."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from finetune.errors import ModelError
from finetune.router.capture import RouterCapture
from tests.conftest import REPOSITORY
from tests.router import capture_run
from tests.router.routing_models import (
    FAMILIES,
    LAYERS,
    assert_counts,
    assert_sums,
    brute_force_count,
    brute_force_sums,
    build_model,
    pad_right,
    random_rows,
)


def capture_of(model: nn.Module, family: str) -> RouterCapture:
    experts, top_k = FAMILIES[family]
    return RouterCapture(model, num_experts=experts, top_k=top_k)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_training_steps_with_padding_and_accumulation(family: str, checkpointing: str | None) -> None:
    model = build_model(family)
    rows = random_rows([9, 4, 7, 1, 5, 6])
    want = brute_force_count(model, rows, *FAMILIES[family])
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    recomputed = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: recomputed.append(1))
    with capture_of(model, family) as capture:
        for start in (0, 2, 4):
            model(**pad_right(rows[start : start + 2])).loss.backward()
        assert_counts(capture.snapshot("train"), want)
        assert capture.snapshot("eval").tokens == 0
    assert len(recomputed) == (3 if checkpointing is None else 6)
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.q_proj.parameters())


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_through_peft(checkpointing: str) -> None:
    model = build_model("mixtral")
    rows = random_rows([8, 3, 5])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    # A fresh adapter is the identity, so the base's count is the truth.
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    peft_model.train()
    peft_model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    peft_model.enable_input_require_grads()
    with capture_of(peft_model, "mixtral") as capture:
        peft_model(**pad_right(rows)).loss.backward()
        assert_counts(capture.snapshot("train"), want)


def test_through_peft_with_a_trained_router() -> None:
    model = build_model("mixtral")
    rows = random_rows([8, 3])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    with capture_of(peft_model, "mixtral") as capture:
        peft_model(**pad_right(rows)).loss.backward()
        assert_counts(capture.snapshot("train"), want)


def test_through_checkpoint_wrappers_as_accelerate_applies_them_for_fsdp() -> None:
    model = build_model("mixtral")
    rows = random_rows([8, 3])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    model.train()
    capture = capture_of(model, "mixtral")
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, MixtralDecoderLayer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    with capture:
        model(**pad_right(rows), use_cache=False).loss.backward()
        assert_counts(capture.snapshot("train"), want)


def test_train_and_eval_are_kept_apart_and_reset_apart() -> None:
    model = build_model("mixtral")
    train_rows, eval_rows = random_rows([6, 2]), random_rows([5, 9], seed=1)
    want_train = brute_force_count(model, train_rows, *FAMILIES["mixtral"])
    want_eval = brute_force_count(model, eval_rows, *FAMILIES["mixtral"])
    capture = capture_of(model, "mixtral")
    with capture:
        model.train()
        model(**pad_right(train_rows)).loss.backward()
        model.eval()
        with torch.inference_mode():
            model(**pad_right(eval_rows))
        with torch.no_grad():
            model(**pad_right(eval_rows))
        model.train()
        # A trainer's extra pass for its metrics sees training tokens a second time.
        with torch.no_grad():
            model(**pad_right(train_rows))
        assert_counts(capture.snapshot("train"), want_train)
        assert capture.snapshot("eval").tokens == 2 * want_eval[2]
        capture.reset("eval")
        assert capture.snapshot("eval").tokens == 0
        assert_counts(capture.snapshot("train"), want_train)
        model.eval()
        with torch.inference_mode():
            model(**pad_right(eval_rows))
        assert_counts(capture.snapshot("eval"), want_eval)
    model(**pad_right(eval_rows))
    assert_counts(capture.snapshot("eval"), want_eval)


def test_left_padding_and_a_key_value_cache() -> None:
    model = build_model("mixtral").eval()
    rows = random_rows([7, 4])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    ids = torch.tensor([rows[0], [0] * 3 + rows[1]])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with capture_of(model, "mixtral") as capture, torch.no_grad():
        cache = model(
            input_ids=ids[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6], use_cache=True
        ).past_key_values
        model(input_ids=ids[:, 6:], attention_mask=mask, position_ids=positions[:, 6:], past_key_values=cache)
        assert_counts(capture.snapshot("eval"), want)


@pytest.mark.parametrize("positional", [False, True])
def test_without_a_mask_every_token_is_real(positional: bool) -> None:
    model = build_model("mixtral").eval()
    rows = random_rows([5, 5, 5])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    with capture_of(model, "mixtral") as capture, torch.no_grad():
        if positional:
            model.model(torch.tensor(rows), torch.ones(3, 5))
        else:
            model(inputs_embeds=model.get_input_embeddings()(torch.tensor(rows)))
        assert_counts(capture.snapshot("eval"), want)


@pytest.mark.parametrize("multiple", [1, 16])
def test_packed_documents_count_as_if_alone_and_filler_does_not(multiple: int) -> None:
    model = build_model("mixtral").eval()
    documents = random_rows([5, 1, 7])
    want = brute_force_count(model, documents, *FAMILIES["mixtral"])
    filler = -want[2] % multiple
    ids = [token for document in documents for token in document] + [0] * filler
    positions = [i for document in documents for i in range(len(document))] + [0] * filler
    with capture_of(model, "mixtral") as capture, torch.no_grad():
        model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False)
        assert_counts(capture.snapshot("eval"), want)


def test_padding_that_is_not_a_number_does_not_spread() -> None:
    model = build_model("mixtral").eval()
    rows = random_rows([6, 2])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])
    batch = pad_right(rows)

    def poison(_gate: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, indices = output
        return logits.masked_fill(batch["attention_mask"].reshape(-1, 1) == 0, float("nan")), scores, indices

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(poison)
    with capture_of(model, "mixtral") as capture, torch.no_grad():
        model(**batch)
        assert_counts(capture.snapshot("eval"), want)


def supervised_from_third(_row: int, token: int) -> bool:
    return token >= 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_sum_of_both_parts_with_padding(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token entropy, z-loss, repetition and the rest, in groups of one layer."""
    monkeypatch.setattr("finetune.router.capture._GROUP_ELEMENTS", 1)
    model = build_model(family)
    rows, (_, top_k) = random_rows([9, 4, 7, 1]), FAMILIES[family]
    model.train(mode == "train")
    batch = pad_right(rows)
    batch["labels"][:, :2] = -100
    with capture_of(model, family) as capture:
        loss = model(**batch).loss
        if mode == "train":
            loss.backward()
        parts = capture.snapshot_parts(mode)
        whole = capture.snapshot(mode)
    assert_sums(parts["completion"], brute_force_sums(model, rows, top_k, supervised_from_third))
    assert_sums(parts["prompt"], brute_force_sums(model, rows, top_k, lambda row, token: token < 2))
    assert_sums(whole, brute_force_sums(model, rows, top_k))


def test_every_sum_of_both_parts_with_packing() -> None:
    """Neighbours in one document only, filler left out; a document of one token has none."""
    model = build_model("mixtral").train()
    documents = random_rows([5, 1, 7, 3])
    ids = [token for document in documents for token in document] + [0] * 4
    positions = [i for document in documents for i in range(len(document))] + [0] * 4
    labels = [-100 if i < 2 else token for token, i in zip(ids, positions, strict=True)]
    with capture_of(model, "mixtral") as capture:
        model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            labels=torch.tensor([labels]),
            use_cache=False,
        )
        parts = capture.snapshot_parts("train")
    assert_sums(parts["completion"], brute_force_sums(model, documents, 2, supervised_from_third))
    assert_sums(parts["prompt"], brute_force_sums(model, documents, 2, lambda row, token: token < 2))


def test_without_labels_all_is_prompt_and_paused_counts_nothing() -> None:
    model = build_model("mixtral").eval()
    rows = random_rows([6, 2])
    with capture_of(model, "mixtral") as capture, torch.no_grad():
        model(**pad_right(rows))
        capture.reset("eval")
        with capture.paused():
            model(**pad_right(rows))
        assert capture.snapshot("eval").tokens == 0
        batch = pad_right(rows)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert capture.snapshot_parts("eval")["prompt"].tokens == 8


def test_a_forward_that_raises_counts_nothing() -> None:
    model = build_model("mixtral").train()
    rows = random_rows([6, 2])
    want = brute_force_count(model, rows, *FAMILIES["mixtral"])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with capture_of(model, "mixtral") as capture:
        handle = model.model.layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**pad_right(rows))
        handle.remove()
        assert capture.snapshot("train").tokens == 0
        model(**pad_right(rows)).loss.backward()
        assert_counts(capture.snapshot("train"), want)


def test_the_model_is_left_as_it_was() -> None:
    model = build_model("mixtral").train()
    batch = pad_right(random_rows([6, 2]))
    model(**batch).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    capture = capture_of(model, "mixtral")
    with capture:
        capture.attach()  # twice is once
        model(**batch).loss.backward()
        assert capture.snapshot("train").tokens == 8
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_probabilities_are_a_softmax_over_all_experts_in_fp32_also_in_bf16() -> None:
    model = build_model("mixtral").eval().to(torch.bfloat16)
    ids = torch.tensor(random_rows([40]))
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
        assert logits[0].dtype == torch.bfloat16
        with capture_of(model, "mixtral") as capture:
            model(input_ids=ids)
            sums = capture.snapshot("eval")
    want = torch.stack([layer.double().softmax(-1).sum(0) for layer in logits])
    torch.testing.assert_close(sums.prob_sum, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.prob_sum.sum(1), torch.full((LAYERS,), 40.0).double(), rtol=1e-6, atol=0)


def test_a_model_without_a_router_is_refused() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError) as caught:
        RouterCapture(LlamaForCausalLM(config), num_experts=8, top_k=2).attach()
    message = str(caught.value)
    assert "LlamaForCausalLM has 0 stacks of layers with a router" in message
    assert "Mixtral, Qwen3-MoE and OLMoE" in message
    assert "router.log: false" in message


def test_two_processes_add_up_to_one() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", capture_run.__name__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
