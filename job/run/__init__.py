"""One start of a run, from its claim to its exit code: supervisor, ranks, uploader, several nodes, checks before the
start.

In: a recipe and where things are kept. Out: stages done, an exit code. It may not know how a step or a score is
computed.
"""
