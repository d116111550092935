"""Traces, counters, samples and ceilings, captured inside the process that does the work.

Nothing outside a worker imports this package: the harness starts its modules as processes of their own. One
file per framework or tool, and a framework is imported inside functions only.
"""
