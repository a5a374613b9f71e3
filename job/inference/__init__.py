"""A finished model in other hands: read from anywhere, exported and checked, sampled, played with.

In: a run, a checkpoint, an export, or a checkpoint of the leaderboard's program. Out: a folder that transformers loads,
text, a page. It may not train.
"""
