"""The sides: how each tool does the work, one module each. Each runs in a process of its own, by
the interpreter of its environment; nothing of another side may be imported here.
"""
