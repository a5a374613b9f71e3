"""The report of a run: result.json, figures, page.

In: the events, ledgers and documents of a run. Out: files for a person and for a program. It may not know how a run
goes on.
"""
