"""Hypotheses declared before the run: the kinds of claims, their files, and their evaluation.

Below study and report, so that the study's parser and the report share one definition of a claim.
"""
