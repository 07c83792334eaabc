"""Snapshot files: what a tree of branches, or a search, was; token ids, never K/V, never code."""
