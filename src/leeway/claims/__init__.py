"""Hypotheses written down before the run: what may be claimed (kinds), how a file of them is read, how each is judged.

Below study and report, so that the study's parser and the page have one definition of a claim.
"""

from leeway.claims.schema import BUNDLED, KINDS, Claim, Claims, build, hash_of, load, parse, restored, stored, text_of

__all__ = ["BUNDLED", "KINDS", "Claim", "Claims", "build", "hash_of", "load", "parse", "restored", "stored", "text_of"]
