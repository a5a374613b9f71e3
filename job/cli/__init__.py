"""The command line: click commands, shared options, published command lines.

In: words and environment variables. Out: one call of a lower room, an exit code. It may not know how anything is done.
"""
