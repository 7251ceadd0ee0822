"""Loads any server that speaks OpenAI's completions API, and measures what its clients see."""
