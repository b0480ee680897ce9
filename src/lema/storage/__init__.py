"""Files and bytes: the index of a checkpoint, headers, layouts, direct reads, typed views, writing whole or not at all.

Nothing here has heard of layers' order, attention or training.
"""
