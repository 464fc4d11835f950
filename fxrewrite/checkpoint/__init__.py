"""Rewritten models from files, without the original's weights."""
