"""What a test may expect of numbers that a processor has rounded."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def assert_says_the_same(found: Tensor, expected: Tensor) -> None:
    """Expect what one model said of another of the same parameters, float32.

    The same parameters elsewhere in memory may be multiplied in another order: which kernel a library takes,
    and where it begins to add, depends on the processor, the number of threads and the alignment. Each of
    some ten products in a row, of a hundred summands, has an error of about sqrt(100) roundings of 2^-24 of
    the largest value; 64 times 2^-23 of it are ten times as much. One step of training, or a factor that is
    not loaded, changes logits by 1e-3 of them and more, a hundred times the tolerance.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS * float(expected.abs().max()))
