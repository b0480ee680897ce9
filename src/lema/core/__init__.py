"""Module paths of the original, kept for those who import from them; what they name is elsewhere."""
