"""Prefect flows: what to try next, and what to show. What is done is known by the store alone
(deepspec/artifacts/status.py).
"""

from flows.plain_errors import show_plainly

show_plainly()
