"""The evaluators, one kind a file; import them from `dendrite_engine.search`. See `base`."""
