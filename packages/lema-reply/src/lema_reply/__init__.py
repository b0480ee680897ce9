"""The demonstration: a format of replies that a model is taught, the data that teaches it, and how replies are scored.

Texts, facts and shares are known here, and of LEMA how a model is asked; weights and training are not.
"""

__version__ = "0.1.0"
