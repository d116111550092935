"""The harness: it plans, runs and judges work, and knows no framework."""

__version__ = "0.1.0"
