"""What this machine is: cores, memory, GPUs, container, the software on it.

In: nothing. Out: facts about the machine. It may not know what the machine is used for.
"""
