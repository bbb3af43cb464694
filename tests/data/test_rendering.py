"""The forms of our templates against the templates themselves."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.rendering import CHATML, MISTRAL_V1, MISTRAL_V3, MISTRAL_V3_SPACED, Renderer, TemplateRefusal

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = ("", " ", "\n", "a", "</s>", "a\U000f0000b", "\U000f0001", "{{ x }}", "  two  ", "\ue000", "<s></s>")


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(MISTRAL_V1, NAMES, ["<unk>", "<s>", "</s>"])


@pytest.mark.parametrize("source", [MISTRAL_V1, MISTRAL_V3, MISTRAL_V3_SPACED, CHATML])
def test_a_filled_form_is_what_the_template_gives(source: str, reference_conversations: list[dict[str, Any]]) -> None:
    renderer = Renderer(source, NAMES, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_end|>", "<|im_start|>"])
    made = [
        [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), texts, strict=True)]
        for texts in ((a, b, c) for a in TEXTS for b in TEXTS for c in TEXTS)
    ]
    # Part of both, since all take half a minute a template. 7 and the 11 texts share no factor: every pair still meets.
    conversations = made[::7] + [row["messages"] for row in reference_conversations[::5]]
    conversations += [messages[:-1] for messages in conversations]
    for messages in conversations:
        assert renderer.render(messages) == renderer.render_by_template(messages), messages


def test_many_turns(renderer: Renderer) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"</s>{i}"} for i in range(400)]
    rendered = renderer.render(messages)
    assert rendered == renderer.render_by_template(messages)
    text = "".join(rendered.pieces)
    assert [text[start:end] for start, end in rendered.spans] == [f" </s>{i}</s>" for i in range(1, 400, 2)]


def test_a_role_that_is_a_control_token_is_refused(renderer: Renderer) -> None:
    with pytest.raises(TemplateRefusal, match="message 1 has role </s> where"):
        renderer.render([{"role": "</s>", "content": "x"}])


def test_control_tokens_typed_as_a_role_are_text_in_a_template_that_writes_roles() -> None:
    renderer = Renderer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}", NAMES, ["</s>"]
    )
    rendered = renderer.render([{"role": "</s>", "content": "x</s>"}])
    assert rendered.pieces == ["</s>: x</s>", "</s>", ""]


@pytest.mark.parametrize("template", [MISTRAL_V1, MISTRAL_V1 + " "], ids=["form", "template"])
def test_ever_new_shapes_do_not_fill_the_memory(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.rendering._KEPT_SHAPES", 8)
    renderer = Renderer(template, NAMES, ["<unk>", "<s>", "</s>"])
    kept = (renderer._forms, renderer._controls)
    for turns in range(1, 30):
        messages = [{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(turns)]
        assert renderer.render(messages) == renderer.render(messages)
        assert sum(map(len, kept)) <= 8
    assert any(kept)
    kept[0].clear()
    kept[1].clear()
    renderer.render([{"role": ("user", "assistant")[i % 2], "content": "x"} for i in range(301)])
    assert not any(kept)
