"""Fine-tune SmolLM2-1.7B on questions and answers, as `lema train` would: data, schedule, checkpoints, metrics.

python tasks/fine_tune_smollm.py [--tiny]
"""

from __future__ import annotations

from collections.abc import Sequence

from common import options, questions

from lema import LemaConfig, LemaModel
from lema.data import DataConfig
from lema.training import TrainingConfig, TrainResult


def main(arguments: Sequence[str] | None = None) -> TrainResult:
    """Train; what came of it. Every step is in `metrics.jsonl` of the output folder."""
    given = options(
        __doc__, arguments, model="HuggingFaceTB/SmolLM2-1.7B", output="smollm-output", learning_rate=5e-5, tokens=128,
        steps=100,
    )  # fmt: skip
    config = LemaConfig(
        given.model,
        device=given.device,
        dtype=given.dtype,
        ram_budget="auto",
        vram_budget="auto",
        lora_rank=16,
        lora_alpha=32,
        learning_rate=given.learning_rate,
        batch_size=4,
        max_seq_length=given.tokens,
        output_dir=str(given.output),
    )
    training = TrainingConfig(max_steps=given.steps, lr_scheduler_type="constant", logging_steps=5)
    with LemaModel(config) as model:
        result = model.get_trainer().train(
            questions(), training=training, data=DataConfig(train_on_prompt=True), resume="none"
        )
    print(f"loss {result.metrics['train_loss']:.4f}, adapter in {result.adapter}")
    return result


if __name__ == "__main__":
    main()
