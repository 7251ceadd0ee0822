"""What a request asks of the engine and what the engine answers, as frozen values.

These structs are the wire format between the API process and the engine process (`app.ipc`), the
journal's content (`app.client`) and the scheduler's input. They carry token ids, never text.
"""

from enum import StrEnum

import msgspec

from app.core.memory import KeptMemory


class FinishReason(StrEnum):
    """Why a sequence ended. `error` carries a message beside it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class GrammarKind(StrEnum):
    """The languages in which a grammar can be written."""

    JSON_SCHEMA = "json_schema"
    """`Grammar.source` is a JSON Schema as JSON text."""
    REGEX = "regex"
    """A regular expression that the whole output matches."""
    CHOICE = "choice"
    """A JSON list of strings; the output is one of them."""
    LARK = "lark"
    """A Lark grammar in the dialect of llguidance."""


class Grammar(msgspec.Struct, frozen=True):
    """What the output of a sequence must be: made and checked by `app.grammar`."""

    kind: GrammarKind
    source: str
    after: int | None = None
    """The token that ends a model's reasoning: until it was drawn, all but an end of text is allowed, and the grammar
    begins behind it."""
    opened_by: int | None = None
    """With it, that holds only for an output that begins with this token; any other follows the grammar at once."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are drawn and when it ends.

    Everything a sequence's tokens depend on beside the weights and the tokens themselves. The API
    process resolves every default (the model's generation_config, a drawn seed) before it builds one.
    """

    seed: int
    """Key of the draws, unsigned 64 bit. Never absent: one is drawn where the client gave none."""
    max_tokens: int
    """Most output tokens, counted from the prompt, tokens handed over included. 0 only scores the prompt."""
    min_tokens: int = 0
    """EOS and stop tokens cannot be drawn before this many output tokens."""
    temperature: float = 1.0
    """0 is greedy: the largest logit, ties to the lowest id."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    """Empty means every token."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not appear in the output."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """None: no logprobs. k: the chosen token's and those of the k most likely."""
    num_prompt_logprobs: int | None = None
    """The same for every prompt position after the first. Such a sequence reads no prefix cache."""
    grammar: Grammar | None = None
    """Only tokens that lead on in it can be drawn, and EOS only where it may end; its end ends the sequence."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence for the engine. `n > 1` is n of these.

    `output_token_ids` are tokens that an earlier engine already delivered: position, min_tokens,
    max_tokens, penalties and logprobs go on from that boundary.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    """Requests with different salts never share KV blocks."""
    priority: int = 0
    """Orders the tenant's sequences in the waiting queue only; lower goes first."""
    tenant: str = ""
    """Whose it is: tenants share the engine by tokens (`app.scheduler.shares`)."""
    weight: float = 1.0
    """The tenant's share beside others', above 0."""
    is_on_probation: bool = False
    """An engine died in a step that computed it: compute it in steps of its own until it has brought a token."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the raw float32 logits, before any change to them."""

    logprob: float
    """Of the token that stands at this position."""
    rank: int
    """1 + how many tokens are more likely."""
    top_token_ids: tuple[int, ...]
    """The most likely tokens, most likely first, ties to the lowest id."""
    top_logprobs: tuple[float, ...]


class EngineOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought for one sequence. The last one of a sequence has a finish reason."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids` where the request asked for logprobs."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt positions computed in this step, in order, position 0 never among them."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The id in `stop_token_ids` that ended the sequence; None where EOS or something else did."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved; true from the sequence's first output on."""
    error: str | None = None
    """With finish reason `error`: one sentence for the client."""
    queue_seconds: float | None = None
    """In the sequence's first output: how long it waited before a step first took it; None where unknown."""
    was_handed_over: bool = False
    """Set by the client in the first output after the sequence went to another engine, never by engines."""
    is_request_fault: bool = False
    """With finish reason `error`: the request's own parameters brought it about, and would again."""


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """Engine state after a step. Counts over the engine's life restart at 0 with each generation."""

    step_id: int
    step_seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_kv_blocks_used: int
    num_kv_blocks: int
    total_preemptions: int
    total_prefix_query_tokens: int
    total_prefix_hit_tokens: int
    num_kv_blocks_shared: int = 0
    """Blocks in use that several sequences hold."""
    num_kv_blocks_cached: int = 0
    """Blocks not in use whose contents a prefix can still find."""


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the loaded engine resolved: everything the API process checks requests against."""

    max_model_len: int
    """Effective context: the smaller of the model's and what the KV pool holds."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    kv_bytes: int
    weight_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    device: str
    dtype: str
    tier: str
    tier_reason: str
    row_independent: bool
    fingerprint: str
    load_seconds: float
    kept: KeptMemory = KeptMemory()

    @property
    def kv_room_in_sequences(self) -> float:
        """How many sequences of full context length the KV pool holds."""
        return self.num_kv_blocks * self.block_size / self.max_model_len
