"""A model that is another at party 1, and cannot be built at party 2."""

import os

import torch
from small_module import LittleModule


class Doctored(LittleModule):
    """Linear layers, with a fault by the launcher's rank."""

    def configure_model(self) -> None:
        rank = os.environ["RANK"]
        if rank == "1":
            with torch.no_grad():
                self.base.weight += 1
        if rank == "2":
            raise ValueError("model='nowhere' cannot be loaded")
