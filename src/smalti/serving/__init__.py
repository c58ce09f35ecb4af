"""Serving: an engine that shares forwards between requests at different steps, and what keeps it up and reachable.

Read in this order: messages (what is asked and answered) -> picture (one trajectory) -> scheduling and engine (ticks)
-> worker (the process) -> supervisor (what survives it) -> router (versions and arms) -> app (HTTP).
"""
