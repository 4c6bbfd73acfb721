"""A LightningModule that FSDP2, tensor parallelism or a mesh of both shards, if its Trainer has a mesh."""

from collections import OrderedDict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from party_threads import linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pellm_lightning.tensors.selection import plain_name
from pellm_lightning.tensors.sharding import reshard, whole


class ShardedModule(LightningModule):
    """Two layers and a head on the same base at every party; LoRA on the layers, or all of them trained.

    The sizes do not divide by the processes: ranks of 2 and a head of 3 rows, over 2 and 3 processes.

    Args:
        party: Seeds what a party draws for itself.
        lora: Whether the layers have LoRA, and only it and the head train.
        compiled: Whether ``torch.compile`` wraps it.
        recomputes: Whether activations are recomputed in the backward pass.
        offloads: Whether FSDP2 keeps its shards in CPU memory.
    """

    def __init__(
        self,
        party: int,
        *,
        lora: bool = True,
        compiled: bool = False,
        recomputes: bool = False,
        offloads: bool = False,
        optimizer: str = "AdamW",
        lr: float = 0.02,
    ) -> None:
        super().__init__()
        self.compiled, self.recomputes, self.offloads = compiled, recomputes, offloads
        self.optimizer, self.lr = optimizer, lr
        self.party, self.lora = party, lora
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        net: Any = nn.Sequential(
            OrderedDict(
                first=linear(8, 12, seed=1 if self.lora else 10 + self.party),
                tanh=nn.Tanh(),
                second=linear(12, 12, seed=2),
                relu=nn.ReLU(),
                head=linear(12, 3, seed=3),
            )
        )
        if self.lora:
            from lora_module import building
            from peft import LoraConfig, get_peft_model

            with building:
                torch.manual_seed(100 + self.party)
                config = LoraConfig(
                    r=2, lora_alpha=4, target_modules=["first", "second"], modules_to_save=["head"]
                )
                net = get_peft_model(net, config)
        mesh = getattr(self, "_device_mesh", None)
        net = net.to(torch.get_default_dtype())
        self.net = net if mesh is None else self._sharded(net, mesh)
        if self.compiled:
            self.net = torch.compile(self.net, backend="eager")

    def _sharded(self, net: Any, mesh: Any) -> Any:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        layers = net.base_model.model if self.lora else net
        if mesh["tensor_parallel"].size() > 1:
            column = ColwiseParallel(output_layouts=Replicate())
            row = RowwiseParallel(input_layouts=Replicate())
            for name in ("first", "second"):
                layer = getattr(layers, name)
                if self.lora:
                    plan = {"base_layer": column, "lora_A.default": row, "lora_B.default": column}
                    parallelize_module(layer, mesh["tensor_parallel"], plan)
                else:
                    parallelize_module(layer, mesh["tensor_parallel"], column)
        if mesh["data_parallel"].size() > 1:
            options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if self.offloads else {}
            for layer in (layers.first, layers.second, net):  # the head is in the root's group
                fully_shard(layer, mesh=mesh["data_parallel"], **options)
        return net

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.net.parameters()).dtype)
        return checkpoint(self.net, x, use_reentrant=False) if self.recomputes else self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("val_loss", loss, sync_dist=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return getattr(torch.optim, self.optimizer)(parameters, lr=self.lr)

    def trained(self) -> dict[str, Tensor]:
        """Return whole copies of the trained parameters; all processes of the party call it."""
        reshard(self)
        named = {plain_name(name): p for name, p in self.named_parameters() if p.requires_grad}
        return {name: whole(p).cpu().clone() for name, p in sorted(named.items())}

    def vector(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.trained().values()])
