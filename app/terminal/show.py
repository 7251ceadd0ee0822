"""What a terminal may be sent: text of a model or a server can hold control characters, and those can lie.

And where it goes once nobody reads any more.
"""

import os
import sys


def printable(text: str) -> str:
    """The text with control characters spelled out, newlines and tabs excepted."""
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def drop_output() -> None:
    """Let what is still buffered go nowhere: the interpreter flushes at its end, and nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _shown(character: str) -> str:
    is_control = ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0
    if character in "\n\t" or not is_control:
        return character
    return f"\\x{ord(character):02x}"
