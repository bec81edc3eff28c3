"""How fast every operator and the whole training step are, against plain PyTorch and against the machine's roofs.

``python -m benchmarks`` in a checkout, ``sparc-fast bench`` anywhere; NOTES.md says how the numbers are taken.
"""
