"""What the integrations are given: tiny models."""

from tiny_language_models import llama, loading_is_over, one_model_at_a_time  # noqa: F401 - fixtures
