"""What the command line is given here: a tiny model."""

from tiny_language_models import bert  # noqa: F401 - a fixture
