"""Hypotheses declared before the run: the kinds of claims, their files, and their evaluation.

Below study and report, so that the study's parser and the report share one definition of a claim.
"""

from leeway.claims.schema import (
    BUNDLED,
    KINDS,
    Claim,
    Claims,
    build,
    from_manifest,
    hash_claims,
    load,
    parse,
    read_source,
    to_manifest,
)

__all__ = [
    "BUNDLED",
    "KINDS",
    "Claim",
    "Claims",
    "build",
    "from_manifest",
    "hash_claims",
    "load",
    "parse",
    "read_source",
    "to_manifest",
]
