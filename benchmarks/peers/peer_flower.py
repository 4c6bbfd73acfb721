"""Flower's deployment: a SuperLink, a SuperNode for each party, and the app that `flwr run` hands them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from payload import Session

_BIN = Path(sys.executable).parent
_HERE = Path(__file__).parent


def main() -> None:
    session = Session.from_env()
    app = Path(session.folder, "app")
    shutil.copytree(_HERE / "flower_app", app)
    started = deploy(session.ports, session.parties, Path(session.folder))
    try:
        submit(app, session.ports[0], Path(session.folder))
        wait_until(session.finished, started)
    finally:
        stop(started)


def deploy(ports: tuple[int, ...], parties: int, folder: Path) -> list[subprocess.Popen]:
    """Start what an operator starts, without TLS, and leave each its log in the folder."""
    link = ["--insecure", "--port", str(ports[0]), "--disable-runtime-dependency-installation"]
    started = [start("server", folder, "flower-superlink", *link)]
    wait_for_port(ports[0])
    for party in range(parties):
        node = ["--insecure", "--superlink", f"127.0.0.1:{ports[0]}", "--port", str(ports[1 + party])]
        node += ["--node-config", f"partition-id={party} num-partitions={parties}"]
        started.append(start(f"party-{party}", folder, "flower-supernode", *node))
    return started


def start(role: str, folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    with open(folder / f"{role}.log", "w") as log:
        return subprocess.Popen(
            [str(_BIN / program), *arguments],
            env=environment(folder, role),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def environment(folder: Path, role: str) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{_BIN}:{os.environ['PATH']}",  # a SuperNode starts its helpers by name
        "FLWR_HOME": str(folder / "flwr" / role),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PEERS_ROLE": role,
    }


def submit(app: Path, port: int, folder: Path) -> None:
    """Hand the app to the SuperLink, as a user does."""
    home = Path(environment(folder, "user")["FLWR_HOME"])
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    subprocess.run([str(_BIN / "flwr"), "run", str(app)], env=environment(folder, "user"), check=True)


def wait_for_port(port: int, timeout_s: float = 60) -> None:
    import socket

    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def wait_until(done, started: list[subprocess.Popen]) -> None:
    """Wait; raise when one of the processes has ended before."""
    while not done():
        for process in started:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args[0]} ended with {process.returncode}: see its log")
        time.sleep(0.2)


def stop(started: list[subprocess.Popen]) -> None:
    for process in reversed(started):
        process.terminate()
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    main()
