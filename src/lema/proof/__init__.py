"""The proof: a format of replies that a model is taught, the data that teaches it, and how its replies are scored.

This room knows texts, facts and shares; it knows nothing of weights, training or terminals.
"""
