"""torchft's LocalSGD, with its lighthouse in the first party's process. It knows no weights."""

from datetime import timedelta

import torch
from loop import own, rounds
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo


def main() -> None:
    session, party = own()
    address = f"127.0.0.1:{session.ports[0]}"
    if party.party == 0:
        lighthouse = LighthouseServer(bind=address, min_replicas=session.parties, join_timeout_ms=60_000)
    module = torch.nn.ParameterList([torch.zeros(shape) for shape in session.shapes])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    # Each party is a replica group of one process, whose store is its own.
    port = session.ports[1 + party.party]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=300)),
        load_state_dict=module.load_state_dict,
        state_dict=module.state_dict,
        min_replica_size=session.parties,
        use_async_quorum=False,
        init_sync=False,
        timeout=timedelta(seconds=300),
        quorum_timeout=timedelta(seconds=300),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=port,
        lighthouse_addr=f"http://{address}",
        replica_id=str(party.party),
    )
    with LocalSGD(manager, module, optimizer, sync_every=1):
        # No parameter has a gradient, so that the step itself does nothing and its hook makes the round.
        rounds(party, lambda: list(module.parameters()), optimizer.step)
    party.ready(session.rounds)  # none leaves while another still asks the lighthouse
    manager.shutdown(wait=False)
    if party.party == 0:
        lighthouse.shutdown()
    del store


if __name__ == "__main__":
    main()
