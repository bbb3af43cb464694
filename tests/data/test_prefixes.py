"""Spans of templates without markers, against TRL's marked versions of the same templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from transformers import PreTrainedTokenizerBase

from finetune.data.chat import apply_template
from finetune.data.encoding import Refused, encoder_of
from finetune.data.rendering import MISTRAL_V1, MISTRAL_V3, Renderer, TemplateRefusal
from finetune.errors import DataError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>", "<s>", "</s>")
TEXTS = ("a", " b ", "assistant\n", "<|im_end|>", "</s>x", "{{ y }}", "\n")


def conversations(system: bool) -> list[list[dict[str, str]]]:
    said = [[q, a, a, q][:n] for q in TEXTS for a in TEXTS for n in (2, 4)]
    head = [{"role": "system", "content": "Be brief."}] if system else []
    return [head + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(s)] for s in said]


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen2_5", "qwen3_instruct_2507"])
def test_spans_are_those_of_the_marked_template(name: str) -> None:
    marked, unmarked = (
        Renderer((TEMPLATES / f"{name}{end}.jinja").read_text(encoding="utf-8"), NAMES, SPECIAL)
        for end in ("_training", "")
    )
    for messages in conversations(system=name != "gemma"):
        truth, ours = marked.render(messages), unmarked.render(messages)
        assert ours.pieces == truth.pieces
        text = "".join(truth.pieces)
        # TRL's block of Qwen 2.5 holds the new line of the generation prompt too.
        starts = [start + (name == "qwen2_5") for start, _ in truth.spans]
        assert [(text[:s][-1:], s, e) for s, e in ours.spans] == [
            (text[:s][-1:], s, e) for s, (_, e) in zip(starts, truth.spans, strict=True)
        ]


@pytest.mark.parametrize(
    ("turn", "end"),
    [  # Zephyr, ChatML and Llama 3: what comes after the end of a turn is not the assistant's
        ("{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}", "</s>"),
        ("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}", "<|im_end|>"),
        ("{{ '<|start|>' + m.role + '<|start|>\n\n' + m.content | trim + '<|eot_id|>' }}", "<|eot_id|>"),
    ],
)
def test_a_turn_ends_with_the_token_that_ends_it(turn: str, end: str) -> None:
    head = turn.partition(" + m.content")[0].replace("m.role", "'assistant'") + " }}"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{head}{{% endif %}}"
    marked = template.replace(turn, f"{{% generation %}}{turn}{{% endgeneration %}}")
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{text}\n"} for i, text in enumerate("abcd")]
    rendered = Renderer(template, NAMES, [*SPECIAL, "<|start|>"]).render(messages)
    text = "".join(rendered.pieces)
    blank = "" if "trim" in turn else "\n"
    assert [text[start:stop] for start, stop in rendered.spans] == [f"b{blank}{end}", f"d{blank}{end}"]
    ends = [text[:stop] for _, stop in Renderer(marked, NAMES, [*SPECIAL, "<|start|>"]).render(messages).spans]
    assert all(before.endswith(end) for before in ends)


@pytest.mark.parametrize("source", [MISTRAL_V1, MISTRAL_V3])
def test_mistral_templates_without_their_markers(source: str) -> None:
    bare = source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    marked, unmarked = (Renderer(text, NAMES, ["<s>", "</s>", "[INST]", "[/INST]"]) for text in (source, bare))
    for messages in conversations(system=False):
        assert unmarked.render(messages) == marked.render(messages)


def test_what_cannot_be_proven_is_refused() -> None:
    turn = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    late = MISTRAL_V3.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    for source, number, why in (
        (turn + "{% if not add_generation_prompt %}!{% endif %}", 2, "what comes after it changes how it is written"),
        ("{% if add_generation_prompt %}?{% endif %}" + turn, 2, "its prompt is not how the conversation"),
        ("{{ messages | length }}" + turn, 2, "its prompt is not how the conversation"),
        (turn.replace("{{ m['content']", "{{ m['role'] ~ m['content']"), 2, "'assistant' stands before the answer"),
        (late, 3, "what comes after it changes how it is written"),
    ):
        said = [{"role": "system", "content": "s"}, *messages] if source == late else messages
        with pytest.raises(TemplateRefusal, match=f"in message {number} cannot be told from the prompt: {why}"):
            Renderer(source, NAMES, ["</s>"]).render(said)


def test_the_models_own_unmarked_template(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = (TEMPLATES / "llama3.jinja").read_text(encoding="utf-8")
    apply_template(own_tokenizer, "model")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    [row] = encoder_of(own_tokenizer).encode([messages])
    assert own_tokenizer.decode(row.ids[row.supervised]) == "yes<|eot_id|>"

    own_tokenizer.chat_template = (TEMPLATES / "phi3.jinja").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="what the assistant says in message 2 cannot be told") as caught:
        apply_template(own_tokenizer, "model")
    assert "data.template: model, tried with two exchanges" in str(caught.value)
    assert "fix: set data.template: auto or mistral-v1" in str(caught.value)
    # A prompt needs no spans: a model with such a template can be asked.
    [prompt] = encoder_of(own_tokenizer).encode([messages[:1]], add_generation_prompt=True)
    assert not prompt.supervised.any()
    with pytest.raises(Refused):
        encoder_of(own_tokenizer).encode([messages * 2])
