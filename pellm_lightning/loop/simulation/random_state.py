"""States of the global random number generators: torch's, NumPy's and Python's."""

import random
from typing import Any, TypeAlias

import numpy as np
import torch

RandomState: TypeAlias = dict[str, Any]
"""State of the generators, as tensors and numbers."""


def random_state(device: torch.device) -> RandomState:
    """Return the state of the global generators of the processor and of a device."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore a state of the global generators."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def seed_all(seed: int) -> None:
    """Seed the global generators, those of all devices too."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
