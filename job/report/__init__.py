"""The page a person reads after a run, and the `result.json` a machine reads."""
