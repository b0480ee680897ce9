"""One step: forward sweep, loss, backward sweep, clip, optimizer, checkpoint; and generation.

This room drives a model whose weights come and go. It knows nothing of files, slots or how units are read.
"""
