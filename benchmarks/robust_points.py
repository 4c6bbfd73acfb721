"""Task for `robust.py`: points around ten centres, and a network with LoRA pairs on two layers."""

import torch
from torch import Tensor, nn

CLASSES, INPUTS, HIDDEN, RANK = 10, 20, 48, 6
STEPS, SAMPLES, BATCH = 10, 300, 32
Parameters = dict[str, Tensor]


class Points:
    """Points of ten classes, and how they are divided; `skew` gives each party few of the labels."""

    rounds = 15
    cap = 0.3
    lora = None

    def __init__(self, seed: int, parties: int, *, skew: bool) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(CLASSES, INPUTS, generator=self.generator) * 1.1
        self.base1 = torch.randn(HIDDEN, INPUTS, generator=self.generator) / INPUTS**0.5
        self.base2 = torch.randn(HIDDEN, HIDDEN, generator=self.generator) / HIDDEN**0.5
        even = torch.full((CLASSES,), 1 / CLASSES)
        self.test = self.points(2000, even)
        drawn = torch._sample_dirichlet(torch.full((parties, CLASSES), 0.5), generator=self.generator)
        self.shards = [self.points(SAMPLES, drawn[party] if skew else even) for party in range(parties)]

    def points(self, count: int, of_classes: Tensor) -> tuple[Tensor, Tensor]:
        y = of_classes.multinomial(count, replacement=True, generator=self.generator)
        return self.centers[y] + torch.randn(count, INPUTS, generator=self.generator), y

    def weight(self, party: int) -> float:
        return len(self.shards[party][1])

    def start(self) -> Parameters:
        parameters = {"head.weight": torch.zeros(CLASSES, HIDDEN), "head.bias": torch.zeros(CLASSES)}
        for name, inputs in (("l1", INPUTS), ("l2", HIDDEN)):
            parameters[f"{name}.lora_A.default.weight"] = (
                torch.randn(RANK, inputs, generator=torch.Generator().manual_seed(7)) / inputs**0.5
            )
            parameters[f"{name}.lora_B.default.weight"] = torch.zeros(HIDDEN, RANK)
        return parameters

    def logits(self, p: Parameters, x: Tensor) -> Tensor:
        for name, base in (("l1", self.base1), ("l2", self.base2)):
            a, b = p[f"{name}.lora_A.default.weight"], p[f"{name}.lora_B.default.weight"]
            x = torch.relu(x @ base.T + 2 * (x @ a.T) @ b.T)
        return x @ p["head.weight"].T + p["head.bias"]

    def accuracy(self, p: Parameters) -> float:
        x, y = self.test
        return float((self.logits(p, x).argmax(dim=1) == y).float().mean())

    def train_(self, p: Parameters, party: int, generator: torch.Generator, *, flipped: bool) -> None:
        x, y = self.shards[party]
        y = (y + 1) % CLASSES if flipped else y
        leaves = [q.requires_grad_() for q in p.values()]
        optimizer = torch.optim.SGD(leaves, lr=0.1)
        with torch.enable_grad():
            for _ in range(STEPS):
                at = torch.randint(0, len(x), (BATCH,), generator=generator)
                loss = nn.functional.cross_entropy(self.logits(p, x[at]), y[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for q in leaves:
            q.requires_grad_(False).grad = None
