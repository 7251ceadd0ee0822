"""Gives memory back to the operating system after work that needed much of it for a moment."""

import ctypes


def trim() -> None:
    """Return what is free. Nothing happens where the C library cannot; the interpreter's lock is not held."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return
    malloc_trim(0)
