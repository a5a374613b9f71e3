"""What a run will take: memory, time of a step, money; and what published runs took.

In: a recipe, a machine, a price. Out: a quote. It may not know of runs that exist.
"""
