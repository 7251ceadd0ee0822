"""What a server keeps of what it takes: checks that any OpenAI-compatible server can be put through."""
