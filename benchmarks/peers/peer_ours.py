"""pellm_lightning: parties of one launch over an exchange, or separate jobs."""

import os
import subprocess
import sys

import torch
from loop import own, rounds
from payload import Party, Session

from pellm_lightning import Aggregator, Federation
from pellm_lightning.aggregation import LowRankMean, Mean
from pellm_lightning.comm.elastic.separate_jobs import SeparateJobs
from pellm_lightning.comm.keys import make_key
from pellm_lightning.exchange import Plain, Quantized, SecureAggregation


def main() -> None:
    session, party = own()
    if session.variant == "jobs":
        with_rendezvous(session, party)
        return
    run(session, party, from_launch(session, party))


def from_launch(session: Session, party: Party) -> Federation:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(session.ports[0])}
    os.environ |= {"RANK": str(party.party), "WORLD_SIZE": str(session.parties)}
    return Federation.from_env()


def with_rendezvous(session: Session, party: Party) -> None:
    """Federate as separate jobs; party 0 starts the rendezvous where they meet."""
    roster = tuple(f"party{index}" for index in range(session.parties))
    address = f"127.0.0.1:{session.ports[0]}"
    rendezvous = None
    if party.party == 0:
        command = [sys.executable, "-m", "pellm_lightning", "rendezvous", f"--listen={address}"]
        rendezvous = subprocess.Popen(
            [*command, f"--roster={','.join(roster)}"], env=os.environ | {"PEERS_ROLE": "server"}
        )
    try:
        run(session, party, SeparateJobs(f"tcp://{address}", roster[party.party], roster).join())
    finally:
        if rendezvous is not None:
            rendezvous.terminate()
            rendezvous.wait()


def run(session: Session, party: Party, federation: Federation) -> None:
    products = session.variant == "products"
    # Factors A and B in turn, by the names that PEFT gives them.
    names = ["layer{:03}.lora_A.default.weight", "layer{:03}.lora_B.default.weight"]
    parameters = {
        names[i % 2].format(i // 2) if products else f"layer{i:03}": torch.zeros(shape)
        for i, shape in enumerate(session.shapes)
    }
    rule = LowRankMean() if products else Mean()
    aggregator = Aggregator(federation, parameters, aggregation=rule, exchange=exchange(session, party))
    aggregator.start()
    rounds(party, lambda: list(parameters.values()), lambda: aggregator.step(party.weight))
    party.ready(session.rounds)  # none leaves while another still speaks
    federation.close()


def exchange(session: Session, party: Party) -> Plain | SecureAggregation | Quantized:
    if session.variant == "compressed":
        return Quantized(bits=4)
    if session.variant == "secure":
        keys = f"{session.folder}/keys"
        make_key(keys, str(party.party))
        party.ready(-1)
        return SecureAggregation(f"{keys}/{party.party}.key", keys)
    return Plain()


if __name__ == "__main__":
    main()
