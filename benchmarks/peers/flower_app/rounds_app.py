"""Rounds of Flower's FedAvg over arrays of the session's sizes, without training."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from payload import Party, Session

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    session = Session.from_env()
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=session.parties, min_available_nodes=session.parties
    )
    zeros = ArrayRecord([np.zeros(shape, np.float32) for shape in session.shapes])
    # A round's mean reaches the parties with the next round's order, so one more is ordered.
    strategy.start(grid, zeros, num_rounds=session.rounds + 1, train_config=ConfigRecord(), timeout=600)


@client.train()
def train(message: Message, context: Context) -> Message:
    session = Session.from_env()
    party = Party(session, int(context.node_config["partition-id"]))
    arrays = message.content["arrays"].to_numpy_ndarrays()
    round = message.content["config"]["server-round"] - 1
    if round > 0:
        party.have(round - 1, arrays)
    if round < session.rounds:
        arrays = [np.empty(shape, np.float32) for shape in session.shapes]
        party.fill_(arrays, round)
        party.ready(round)
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": party.weight})}),
        reply_to=message,
    )
