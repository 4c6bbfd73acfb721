"""NVFlare's simulator: its FedAvg recipe for numpy, a process for each client, the server in this process."""

from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv
from payload import Session


def main() -> None:
    session = Session.from_env()
    size = sum(n * m for n, m in session.shapes)
    start = Path(session.folder, "start.npy")
    # Its persistor for numpy keeps one array, so the tensors travel as one.
    np.save(start, np.zeros(size, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="rounds",
        initial_ckpt=str(start),
        min_clients=session.parties,
        # A round's mean reaches the parties with the next round's order, so one more is ordered.
        num_rounds=session.rounds + 1,
        train_script=str(Path(__file__).parent / "nvflare_client.py"),
        aggregation_weights={f"site-{1 + party}": weight for party, weight in enumerate(session.weights)},
    )
    recipe.execute(SimEnv(num_clients=session.parties, workspace_root=session.folder))


if __name__ == "__main__":
    main()
