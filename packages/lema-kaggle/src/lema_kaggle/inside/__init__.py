"""What the notebooks call on the machine they run on: its card, the verbs within a time limit, and what they leave.

Only that machine's folders and commands count here: nothing needs Kaggle's client.
"""

from .card import Card, prepare_card
from .results import collect, find_adapter
from .session import Session, from_environment

__all__ = ["Card", "Session", "collect", "find_adapter", "from_environment", "prepare_card"]
