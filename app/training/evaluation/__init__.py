"""Measures a model: in this process, or as a server gives it. Both see the same token ids."""
