"""Runnable checks of what works claim: ``python -m experiments [ID ...]`` writes their results."""
