"""Training: the loop, checkpoints, metrics of a step, validation.

In: prepared rows, a recipe. Out: checkpoints and events. It may not know of buckets, attempts of others or the
terminal.
"""
