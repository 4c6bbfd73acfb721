"""torch's PeriodicModelAverager. It knows no weights, and puts new tensors into the parameters."""

import warnings

import torch
import torch.distributed as dist
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
