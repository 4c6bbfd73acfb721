"""What each process does for integrations/test_federated_loop.py: Fabric trains a party of two by DDP."""

import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from party_threads import Classifier, data

from pellm_lightning import FederatedLoop, PartyEnvironment

environment = PartyEnvironment(num_parties=2)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[environment])
fabric.launch()
party = environment.topology.party
module = Classifier(seed=party)
optimizer = torch.optim.SGD(module.head.parameters(), lr=0.1)
wrapped, steps = fabric.setup(module, optimizer)
loader = fabric.setup_dataloaders(data(16, seed=party))
with FederatedLoop(module, optimizer, every_n_steps=2, record=False) as federated:
    for _ in range(2):
        for x, y in loader:
            loss = torch.nn.functional.cross_entropy(wrapped(x), y)
            fabric.backward(loss)
            steps.step()
            steps.zero_grad()
            federated.after_step(len(x), loss)
found = {"party": party, "vector": module.vector(), "weights": [r.weight for r in federated.rounds]}
torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
