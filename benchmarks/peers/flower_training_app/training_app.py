"""The training as a Flower app: each order builds the model, trains an epoch and sends the parameters."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from training_task import Training, train_, trainable, write_

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    training = Training.from_env()
    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=training.parties, min_available_nodes=training.parties
    )

    def keep(round: int, arrays: ArrayRecord) -> None:
        training.save(round, dict(arrays.to_torch_state_dict()))

    first = ArrayRecord(trainable(training.model()))
    strategy.start(grid, first, num_rounds=training.rounds, evaluate_fn=keep)


@client.train()
def train(message: Message, context: Context) -> Message:
    import torch

    torch.set_num_threads(1)
    training, party = Training.from_env(), int(context.node_config["partition-id"])
    model = training.model()
    write_(model, dict(message.content["arrays"].to_torch_state_dict()))
    data = training.data(f"party-{party}")
    round = int(message.content["config"]["server-round"])
    train_(model, training.make_optimizer(model), training.batches(data, party, round))
    content = {
        "arrays": ArrayRecord(trainable(model)),
        "metrics": MetricRecord({"num-examples": len(data["labels"])}),
    }
    return Message(RecordDict(content), reply_to=message)
