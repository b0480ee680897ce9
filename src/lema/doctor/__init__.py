"""The doctor: facts of this machine, what they mean for a run, and what to do about it.

Facts are gathered in one place and judged in another by pure functions, so that a judgement can be tested with a
machine that is only imagined. Nothing of a model's insides, of data or of training is looked at.
"""

from .checks import examine
from .facts import Facts
from .finding import Finding, Level
from .machine import gather

__all__ = ["Facts", "Finding", "Level", "examine", "gather"]
