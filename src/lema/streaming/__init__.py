"""A layer's weights between storage and computation: slots, the tiers they are in, the schedule, the recomputation."""
