"""Plug-ins of vLLM for machines without a GPU."""
