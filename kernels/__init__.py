"""Triton kernels of sparc_fast, installed as ``sparc_fast.kernels``: one operator a file, named after it."""
