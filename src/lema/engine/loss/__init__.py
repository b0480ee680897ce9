"""The loss of a batch and its gradient at the hidden states, without full logits."""
