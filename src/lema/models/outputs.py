"""What a configuration asks a model to hand out beyond logits, and what of that changes the loss.

It knows names of settings; it knows nothing of layers or of training.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_OUTPUTS = ("output_router_logits", "output_attentions", "output_hidden_states")


def router_loss_of(config: PreTrainedConfig) -> str | None:
    """The entries by which a mixture's configuration adds its routers' auxiliary loss to that of the tokens; None: it
    does not, or with a weight of 0."""
    text = config.get_text_config()
    if not any(getattr(part, "output_router_logits", False) for part in (config, text)):
        return None
    weight = getattr(text, "router_aux_loss_coef", None)
    return None if weight == 0 else f"output_router_logits: true, router_aux_loss_coef: {weight}"


def take_out_outputs(config: PreTrainedConfig) -> None:
    """Let a configuration ask for logits only, in transformers' own form: no other output is there to be collected
    while layers are replaced."""
    for part in (config, config.get_text_config()):
        for name in _OUTPUTS:
            if getattr(part, name, False):
                logger.info("%s: true in the model's configuration is not followed", name)
                setattr(part, name, False)
        part.return_dict = True
