"""Makes decoders: text → tokenizer and token shards → a trained model that `headwater serve` takes.

Imported by nothing else. `commands` registers the command line and loads torch only when a command runs.
"""
