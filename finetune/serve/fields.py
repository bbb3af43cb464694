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


def _each(neutral: tuple[Any, ...], names: str) -> Neutral:
    """Fields that are refused alike."""
    return dict.fromkeys(names.split(), neutral)


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
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # Whose default elsewhere is not one of the usual ones
    "mirostat_tau": (5,),
    "mirostat_eta": (0.1,),
    "xtc_threshold": (0.1,),
    "dry_base": (1.75,),
    "dry_allowed_length": (2,),
    "dry_sequence_breakers": (["\n", ":", '"', "*"],),
    "adaptive_decay": (0.9,),
    "repeat_last_n": (64, -1),
    "top_n_sigma": (-1, 0),
    "t_max_predict_ms": (-1, 0),
    "truncation": ("disabled",),
    "reasoning_format": ("none", "auto"),
    # Null alone
    **_each(
        (),
        """
        audio web_search_options moderation
        structured_outputs structural_tag regex ebnf guideline
        guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
        samplers sampler_seed allowed_token_ids stop_regex custom_logit_processor custom_params
        thinking_token_budget repetition_detection
        max_new_tokens n_predict num_predict
        chat_template template prompt_template prompt_embeds truncate truncate_prompt_tokens truncation_side num_ctx
        reasoning route lora_path adapter_id draft_model prompt_logprobs logprob_token_ids usage tool_prompt
    """,
    ),
    **_each(
        (False,),
        """
        echo grammar_lazy penalize_nl watermark use_beam_search early_stopping include_stop_str_in_output no_stop_trim
        raw return_full_text think thinking_forced_open enable_thinking post_sampling_probs details
        decoder_input_details return_tokens return_token_ids return_tokens_as_token_ids return_hidden_states
        return_progress timings_per_token verbose
    """,
    ),
    **_each((True,), "do_sample skip_special_tokens"),
    **_each((True, False), "include_reasoning separate_reasoning stream_reasoning parse_tool_calls"),
    **_each(
        (0,),
        """
        presence_penalty frequency_penalty mirostat mirostat_mode top_a epsilon_cutoff eta_cutoff smoothing_factor
        dynatemp_range xtc_probability dry_multiplier no_repeat_ngram_size min_keep min_tokens min_new_tokens
        n_indent n_discard n_probs top_n_tokens
    """,
    ),
    **_each(
        (1,),
        """
        best_of typical_p typ_p tfs_z tfs dynatemp_exponent repeat_penalty encoder_repetition_penalty num_beams
        length_penalty n_cmpl
    """,
    ),
    **_each((-1,), "dry_penalty_last_n adaptive_target reasoning_budget"),
    **_each(("",), "suffix grammar format system"),
    **_each(
        ([],),
        """
        functions grammar_triggers stop_token_ids bad_words bad_words_ids logits_processors documents context
        transforms image_data images models plugins lora response_fields
    """,
    ),
    **_each(({},), "logit_bias json_schema chat_template_kwargs mm_processor_kwargs media_io_kwargs provider options"),
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
