"""What is asked for: presets, the configuration, what follows from it.

In: a preset, flags, `-o section.key=value`. Out: a `Recipe` and its `Derived`. It may not know files of a run, stores
or machines.
"""
