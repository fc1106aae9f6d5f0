"""Faults, struck on purpose while stackllm works, and what is left after them.

``python -m benchmarks.campaign [--quick] [FIGURE ...]`` prints one JSON object a line and figure. The
oracle is the same everywhere: after the fault the same command must leave, byte for byte, what an
undisturbed run leaves.
"""
