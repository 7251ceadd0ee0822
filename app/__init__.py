"""Headwater: an inference server whose streams outlive its engine."""

__version__ = "0.1.0"
