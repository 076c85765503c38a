"""A fused forward and backward pass of the decoder: the same computation in fewer, larger operations.

Every step is an autograd function that saves only what its backward pass needs. The plain path, transformers' modules
with peft's layers, agrees to rounding (tests/model/test_fused.py); unsupported models and adapters use it.
"""
