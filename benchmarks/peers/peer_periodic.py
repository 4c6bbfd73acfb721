"""torch's PeriodicModelAverager. It knows no weights, and puts new tensors into the parameters."""

import os
import sys
import warnings

import torch
from loop import join_default_group, own, rounds
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager


def main() -> None:
    session, party = own()
    join_default_group(session, party)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in session.shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # it averages what has a gradient
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against a round at each step, which here is no step
        averager = PeriodicModelAverager(period=1)
    rounds(party, lambda: parameters, lambda: averager.average_parameters(parameters))
    # With torch 2.7 taking down the default group can deadlock: it waits for Gloo's threads while it holds
    # the interpreter, and a thread that frees one of the averager's temporary tensors waits for that.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
