"""A torch device without a card, for tests: see README.md here.

`register` builds it, where that was not done before, and makes `torch.device("virtual")`; `plugin` does so for pytest.
"""

NAME = "virtual"
"""Of the device's type."""
