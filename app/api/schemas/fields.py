"""Every field of every generating endpoint: honoured, harmless or refused. The only tables that decide it.

`app.api.schemas.field_rules` says what the three words mean. A row that holds for several endpoints stands
here once. `python -m app.api.schemas.reference` prints the pages of docs/reference; a test holds them to it.
"""

from app.api.schemas.field_rules import (
    FieldTable,
    Harmless,
    Honoured,
    Refused,
    UnknownFields,
    anything,
    one_or_n,
    only,
)

_CONSTRAINED = "use `structured_outputs` or `response_format`"
_ID_RANGE = "128 of A-Z a-z 0-9 . _ : -"

_SHARED: tuple[Honoured, ...] = (
    Honoured(
        "model",
        "the served model",
        "a name of `GET /v1/models`",
        "Which model; another name is a 404. Answers carry its first name.",
    ),
    Honoured("temperature", "the model's, else 1", "0 to 2", "Under 1e-5 is greedy: the most likely token."),
    Honoured("top_p", "the model's, else 1", "above 0 to 1", "Draw from the most likely tokens of this total mass."),
    Honoured("top_k", "the model's, else off", "-1 or 0 (off), ≥ 1", "Draw from this many most likely tokens."),
    Honoured("min_p", "the model's, else 0", "0 to 1", "Drop tokens under this share of the likeliest's probability."),
    Honoured("presence_penalty", "0", "-2 to 2", "Taken off the logits of tokens already in the output."),
    Honoured("frequency_penalty", "0", "-2 to 2", "The same, once for each occurrence."),
    Honoured("repetition_penalty", "the model's, else 1", "0.01 to 10", "Divides logits of seen tokens."),
    Honoured("logit_bias", "none", "token id to -100..100; 1,024 entries", "Added to the logits."),
    Honoured("allowed_token_ids", "all", "token ids, at least one", "Only these tokens can be drawn."),
    Honoured(
        "bad_words", "none", "256 strings, 16,384 tokens together", "Texts whose token sequences cannot be drawn."
    ),
    Honoured("seed", "drawn, returned in `Headwater-Seed`", "64-bit integer", "Key of the draws; see below for `n`."),
    Honoured("stop", "none", "string or 16 strings, 1,024 characters each", "Ends the output before this text."),
    Honoured("stop_token_ids", "none", "1,024 token ids", "End the output; their text is left out."),
    Honoured("include_stop_str_in_output", "false", "boolean", "Keep the text of what stopped the output."),
    Honoured("ignore_eos", "false", "boolean", "Go on past the model's end tokens."),
    Honoured("response_format", "text", "text, json_object, json_schema", "Hold the output to JSON or a schema."),
    Honoured("structured_outputs", "none", "one of json, json_object, regex, choice, grammar", "The same, vLLM's way."),
    Honoured("prompt_logprobs", "none", "0 to 20; not with `stream`", "Those of the prompt, in vLLM's form."),
    Honoured("stream", "false", "boolean", "Server-sent events, one chunk for each choice and step."),
    Honoured(
        "stream_options",
        "none",
        "`include_usage`, `continuous_usage_stats`, `resumable`, `resume_token_ids`",
        "Usage in the stream; cursors in its events, see how-to/resume-a-stream.",
    ),
    Honoured("truncate_prompt_tokens", "off", "-1 (what fits), ≥ 1", "Shorten the prompt to this many tokens."),
    Honoured("truncation_side", "left", "left, right", "Which end of the prompt is dropped."),
    Honoured("skip_special_tokens", "true", "boolean", "Leave special tokens out of the text."),
    Honoured("return_token_ids", "false", "boolean", "Add `token_ids` and `prompt_token_ids` to the choices."),
    Honoured("return_tokens_as_token_ids", "false", "boolean", "Spell tokens in logprobs as `token_id:123`."),
    Honoured("cache_salt", "none", "1 to 128 characters", "Only requests of one salt share cached prefixes."),
    Honoured(
        "priority",
        "0",
        "32-bit integer",
        "Order of waiting requests; lower goes first. A key may bound it.",
    ),
)

_SHARED_HARMLESS: tuple[Harmless, ...] = (
    Harmless("user", anything(), "anything", "A label."),
    Harmless("metadata", anything(), "anything", "A label."),
    Harmless("safety_identifier", anything(), "anything", "A label."),
    Harmless("prompt_cache_key", anything(), "anything", "A label: the prefix cache needs no hint."),
    Harmless("session_id", anything(), "anything", "A label."),
    Harmless("store", only(False), "false", "Nothing is stored."),
    Harmless("service_tier", only("auto", "default"), "auto, default", "There is one tier."),
    Harmless("use_beam_search", only(False), "false", "No beam search."),
    Harmless("length_penalty", only(1, 1.0), "1", "Belongs to beam search."),
    Harmless("early_stopping", only(False), "false", "Belongs to beam search."),
    Harmless("spaces_between_special_tokens", only(True), "true", "Text is decoded as a whole."),
    Harmless("stream_interval", only(1), "1", "One chunk a step."),
    Harmless("cache_prompt", only(True), "true", "Prefixes are always cached."),
)

_SHARED_REFUSED: tuple[Refused, ...] = (
    Refused("max_new_tokens", "use `max_tokens`"),
    Refused("n_predict", "use `max_tokens`"),
    Refused("num_predict", "use `max_tokens`"),
    Refused("num_ctx", "the context is the server's: --max-model-len"),
    Refused("repeat_penalty", "use `repetition_penalty`"),
    Refused("sampling_seed", "use `seed`"),
    Refused("guided_json", _CONSTRAINED),
    Refused("guided_regex", _CONSTRAINED),
    Refused("guided_choice", _CONSTRAINED),
    Refused("guided_grammar", _CONSTRAINED),
    Refused("json_schema", _CONSTRAINED),
    Refused("regex", _CONSTRAINED),
    Refused("ebnf", _CONSTRAINED),
    Refused("grammar", _CONSTRAINED),
    Refused("stop_regex", "use `stop` or `stop_token_ids`"),
    Refused("logprob_token_ids", "use `logprobs`"),
    Refused("repetition_detection", "use `repetition_penalty`"),
    Refused("typical_p", "use `top_p`"),
    Refused("mirostat", "use `top_p`"),
    Refused("logits_processors", "no code is taken from requests"),
    Refused("lora_path", "adapters are not served yet"),
    Refused("lora", "adapters are not served yet"),
    Refused("kv_transfer_params", "there is no transfer of KV between servers"),
    Refused("vllm_xargs", "leave it out"),
    Refused("thinking_token_budget", "leave it out"),
    Refused("watermarking", "leave it out"),
)

COMPLETIONS = FieldTable(
    unknown=UnknownFields.REFUSE,
    honoured=(
        Honoured("prompt", "required", "string, strings, token ids, or lists of ids; 1,024", "What to go on from."),
        Honoured("max_tokens", "16", "≥ 0; 0 with `echo` alone", "Most output tokens; the context may end earlier."),
        Honoured(
            "min_tokens",
            "0",
            "0 to `max_tokens`",
            "No EOS or stop token, and no stop string's end, before this many tokens.",
        ),
        Honoured("n", "1", "1 to 1,024; n × prompts ≤ 1,024", "Samples of each prompt; equal ones at temperature 0."),
        Honoured("echo", "false", "boolean", "Put the prompt before the output, in `logprobs` too."),
        Honoured("logprobs", "none", "0 to 20", "Log-probabilities of the output and of this many candidates."),
        Honoured("add_special_tokens", "true", "boolean", "Let the tokenizer add its BOS to text prompts."),
        Honoured("request_id", "`X-Request-Id`, else drawn", _ID_RANGE, "The answer's id: `cmpl-<id>`."),
        *_SHARED,
    ),
    harmless=(
        *_SHARED_HARMLESS,
        Harmless("best_of", one_or_n(), "1 or the value of `n`", "More samples than are returned are not drawn."),
        Harmless("suffix", only(""), "the empty string", "No filling in the middle."),
        Harmless("no_stop_trim", only(False), "false", "See `include_stop_str_in_output`."),
    ),
    refused=(
        Refused("max_completion_tokens", "use `max_tokens` on this route"),
        Refused("messages", "chat is another route; this one takes `prompt`"),
        Refused("n_probs", "use `logprobs`"),
        Refused("prompt_embeds", "send text or token ids in `prompt`"),
        *_SHARED_REFUSED,
    ),
)

CHAT = FieldTable(
    unknown=UnknownFields.REPORT,
    honoured=(
        Honoured("messages", "required", "at least one; see below", "The conversation, for the model's template."),
        Honoured("max_completion_tokens", "the rest of the context", "≥ 1", "Most output tokens."),
        Honoured("max_tokens", "the rest of the context", "≥ 1", "The same; `max_completion_tokens` goes before it."),
        Honoured(
            "min_tokens",
            "0",
            "0 to the limit",
            "No EOS or stop token, and no stop string's end, before this many tokens.",
        ),
        Honoured("n", "1", "1 to 1,024", "Answers; equal ones at temperature 0."),
        Honoured("logprobs", "false", "boolean", "Log-probabilities of the output, with the bytes of each token."),
        Honoured("top_logprobs", "0", "0 to 20; needs `logprobs`", "Show this many most likely tokens at each place."),
        Honoured("add_generation_prompt", "true", "boolean", "End the prompt with the head of an assistant's message."),
        Honoured("continue_final_message", "false", "boolean", "Go on with the final message."),
        Honoured("echo", "false", "boolean", "Begin with the final message's text where it is an assistant's."),
        Honoured("chat_template_kwargs", "none", "see below; 32", "Variables of the model's template."),
        Honoured("reasoning_effort", "none", "128 characters", "A variable of the template, where it reads it."),
        Honoured("include_reasoning", "true", "boolean", "Send the reasoning where it is told from the answer."),
        Honoured("separate_reasoning", "true", "boolean", "Tell it from the answer; false leaves it in the text."),
        Honoured("tools", "none", "functions; 128, 512 KiB", "What the model may call; see below."),
        Honoured("tool_choice", "auto", "none, auto, required, a function", "Whether it calls; see below."),
        Honoured("parallel_tool_calls", "true", "boolean", "Whether one answer may hold several calls."),
        Honoured("add_special_tokens", "false", "boolean", "Let the tokenizer add its BOS; templates write their own."),
        Honoured("request_id", "`X-Request-Id`, else drawn", _ID_RANGE, "The answer's id: `chatcmpl-<id>`."),
        *_SHARED,
    ),
    harmless=(
        *_SHARED_HARMLESS,
        Harmless("functions", only([]), "the empty list", "Old for `tools`."),
        Harmless("function_call", only("none", "auto"), "none, auto", "Old for `tool_choice`."),
        Harmless("modalities", only(["text"]), '["text"]', "The model writes text."),
        Harmless("verbosity", only("medium"), "medium", "The model has no such dial."),
        Harmless("prediction", anything(), "anything", "A hint that changes no token."),
        Harmless("best_of", one_or_n(), "1 or the value of `n`", "More samples than are returned are not drawn."),
        Harmless("no_stop_trim", only(False), "false", "See `include_stop_str_in_output`."),
    ),
    refused=(
        Refused("prompt", "completions are another route; this one takes `messages`"),
        Refused("chat_template", "templates come from the model or the server's operator, see `--chat-template`"),
        Refused("documents", "put their text into a message"),
        Refused("audio", "the model writes text"),
        Refused("web_search_options", "the server asks nobody"),
        Refused("mm_processor_kwargs", "the model reads text"),
        Refused("media_io_kwargs", "the model reads text"),
        Refused("suffix", "there is no filling in the middle"),
        *_SHARED_REFUSED,
    ),
)

_RESPONSES_SHARED = frozenset(
    {
        *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "priority"),
        *("cache_salt", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    }
)

_RESPONSES_OWN = frozenset({"stream", "stream_options"})
"""Shared by name, with a meaning of their own."""
_ON_CHAT = "use `/v1/chat/completions`, which serves it"

_MESSAGES_PROMPT: tuple[Honoured, ...] = (
    Honoured(
        "model",
        "the served model",
        "a name of `GET /v1/models`",
        "Which model; another name is a 404. Answers carry its first name.",
    ),
    Honoured("messages", "required", "at least one; see below", "The conversation, for the model's template."),
    Honoured("system", "none", "string or text blocks", "The system's message."),
    Honoured("tools", "none", "tools of the client's own; 128, 512 KiB", "What the model may call; see below."),
    Honoured("tool_choice", "auto", "auto, any, tool, none", "Whether it calls; see below."),
    Honoured("thinking", "the model's", "disabled, enabled, adaptive", "Whether the model thinks first; see below."),
)
_MESSAGES_HARMLESS: tuple[Harmless, ...] = (
    Harmless("metadata", anything(), "anything", "A label."),
    Harmless("cache_control", anything(), "anything", "Prefixes are always cached."),
    Harmless("user_profile_id", anything(), "anything", "A label."),
    Harmless("workspace_id", anything(), "anything", "A label."),
    Harmless("service_tier", only("auto", "standard_only"), "auto, standard_only", "There is one tier."),
    Harmless("speed", only("standard"), "standard", "There is one speed."),
)
_MESSAGES_REFUSED: tuple[Refused, ...] = (
    Refused("output_config", "use `response_format` on `/v1/chat/completions`"),
    Refused("output_format", "use `response_format` on `/v1/chat/completions`"),
    Refused("container", "the server runs no code"),
    Refused("mcp_servers", "the server asks nobody"),
    Refused("context_management", "shorten the messages"),
    Refused("prompt", "completions are another route; this one takes `messages`"),
)

MESSAGES = FieldTable(
    unknown=UnknownFields.REPORT,
    honoured=(
        *_MESSAGES_PROMPT,
        Honoured("max_tokens", "required", "≥ 1", "Most output tokens; the context may end earlier."),
        Honoured("stop_sequences", "none", "16 strings, 1,024 characters each", "Ends the output before this text."),
        Honoured("temperature", "the model's, else 1", "0 to 1", "Under 1e-5 is greedy: the most likely token."),
        Honoured("top_p", "the model's, else 1", "above 0 to 1", "Draw from the most likely tokens of this mass."),
        Honoured("top_k", "the model's, else off", "0 (off), ≥ 1", "Draw from this many most likely tokens."),
        Honoured("stream", "false", "boolean", "Anthropic's server-sent events."),
    ),
    harmless=_MESSAGES_HARMLESS,
    refused=(
        *_MESSAGES_REFUSED,
        Refused("stop", "use `stop_sequences`"),
        Refused("max_completion_tokens", "use `max_tokens`"),
    ),
)

RESPONSES = FieldTable(
    unknown=UnknownFields.REPORT,
    honoured=(
        Honoured("input", "required", "string, or items; see below", "What to answer."),
        Honoured("instructions", "none", "string", "The system's message; of this response alone."),
        Honoured("previous_response_id", "none", "id of a stored response", "Go on with its conversation; see below."),
        Honoured("store", "true, where the server stores", "boolean", "Keep the answer to be read and gone on with."),
        Honoured("metadata", "none", "16 texts, 512 characters each", "Comes back in the answer."),
        Honoured("max_output_tokens", "the rest of the context", "≥ 1", "Most output tokens, reasoning included."),
        Honoured("stream", "false", "boolean", "OpenAI's typed server-sent events."),
        Honoured("stream_options", "none", "`include_obfuscation: false`", "Events are not padded."),
        Honoured("text", "text", "`format`: text, json_object, json_schema", "Hold the output to JSON or a schema."),
        Honoured("reasoning", "none", "`effort`, `summary`", "`effort` reaches a template that reads it; see below."),
        Honoured("tools", "none", "functions; 128, 512 KiB", "What the model may call; see below."),
        Honoured("tool_choice", "auto", "none, auto, required, a function", "Whether it calls; see below."),
        Honoured("parallel_tool_calls", "true", "boolean", "Whether one answer may hold several calls."),
        Honoured("include", "none", "OpenAI's names", "`message.output_text.logprobs` adds these; others add nothing."),
        Honoured("top_logprobs", "0", "0 to 20", "Log-probabilities of the text, with this many most likely tokens."),
        Honoured("chat_template_kwargs", "none", "as on chat; 32", "Variables of the model's template."),
        *(one for one in _SHARED if one.name in _RESPONSES_SHARED),
    ),
    harmless=(
        *(one for one in _SHARED_HARMLESS if one.name not in ("metadata", "store")),
        Harmless("background", only(False), "false", "Answers are made while the client waits."),
        Harmless("truncation", only("disabled"), "disabled", "Nothing of the input is dropped."),
        Harmless("max_tool_calls", anything(), "anything", "Bounds tools that OpenAI runs; there are none."),
        Harmless("prompt_cache_retention", anything(), "anything", "Prefixes are always cached, while there is room."),
        Harmless("prompt_cache_options", anything(), "anything", "The same."),
    ),
    refused=(
        Refused("messages", "chat is another route; this one takes `input`"),
        Refused("max_tokens", "use `max_output_tokens`"),
        Refused("max_completion_tokens", "use `max_output_tokens`"),
        Refused("logprobs", "use `top_logprobs`"),
        Refused("min_tokens", _ON_CHAT),
        *(Refused(one.name, _ON_CHAT) for one in _SHARED if one.name not in _RESPONSES_SHARED | _RESPONSES_OWN),
        Refused("n", "send the request several times"),
        Refused("conversation", "use `previous_response_id`, or send the conversation in `input`"),
        Refused("prompt", "no prompt templates are kept: send the text in `input`"),
        Refused("context_management", "shorten the input"),
        Refused("background_options", "answers are made while the client waits"),
        Refused("moderation", "the server judges no texts"),
        Refused("image", "the model reads text"),
        Refused("access_programs", "leave it out"),
        *_SHARED_REFUSED,
    ),
)

COUNT_TOKENS = FieldTable(
    unknown=UnknownFields.REPORT,
    honoured=_MESSAGES_PROMPT,
    harmless=_MESSAGES_HARMLESS,
    refused=_MESSAGES_REFUSED,
)
