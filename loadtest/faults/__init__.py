"""Injects faults into a real server over HTTP and holds every stream to its uninterrupted run, byte by byte."""
