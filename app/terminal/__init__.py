"""Commands that talk to a server as any client does: over the public API alone, with httpx.

Nothing here knows the server's code; a server that a command starts is a child with its own command line.
"""
