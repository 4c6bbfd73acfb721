"""The configuration of a run, saved so that no later run overwrites it or is kept from starting by it."""

import os

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from pellm_lightning.trainer import isolation
from pellm_lightning.trainer.environment import topology_of
from pellm_lightning.trainer.file_names import numbered


class SaveNumberedConfig(SaveConfigCallback):
    """Lightning's callback, which refuses to start where an earlier run has left its configuration.

    Instead the same configuration is left as it is, and another one gets a number: ``config-1.yaml``. Where
    the log directory is that of all parties, as that of a logger whose folder nobody can move, each saves
    below ``party-<k>/`` of it.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save from one process of the party, before anything is trained."""
        if not self.already_saved and self.save_to_log_dir and not (self.overwrite or self.multifile):
            folder = trainer.log_dir or trainer.default_root_dir  # from all processes: it is broadcast
            if trainer.is_global_zero:
                topology = topology_of(trainer)
                if topology.num_parties > 1:
                    folder = isolation.below(folder, topology.party)
                self._save(folder)
            self.save_to_log_dir = False  # what is left to do is not about that
        super().setup(trainer, pl_module, stage)

    def _save(self, folder: str) -> None:
        content = self.parser.dump(self.config, skip_none=False).encode()
        fs = get_filesystem(folder)
        fs.makedirs(folder, exist_ok=True)
        for path in numbered(os.path.join(folder, self.config_filename)):
            if not fs.exists(path):
                fs.pipe_file(path, content)
                return
            if fs.cat_file(path) == content:
                return
