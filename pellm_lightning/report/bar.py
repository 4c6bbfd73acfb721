"""FederationProgressBar: Lightning's rich progress bar with the federation above it."""

import os
import threading
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console, RenderableType
from typing_extensions import override

from pellm_lightning.report.run_view import RunView
from pellm_lightning.report.view import view
from pellm_lightning.trainer.pickling import own_state

_LOOK_EVERY_S = 1.0
_REFRESHES_PER_S = 10


class FederationProgressBar(RichProgressBar):
    """Lightning's ``RichProgressBar``, and above it who is in the federation and how it goes.

    It shows each party's state, weight and loss, the global loss round by round, bytes, seconds and the time
    that is left. Without a terminal, in notebooks and in CI (``CI`` is set) it shows nothing, and each round
    is one line of the log.

    Args:
        **arguments: Of ``RichProgressBar``.

    Raises:
        ModuleNotFoundError: If rich is not installed: ``pip install 'pellm-lightning[cli]'``.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"refresh_rate": _REFRESHES_PER_S} | arguments)
        self.quiet = False
        self._watched: RunView | None = None
        self._phases: dict[str, str] = {}
        self._begun: tuple[float, int] | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, watched: RunView) -> None:
        """Show this federation from now on."""
        self._watched, self._phases = watched, watched.phases()
        if self.is_enabled:
            self._over.clear()
            self._thread = threading.Thread(target=self._look, name="federation view", daemon=True)
            self._thread.start()

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        self.quiet = not console.is_terminal or console.is_jupyter or bool(os.environ.get("CI"))
        if self.quiet:
            self.disable()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._begun is None:  # the first step is slow in its own ways
            self._begun = time.monotonic(), trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        shown = {"v_num", "round", "global_loss"} if self._watched else {"v_num"}
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name not in shown}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_looking()
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_looking()
        super().teardown(trainer, pl_module, stage)
        self._watched, self._begun = None, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread and what it looks at out of a pickled callback or a copy."""
        return own_state(self, _watched=None, _over=None, _thread=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with an event of its own."""
        self.__dict__.update(state | {"_over": threading.Event()})

    # ---- what is shown

    @override
    def _init_progress(self, trainer: Trainer) -> None:
        before = self.progress
        super()._init_progress(trainer)
        if self.progress is not None and self.progress is not before:
            bars = self.progress.get_renderables

            def renderables() -> Any:
                if self._watched is not None:
                    yield self._view(self._watched)
                yield from bars()

            self.progress.get_renderables = renderables  # type: ignore[method-assign]

    def _view(self, watched: RunView) -> RenderableType:
        return view(watched, self._phases, self._seconds_left())

    def _seconds_left(self) -> float | None:
        if self._begun is None:
            return None
        since, step = self._begun
        total, now = self.trainer.estimated_stepping_batches, self.trainer.global_step
        if not step < now < total < float("inf"):
            return None
        return (time.monotonic() - since) / (now - step) * (total - now)

    def _look(self) -> None:
        """Ask what the others do, again and again, also while training waits for them."""
        while not self._over.wait(_LOOK_EVERY_S) and self._watched is not None:
            self._phases = self._watched.phases()
            self.refresh()

    def _stop_looking(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
