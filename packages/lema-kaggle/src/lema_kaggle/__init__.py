"""Runs on Kaggle: notebooks that carry LEMA, and the way there and back.

Made here: a notebook with the packages inside (`wheel`, `notebook`, `templates`) and its settings (`metadata`).
On the way: credentials, calls, waiting, logs, downloads (`credentials`, `client`, `retry_policy`, `watch`, `download`).
On the machine there: what the notebooks call (`inside`). Models, weights and training are LEMA's.
"""

__version__ = "0.1.0"
