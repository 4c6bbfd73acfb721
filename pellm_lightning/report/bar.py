"""Progress bar of Lightning with a live view of the federation above it."""

import os
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console, RenderableType
from rich.progress import Task, TextColumn
from rich.text import Text
from typing_extensions import override

from pellm_lightning.report.logs import keep_above_live_view
from pellm_lightning.report.run_view import RunView
from pellm_lightning.report.view import last_phases, view
from pellm_lightning.trainer.pickling import own_state

_POLL_EVERY_S = 1.0
_REFRESHES_PER_S = 10


class _Description(TextColumn):
    """Description of a bar; Lightning counts to the epoch -2 where there is no last one."""

    def __init__(self) -> None:
        super().__init__("[progress.description]{task.description}")

    @override
    def render(self, task: Task) -> Text:
        text = super().render(task)
        return Text.from_markup(re.sub(r"/-\d+", "", text.markup))


class FederationProgressBar(RichProgressBar):
    """Lightning's ``RichProgressBar`` with a live view of the federation above it.

    It shows each party's state, weight and loss, the global loss round by round, bytes, seconds and the time
    that is left. Without a terminal, in notebooks and in CI (``CI`` is set) it shows nothing, and each round
    is one line of the log.

    Example::

        Trainer(callbacks=[FederatedAveraging(every_n_steps=50), FederationProgressBar()])

    Args:
        **arguments: Of ``RichProgressBar``.

    Raises:
        ModuleNotFoundError: If rich is not installed: ``pip install 'pellm-lightning[cli]'``.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"refresh_rate": _REFRESHES_PER_S} | arguments)
        self.quiet = False
        self._terminal = dict(arguments.get("console_kwargs") or {})
        self._run: RunView | None = None
        self._phases: dict[str, str] = {}
        self._first_step: tuple[float, int] | None = None
        self._shown_above: object = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, run: RunView) -> None:
        """Show this federation from now on."""
        self._run, self._phases = run, run.phases()
        if self.is_enabled:
            self._stop.clear()
            self._thread = threading.Thread(target=self._poll, name="federation view", daemon=True)
            self._thread.start()

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        console = Console(**self._terminal)
        self.quiet = not console.is_terminal or console.is_jupyter or bool(os.environ.get("CI"))
        if self.quiet:
            self.disable()
        else:
            keep_above_live_view()

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._first_step is None:  # it is slower than all others
            self._first_step = time.monotonic(), trainer.global_step
        super().on_train_batch_end(trainer, *args, **kwargs)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show how the federation has ended; the callback, which comes first, has left it."""
        self._stop_polling()
        if self._run is not None:
            self._phases = last_phases(self._run, self._phases)

    @override
    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [_Description(), *super().configure_columns(trainer)[1:]]

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        shown = {"v_num", "round", "global_loss"} if self._run else {"v_num"}
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name not in shown}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_polling()
        if self._run is not None:
            self._phases = self._phases | {self._run.names[self._run.party]: "failed"}
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_polling()
        super().teardown(trainer, pl_module, stage)
        self._run = self._first_step = self._shown_above = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread and what it polls out of a pickled callback or a copy."""
        return own_state(self, _run=None, _stop=None, _thread=None, _shown_above=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy an event of its own."""
        self.__dict__.update(state | {"_stop": threading.Event()})

    # ---- what is shown

    @override
    def refresh(self, *arguments: Any, **keywords: Any) -> None:  # Lightning 2.6.0 takes none
        self._show_above_bars()
        super().refresh(*arguments, **keywords)

    def _show_above_bars(self) -> None:
        """Put the federation above the bars, which Lightning makes anew for each stage."""
        progress = self.progress
        if progress is None or progress is self._shown_above:
            return
        self._shown_above, bars = progress, progress.get_renderables

        def renderables() -> Iterable[RenderableType]:
            if self._run is not None:
                yield view(self._run, self._phases, self._seconds_left())
            yield from bars()

        progress.get_renderables = renderables  # type: ignore[method-assign]

    def _seconds_left(self) -> float | None:
        if self._first_step is None:
            return None
        since, step = self._first_step
        total, now = self.trainer.estimated_stepping_batches, self.trainer.global_step
        if not step < now < total < float("inf"):
            return None
        return (time.monotonic() - since) / (now - step) * (total - now)

    def _poll(self) -> None:
        """Ask for the parties' phases at intervals, also while training waits for them."""
        while not self._stop.wait(_POLL_EVERY_S) and self._run is not None:
            self._phases = self._run.phases()
            self.refresh()

    def _stop_polling(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
