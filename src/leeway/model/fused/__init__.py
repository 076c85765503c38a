"""The decoder's forward and backward pass in few, large steps: the fast way through the same weights.

Sequences lie end to end in one row without padding. Every step is an autograd function with its own backward pass that
keeps no more than it needs. The plain way is transformers' own modules with peft's layers; the two agree to rounding
(tests/test_fused.py, tests/test_invariances.py), and models or adapters that this way does not know go the plain way.
"""
