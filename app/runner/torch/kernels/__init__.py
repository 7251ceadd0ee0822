"""Triton kernels. Proven under Triton's interpreter against their definitions in torch; on no card yet.

Nothing chooses them by default before a report of a card shows that they are right there, and faster.
"""
