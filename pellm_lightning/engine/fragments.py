"""Fragments of the parameters, exchanged in turn: each round sends a K-th of them (Streaming DiLoCo)."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace


def fragments_of(names: Collection[str], fragments: int) -> list[list[str]]:
    """Deal the layers of a model to fragments in turn, as Streaming DiLoCo's strided pattern does.

    A layer is what has the same name up to the first number ("model.layers.7.mlp.up_proj" and
    "model.layers.7.norm"); without a number it is a module's own parameters, its adapter included.

    Args:
        names: Names of parameters.
        fragments: Number of fragments K.

    Raises:
        ValueError: If there are fewer layers than fragments.
    """
    layers: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        numbered = re.match(r".*?\.\d+(?=\.|$)", f".{name}")
        module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        layers.setdefault(numbered[0] if numbered else module or name, []).append(name)
    if 1 < fragments > len(layers):
        raise ValueError(
            f"fragments={fragments} is more than the {len(layers)} layers of what federates"
            f" ({', '.join(layer.removeprefix('.') for layer in list(layers)[:3])}). Take fewer fragments."
        )
    dealt = list(layers.values())
    return [[name for layer in dealt[first::fragments] for name in layer] for first in range(fragments)]


@dataclass(frozen=True)
class FragmentCursor:
    """Counters of a party's local training by fragment, and which fragment is next.

    Args:
        samples: Training samples since the last round of each, but for those since the last round of any.
        steps: Optimizer step at which each was last sent.
        next: The fragment of the next round.

    Example:
        >>> FragmentCursor.from_step(2, 10).advanced(samples=8, step=12)
        FragmentCursor(samples=[0.0, 8.0], steps=[12, 10], next=1)
    """

    samples: list[float]
    steps: list[int]
    next: int = 0

    @classmethod
    def from_step(cls, fragments: int, step: int, round: int = 0) -> "FragmentCursor":
        """Return the cursor of a party that has just taken over all parameters.

        Args:
            fragments: Number of fragments K.
            step: The present optimizer step.
            round: Index of the next round.
        """
        return cls([0.0] * fragments, [step] * fragments, round % fragments)

    def is_behind(self, step: int) -> bool:
        """Tell whether the next fragment has been trained since it was sent."""
        return step > self.steps[self.next]

    def advanced(self, samples: float, step: int) -> "FragmentCursor":
        """Return the cursor after the next fragment was sent.

        Args:
            samples: Training samples since the last round of any fragment.
            step: The optimizer step at which it was sent.
        """
        since, steps = [before + samples for before in self.samples], list(self.steps)
        since[self.next], steps[self.next] = 0.0, step
        return FragmentCursor(since, steps, (self.next + 1) % len(steps))

    def aligned(self, round: int) -> "FragmentCursor":
        """Return the cursor for a round; another than the next if a lost party has come back meanwhile."""
        return replace(self, next=round % len(self.steps))


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names as people count: layer 10 after layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name)]
