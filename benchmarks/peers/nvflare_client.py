"""What each NVFlare client runs: its client API's loop, without training."""

import numpy as np
import nvflare.client as flare
from nvflare.app_common.np.constants import NPConstants
from payload import Party, Session


def main() -> None:
    session = Session.from_env()
    flare.init()
    party = Party(session, int(flare.get_site_name().removeprefix("site-")) - 1)
    ends = np.cumsum([n * m for n, m in session.shapes])[:-1]
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        values = model.params[NPConstants.NUMPY_KEY]
        round = model.current_round
        if round > 0:
            party.have(round - 1, np.split(values, ends))
        if round < session.rounds:
            values = np.empty_like(values)
            party.fill_(np.split(values, ends), round)
            party.ready(round)
        flare.send(flare.FLModel(params={NPConstants.NUMPY_KEY: values}, params_type=flare.ParamsType.FULL))


if __name__ == "__main__":
    main()
