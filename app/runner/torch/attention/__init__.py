"""Attention over paged KV, called by transformers models through their attention interface."""
