"""A logger that sends its metrics elsewhere and has a folder of its own, as those of W&B and MLflow."""

from typing import Any

from lightning.pytorch.loggers import Logger


class Forwarding(Logger):
    """Writes nothing.

    Args:
        save_dir: The folder, always the same.
    """

    def __init__(self, save_dir: str = "elsewhere") -> None:
        super().__init__()
        self.folder = save_dir

    @property
    def name(self) -> str:
        return "forwarding"

    @property
    def version(self) -> str:
        return "run"

    @property
    def save_dir(self) -> str:
        return self.folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass
