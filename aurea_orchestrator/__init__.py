"""Aurea: a cache for LLM and embedding calls."""

__version__ = "0.1.0"
