"""Every field that clients are known to send, and what becomes of it.

A field is honoured (the models in `request_body.py`), harmless (it cannot change the answer, and nobody reads it), or
refused by name. One that is refused may have values that ask for nothing, mostly another server's default: those are
accepted, and null is always one of them. A name that stands nowhere is refused too, since a `max_token` that does
nothing would be found out late.

From the request fields of OpenAI's chat and text completions, and of what clients of vLLM, SGLang, llama.cpp, Text
Generation Inference, Ollama, LM Studio and OpenRouter send to the same paths.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.data import OWN_WRITE_NO_TOOLS
from finetune.serve.api_error import APIError

Neutral = Mapping[str, tuple[Any, ...]]
_TOOLS_FIX = (
    "; tool_choice: 'none' has the model answer without them, and the chat template lists them where it knows tools: "
    + OWN_WRITE_NO_TOOLS
)

# Told about the request, or a hint to the machinery behind it.
HARMLESS = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "parallel_tool_calls", "prediction"),
        # vLLM, SGLang
        *("request_id", "rid", "priority", "cache_salt", "spaces_between_special_tokens"),
        # llama.cpp
        *("cache_prompt", "id_slot", "slot_id", "n_keep", "sse_ping_interval"),
        # Ollama, LM Studio, OpenRouter
        *("keep_alive", "ttl", "session_id", "trace"),
    )
)

# What cannot be done here, and the values besides null that do not ask for it.
REFUSED: Neutral = {
    # OpenAI
    "tools": ([],),  # any, with tool_choice "none": the model may read of them
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # Constrained answers, by whatever name
    "grammar": ("",),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "json_schema": ({},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "regex": (),
    "ebnf": (),
    "format": ("",),
    "guideline": (),
    # Sampling
    "typical_p": (1,),
    "typ_p": (1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "mirostat_tau": (5,),
    "mirostat_eta": (0.1,),
    "tfs_z": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "smoothing_factor": (0,),
    "dynatemp_range": (0,),
    "dynatemp_exponent": (1,),
    "xtc_probability": (0,),
    "xtc_threshold": (0.1,),
    "dry_multiplier": (0,),
    "dry_base": (1.75,),
    "dry_allowed_length": (2,),
    "dry_penalty_last_n": (-1,),
    "dry_sequence_breakers": (["\n", ":", '"', "*"],),
    "adaptive_target": (-1,),
    "adaptive_decay": (0.9,),
    "repeat_penalty": (1,),
    "repeat_last_n": (64, -1),
    "penalize_nl": (False,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_keep": (0,),
    "samplers": (),
    "sampler_seed": (),
    "do_sample": (True,),
    "watermark": (False,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "stop_token_ids": ([],),
    "stop_regex": (),
    "bad_words": ([],),
    "bad_words_ids": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "custom_params": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    # The answer's length and end, under other names or in other ways
    "max_new_tokens": (),
    "n_predict": (),
    "num_predict": (),
    "n_indent": (0,),
    "n_discard": (0,),
    "n_cmpl": (1,),
    "t_max_predict_ms": (-1, 0),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    # The prompt
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "template": (),
    "system": ("",),
    "context": ([],),
    "raw": (False,),
    "prompt_template": (),
    "truncate": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "truncation": ("disabled",),
    "transforms": ([],),
    "num_ctx": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "image_data": ([],),
    "images": ([],),
    "prompt_embeds": (),
    "return_full_text": (False,),
    # Reasoning
    "think": (False,),
    "reasoning": (),
    "reasoning_format": ("none", "auto"),
    "reasoning_budget": (-1,),
    "include_reasoning": (True, False),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "thinking_forced_open": (False,),
    "enable_thinking": (False,),
    # Other models, or other weights
    "models": ([],),
    "provider": ({},),
    "route": (),
    "plugins": ([],),
    "lora": ([],),
    "lora_path": (),
    "adapter_id": (),
    "draft_model": (),
    "options": ({},),
    # What else the answer should tell
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "top_n_tokens": (0,),
    "details": (False,),
    "decoder_input_details": (False,),
    "return_tokens": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "response_fields": ([],),
    "verbose": (False,),
    "usage": (),
    "tool_prompt": (),
    "parse_tool_calls": (True, False),
}
# Where the two paths differ in what is done anyway.
CHAT_REFUSED: Neutral = {**REFUSED, "add_special_tokens": (False,)}
COMPLETION_REFUSED: Neutral = {
    **REFUSED,
    "add_special_tokens": (True,),
    "add_generation_prompt": (),
    "continue_final_message": (),
    "max_completion_tokens": (),
}
STREAM_OPTIONS_REFUSED: Neutral = {"continuous_usage_stats": (False,)}
STREAM_OPTIONS_HARMLESS = frozenset({"include_obfuscation"})
MESSAGE_REFUSED: Neutral = {
    "tool_calls": ([],),  # of another role than the assistant's
    "function_call": (),
    "tool_call_id": (),
    "audio": (),
    "images": ([],),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "thinking": ("",),
    "prefix": (False,),
    "partial": (False,),
}
MESSAGE_HARMLESS = frozenset({"name", "id", "annotations", "cache_control"})
PART_HARMLESS = frozenset({"annotations", "cache_control"})


def refuse_extras(
    extras: Mapping[str, Any],
    refused: Neutral,
    harmless: Iterable[str],
    honoured: Iterable[str],
    *,
    where: str = "",
) -> None:
    """Looks through what is not honoured.

    Args:
        where: what stands before a field's name, such as `messages.3.`.

    Raises:
        APIError: a field that asks for what cannot be done, or that is not known.
    """
    for name, value in extras.items():
        shown = f"{where}{name:.100}"
        if name in refused:
            if not (value is None or _is_one_of(value, refused[name]) or _stays_unused(name, extras)):
                others = ", ".join(["leaving it out", *(repr(neutral) for neutral in refused[name])])
                message = f"{shown} is not supported; allowed: {others}{_TOOLS_FIX if name == 'tools' else ''}"
                raise APIError(400, message, param=shown, code="unsupported_value")
        elif name not in harmless:
            near = difflib.get_close_matches(name, [*honoured, *refused, *harmless], n=1, cutoff=0.8)
            fix = f"did you mean {near[0]}?" if near else "leave it out"
            raise APIError(400, f"there is no {shown}; {fix}", param=shown, code="unknown_parameter")


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # True is 1 for Python, but not in JSON.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _stays_unused(name: str, extras: Mapping[str, Any]) -> bool:
    """Whether the request itself says that tools are not to be called."""
    return (name == "tools" and extras.get("tool_choice") == "none") or (
        name == "functions" and extras.get("function_call") == "none"
    )
