"""This machine: its devices, its memory, the heap of this process.

It is asked what there is; what is done with it is decided elsewhere.
"""
