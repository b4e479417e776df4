"""Triton's interpreter as a back end."""
