"""Constrained decoding: JSON objects and schemas, regular expressions, choices and Lark grammars, over llguidance.

No torch. The API process checks a grammar before it admits the request; the engine compiles it off the step
thread, makes the masks of a step and follows the drawn tokens.
"""
