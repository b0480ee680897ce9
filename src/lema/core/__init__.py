"""Where weights are: index on disk, layout of a slot, schedule, slots, readers, transports, adapters of LoRA.

This room knows files, bytes and units; it knows nothing of attention, losses or training.
"""
