"""KV cache bookkeeping: blocks, block tables and shared prefixes. Pure Python: it sees no tensor."""
