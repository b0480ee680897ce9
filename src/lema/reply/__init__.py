"""A trained model in use: answers, conversations, and how good they are.

This room knows prompts, sampling and turns; it knows nothing of training, slots or files of weights.
"""

from .answer import Reply
from .conversation import Conversation
from .sampling import Sampling
from .speaker import Speaker

__all__ = ["Conversation", "Reply", "Sampling", "Speaker"]
