"""Fixed bounds of request fields: part of the API, the same on every server, named in the reference."""

MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024
"""n × prompts of one request."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_IDS = 16_384
"""Tokens of all bad words together."""
MAX_LABEL_CHARS = 128
MAX_TEMPLATE_KWARGS = 32
MAX_METADATA = 16
"""Entries, as OpenAI has it."""
MAX_METADATA_CHARS = 512
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 512 * 1024
"""Of all tools as JSON."""
MAX_RESUMABLE_CHOICES = 64
"""Of a resumable stream, whose every event says how far each choice is."""
INT32 = 2**31
INT64 = 2**63
DEFAULT_MAX_TOKENS = 16
GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: dividing float32 logits by less overflows them."""
