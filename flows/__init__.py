"""Prefect flows: they decide what to try next, and show it. What is done is known by the store
alone.
"""

from flows.plain_errors import log_errors_plainly

log_errors_plainly()
