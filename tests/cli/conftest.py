"""What the commands on results are given: tiny models."""

from tiny_language_models import (  # noqa: F401 - fixtures
    bert,
    llama,
    loading_is_over,
    one_model_at_a_time,
    quiet_trainer,
    tokenizer,
)
