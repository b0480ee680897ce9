"""A trained model in use: answers, conversations, and formats of replies that other packages bring.

Prompts, sampling and turns are known here; training, slots and files of weights are not.
"""

from .answer import Reply
from .chat_model import ChatModel
from .conversation import Conversation
from .sampling import Sampling

__all__ = ["ChatModel", "Conversation", "Reply", "Sampling"]
