"""Another path of the room `lema.chat`, for programs that import from here; `Speaker` is `ChatModel`."""

from .chat import ChatModel, Conversation, Reply, Sampling

Speaker = ChatModel
__all__ = ["ChatModel", "Conversation", "Reply", "Sampling", "Speaker"]
