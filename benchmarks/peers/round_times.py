"""How long one round takes and how much memory it needs, here and in other frameworks.

Run `make peers`. Each contender makes the same mean of the same adapters, a peer in its own virtual
environment; what cannot be installed is skipped with the reason. All take turns, session by session, so that
a busy machine slows all of them alike: compare ratios, not milliseconds. What a round is: `payload.py`.
"""

import argparse
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
for place in (str(_HERE), str(_HERE.parent)):
    if place not in sys.path:
        sys.path.insert(0, place)

from environments import NotInstalled, python_of, versions  # noqa: E402
from memory import ROLE, Watch  # noqa: E402
from payload import Session  # noqa: E402

_EXACT = 1e-6
_SESSION_S = 400.0
FEW = {"tiny": 2, "small": 3, "large": 3}
MANY = {"tiny": 3, "small": 21, "large": 5}


@dataclass(frozen=True, eq=False)
class Contender:
    """Who is timed, and how it is started.

    Args:
        name: In the tables.
        script: The file that runs in its environment: once a party, or once if it ``starts_parties`` itself.
        environment: Of `environments.py`; None is the one that runs this.
        weighted: Whether it can weigh parties; the others make the plain mean.
        error: What the mean may be off by, in 2-norms of the mean; infinite where the rule makes another one.
        rounds: Of a session, by case; the first is not counted.
    """

    name: str
    script: str
    variant: str = ""
    environment: str | None = None
    packages: Sequence[str] = ()
    starts_parties: bool = False
    weighted: bool = True
    error: float = _EXACT
    fewest_parties: int = 2
    rounds: dict[str, int] = field(default_factory=lambda: MANY)


REFERENCE = "raw all-reduce"
CONTENDERS = [
    Contender(REFERENCE, "peer_all_reduce.py", packages=["torch"]),
    Contender("ours", "peer_ours.py", "plain", packages=["torch"]),
    Contender("ours, mean of LoRA's products", "peer_ours.py", "products", error=math.inf),
    Contender("ours, 4 bits", "peer_ours.py", "compressed", error=0.4),
    Contender("ours, secure aggregation", "peer_ours.py", "secure", fewest_parties=3),
    Contender("ours, separate jobs", "peer_ours.py", "jobs"),
    Contender("PeriodicModelAverager", "peer_periodic.py", weighted=False),
    Contender(
        "torchft LocalSGD", "peer_torchft.py", "", "torchft", ["torchft", "torch", "numpy"], weighted=False
    ),
    Contender(
        "NVFlare, simulator",
        "peer_nvflare.py",
        "",
        "nvflare",
        ["nvflare", "numpy"],
        starts_parties=True,
        rounds=FEW,
    ),
    Contender(
        "Flower, deployment",
        "peer_flower.py",
        "",
        "flower",
        ["flwr", "numpy"],
        starts_parties=True,
        rounds=FEW,
    ),
]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", default=["small", "large"], choices=["tiny", "small", "large"])
    parser.add_argument("--repeats", type=int, default=3, help="sessions of each contender")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="for environments and logs")
    parser.add_argument("--only", nargs="+", help="names of contenders, or their beginnings")
    parser.add_argument("--image", type=Path, help="draw the tables into this PNG file")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pythons = installed(chosen(arguments.only), arguments.folder)
    rows: list[dict[str, Any]] = []
    try:
        for repeat in range(arguments.repeats):
            for case in arguments.cases:
                for parties in arguments.parties:
                    for contender, python in pythons.items():
                        if parties >= contender.fewest_parties:
                            rows.append(row(contender, python, case, parties, arguments.folder))
                            tell(repeat, rows[-1])
    except KeyboardInterrupt:
        print("Interrupted: what follows is of the sessions so far.")
    (arguments.folder / "rounds.json").write_text(json.dumps(rows, indent=1))
    import round_times_report

    round_times_report.report(rows, REFERENCE, arguments.image)
    if any(row["failure"] for row in rows if row["contender"].startswith("ours")):
        raise SystemExit("Not every session of ours gave the right mean: see above.")


def chosen(names: Sequence[str] | None) -> list[Contender]:
    """Return the contenders by name."""
    found = [c for c in CONTENDERS if names is None or any(c.name.startswith(name) for name in names)]
    if not found:
        raise SystemExit(f"--only names none of: {', '.join(c.name for c in CONTENDERS)}")
    return found


def installed(contenders: Iterable[Contender], folder: Path) -> dict[Contender, str]:
    """Return the interpreter of each contender that can run here, and say why another cannot."""
    pythons = {}
    for contender in contenders:
        try:
            python = python_of(contender.environment, folder) if contender.environment else sys.executable
        except NotInstalled as error:
            print(f"{contender.name} is skipped, since it does not install: {error}", flush=True)
            continue
        if contender.packages:
            print(f"{contender.name}: {versions(python, contender.packages)}", flush=True)
        pythons[contender] = python
    return pythons


def row(contender: Contender, python: str, case: str, parties: int, folder: Path) -> dict[str, Any]:
    """Run one session and return its figures; ``failure`` says what went wrong, if anything did."""
    place = folder.absolute() / "session"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rounds = contender.rounds[case]
    session = Session(
        str(place), case, parties, rounds, contender.weighted, contender.variant, free_ports(2 * parties + 4)
    )
    # The folder's name is the same each time: what is left of another session has ended by now.
    watch = Watch(json.dumps(str(place)))
    watch.start()
    try:
        failure = run(contender, python, session)
    finally:
        watch.stop()
        watch.end_what_is_left()
    figures = {"seconds": [], "error": None, "party_bytes": 0, "server_bytes": 0}
    if not failure:
        figures = figures_of(session, watch)
        if not figures["error"] <= contender.error:
            failure = f"its mean is off by {figures['error']:.2g}, {contender.error:.2g} are allowed"
        if math.isinf(contender.error):
            figures["error"] = None
    if failure:
        shutil.rmtree(folder / "failed", ignore_errors=True)
        shutil.copytree(place, folder / "failed", ignore=shutil.ignore_patterns("*.npy"))
    shutil.rmtree(place)
    return {
        "contender": contender.name,
        "case": case,
        "megabytes": 4e-6 * sum(n * m for n, m in session.shapes),
        "parties": parties,
        "weighted": contender.weighted,
        "failure": failure,
        **figures,
    }


def run(contender: Contender, python: str, session: Session) -> str | None:
    """Start the session's processes and wait for them; return what went wrong."""
    paths = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
    common = os.environ | session.to_env() | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    roles = ["server"] if contender.starts_parties else [f"party-{party}" for party in range(session.parties)]
    with ExitStack() as files:
        started = []
        for party, role in enumerate(roles):
            log = files.enter_context(open(Path(session.folder, f"{role}.out"), "w"))
            environment = common | {"PARTY": str(party), ROLE: role}
            command = [python, str(_HERE / contender.script)]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        failure = wait(started, session)
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    return failure


def wait(started: Sequence[subprocess.Popen], session: Session) -> str | None:
    end = time.monotonic() + _SESSION_S
    while any(process.poll() is None for process in started):
        if time.monotonic() > end:
            return f"it was not done after {_SESSION_S:.0f} s"
        if any(process.poll() for process in started):
            break
        time.sleep(0.1)
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        return f"a process of it ended with {failed[0]}"
    return None if session.finished() else "it ended before every party had every mean"


def figures_of(session: Session, watch: Watch) -> dict[str, Any]:
    """Return seconds of each round but the first, the largest error, and the peaks of memory."""
    ready = [session.events(party, "ready") for party in range(session.parties)]
    have = [session.events(party, "have") for party in range(session.parties)]
    seconds = [
        max(events[round]["at"] for events in have) - max(events[round]["at"] for events in ready)
        for round in range(1, session.rounds)
    ]
    return {
        "seconds": seconds,
        "error": max(event["error"] for events in have for event in events.values()),
        "party_bytes": max((size for role, size in watch.peaks.items() if role != "server"), default=0),
        "server_bytes": watch.peaks.get("server", 0),
    }


def free_ports(number: int) -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)


def tell(repeat: int, row: dict[str, Any]) -> None:
    said = row["failure"] or f"{1e3 * statistics.median(row['seconds']):.1f} ms"
    print(f"{repeat} {row['case']} {row['parties']} {row['contender']}: {said}", flush=True)


if __name__ == "__main__":
    main()
