"""A fused forward and backward pass of the decoder: the same computation in fewer, larger operations.

Sequences are concatenated in a row without padding. Every step is an autograd function with its own backward pass that
saves only what it needs. The plain path is transformers' modules with peft's layers; the two agree to rounding
(tests/model/test_fused.py, tests/training/test_invariances.py). Unsupported models and adapters use the plain path.
"""
