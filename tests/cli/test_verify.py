"""`pellm verify`: what the evidence next to an adapter proves, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_chains import ROSTER, Parties
from safetensors.torch import save_file

from pellm_lightning.cli.main import main
from pellm_lightning.cli.verify import verified, verified_dispute
from pellm_lightning.comm.evidence.certificate import EvidenceError
from pellm_lightning.comm.evidence.chain import Chain
from pellm_lightning.comm.evidence.dispute import dispute_of
from pellm_lightning.comm.keys import make_key
from pellm_lightning.comm.signing_keys import SigningKey
from pellm_lightning.engine.evidence import digest
from pellm_lightning.tensors.flat_buffer import Layout

PREFIX = "model.base_model.model.layer.0.q"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the parties train, by their names for it."""
    generator = torch.Generator().manual_seed(3)
    shapes = {f"{PREFIX}.lora_A.default.weight": (2, 3), f"{PREFIX}.lora_B.default.weight": (3, 2),
              "model.base_model.model.score.modules_to_save.default.weight": (2, 2)}  # fmt: skip
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def as_peft(name: str) -> str:
    return name.removeprefix("model.").replace(".default", "").replace(".modules_to_save", "")


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., tuple[Path, Parties]]:
    """Write an adapter that is the result of a chain, and the chain."""

    def write(
        dtype: torch.dtype = torch.float32, rounds: int = 3, signers: Sequence[str] = ROSTER, **terms: Any
    ) -> tuple[Path, Parties]:
        trained = tensors(dtype)
        layout = Layout(trained)
        vector = layout.pack_(layout.new_vector())
        codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        parameters = tuple((name, codes[p.dtype], tuple(p.shape)) for name, p in sorted(trained.items()))
        parties = Parties(parameters=parameters, **terms)
        for name in ROSTER:
            path = make_key(tmp_path / "keys", name)[0] if not (tmp_path / f"keys/{name}.key").exists() else (
                tmp_path / f"keys/{name}.key")  # fmt: skip
            parties.keys[name] = SigningKey(path)._key
            parties.identities[name] = replace(parties.identities[name], key=SigningKey(path).public_key)
        chain, before = parties.chain(0), None
        for index in range(rounds):
            told = {"members": signers, "counted": signers, "weights": None} if signers != ROSTER else {}
            result = {"result": digest(layout, vector)} if index == rounds - 1 else {}
            before = parties.following(before, **told | result)
            chain.certificates.append(parties.certificate(before, signers))
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file({as_peft(name): p for name, p in trained.items()}, folder / "adapter_model.safetensors")
        (folder / "evidence.jsonl").write_text(chain.text)
        return folder, parties

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_that_is_the_result(
    exported: Callable[..., tuple[Path, Parties]], dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parties = exported(dtype)
    assert main(["verify", str(folder), "--trust", str(folder.parent / "keys")]) == 0
    said = capsys.readouterr().out
    assert (
        "3 rounds of run 1f/1/2e: each follows the one before, and is signed by 3 or more of 3 parties"
        in said
    )
    assert f"  c  signed 3, took part in 3, counts in 0; {parties.public['c']} (version 0.1.0)" in said
    assert "its 3 tensors are the result of round 2, bit for bit" in said
    assert "NOT CHECKED" not in said
    assert "WHOSE KEYS THESE ARE IS NOT CHECKED" in "\n".join(verified(folder))


def test_several_adapters_have_a_folder_each(tmp_path: Path) -> None:
    """What lies at the root is their sum, which the parties did not train as such."""
    values = {"base": 1.0, "one": 2.0}
    trained = {f"{PREFIX}.lora_A.{name}.weight": torch.full((2, 2), value) for name, value in values.items()}
    layout = Layout(trained)
    parties = Parties(parameters=tuple((name, "F32", (2, 2)) for name in sorted(trained)))
    chain = parties.chain(0)
    result = digest(layout, layout.pack_(layout.new_vector()))
    chain.certificates.append(parties.certificate(parties.following(None, result=result)))
    (tmp_path / "evidence.jsonl").write_text(chain.text)
    for folder, name in (("one", "one"), ("base-adapter", "base"), ("", "one")):
        (tmp_path / folder).mkdir(exist_ok=True)
        of = {f"{PREFIX.removeprefix('model.')}.lora_A.weight": trained[f"{PREFIX}.lora_A.{name}.weight"]}
        save_file(of, tmp_path / folder / "adapter_model.safetensors")
    assert "base-adapter/adapter_model.safetensors, one/adapter_model.safetensors" in verified(tmp_path)[-1]


def test_another_adapter_is_refused(exported: Callable[..., tuple[Path, Parties]]) -> None:
    folder, _ = exported()
    path = folder / "adapter_model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(EvidenceError, match="the adapter is not the result of round 2, whose digest is"):
        verified(folder)
    save_file({as_peft(name): p.clone() for name, p in [*tensors().items()][:2]}, path)
    with pytest.raises(
        EvidenceError, match="the 2 tensors of the adapter are not the 3 that the parties trained"
    ):
        verified(folder)
    path.write_bytes(good[:-20])
    with pytest.raises(EvidenceError, match="is cut off in"):
        verified(folder)
    path.write_bytes(b"no tensors")
    with pytest.raises(EvidenceError, match="is no safetensors file"):
        verified(folder)
    path.unlink()
    with pytest.raises(EvidenceError, match=r"no adapter_model\.safetensors to compare"):
        verified(folder)


def test_tensors_that_changed_places_are_refused(exported: Callable[..., tuple[Path, Parties]]) -> None:
    folder, _ = exported()
    swapped = {as_peft(name): p for name, p in tensors().items()}
    a, b = [name for name in swapped if "lora" in name]
    swapped[a], swapped[b] = swapped[b].T.contiguous(), swapped[a].T.contiguous()
    save_file(swapped, folder / "adapter_model.safetensors")
    with pytest.raises(EvidenceError, match="not the result of round 2"):
        verified(folder)


def test_a_chain_that_ends_early_is_of_another_adapter(exported: Callable[..., tuple[Path, Parties]]) -> None:
    folder, _ = exported()
    path = folder / "evidence.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(EvidenceError, match="the adapter is not the result of round 1"):
        verified(folder)


def test_whose_keys_are_trusted(exported: Callable[..., tuple[Path, Parties]], tmp_path: Path) -> None:
    folder, _ = exported()
    for name in ROSTER:
        make_key(tmp_path / "strangers", name)
    with pytest.raises(EvidenceError, match="round 0: the key of 'a' is not accepted: it is ed25519"):
        verified(folder, tmp_path / "strangers")
    with pytest.raises(ValueError, match=r"nothing\.pem is neither a folder with the parties' keys nor"):
        verified(folder, tmp_path / "nothing.pem")


def test_one_party_alone_makes_no_chain_of_all(exported: Callable[..., tuple[Path, Parties]]) -> None:
    """It writes terms by which it is the whole federation, so that each round has a quorum."""
    folder, _ = exported(signers=("a",), roster=("a",), quorum=1)
    with pytest.raises(EvidenceError, match=r"all 3 parties of .*keys on its roster: it lacks b, c"):
        verified(folder, folder.parent / "keys")
    said = "\n".join(verified(folder))
    assert "From round 0 on the roster was a; a quorum, 1 of 1." in said
    assert "One party alone can make such a chain." in said
    folder, _ = exported(signers=("a",), quorum=1)
    assert "From round 0 on the roster was a, b, c; a quorum, 1 of 3. One party" in verified(folder)[2]


def test_who_joins_later_is_said(exported: Callable[..., tuple[Path, Parties]]) -> None:
    """Some round with all of them, which a quorum of them has signed, vouches for those before as well."""
    folder, parties = exported(signers=("a", "b"), roster=("a", "b"))
    path, grown = folder / "evidence.jsonl", Parties(parameters=parties.terms.parameters)
    chain = Chain.parse(path.read_text())
    chain.add_terms(grown.terms)
    last = chain.certificates[-1].statement
    same = {"base": last.result, "result": last.result, "terms": grown.terms.hash}
    chain.certificates.append(parties.certificate(parties.following(last, **same)))
    path.write_text(chain.text)
    with pytest.raises(EvidenceError, match="'c' is by an unknown"):
        verified(folder)
    chain.add_identity(parties.identities["c"])
    path.write_text(chain.text)
    said = verified(folder, folder.parent / "keys")
    assert said[2:4] == [
        "From round 0 on the roster was a, b; a quorum, 2 of 2.",
        "From round 3 on the roster was a, b, c; a quorum, 2 of 3.",
    ]


def test_no_evidence_is_said(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"has no evidence\.jsonl. Only separate jobs with keys"):
        verified(tmp_path)
    (tmp_path / "evidence.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(EvidenceError, match="does not hold"):
        verified(tmp_path)
    (tmp_path / "evidence.jsonl").write_bytes(b"")
    with pytest.raises(EvidenceError, match="it has no round"):
        verified(tmp_path)


def test_it_imports_nothing_heavy(exported: Callable[..., tuple[Path, Parties]]) -> None:
    folder, _ = exported(rounds=20)
    code = (
        "import sys; from pellm_lightning.cli.main import main; main(); import json;"
        "heavy = [n for n in ('torch', 'lightning', 'transformers', 'peft', 'numpy') if n in sys.modules];"
        "print(json.dumps(heavy), file=sys.stderr)"
    )
    words = ["verify", str(folder), "--trust", str(folder.parent / "keys")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_a_refusal_is_an_exit_status(
    exported: Callable[..., tuple[Path, Parties]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = exported()
    path = folder / "evidence.jsonl"
    path.write_text(path.read_text().replace('"weights":[8.0', '"weights":[9.0', 1))
    with pytest.raises(SystemExit) as exited:
        main(["verify", str(folder)])
    assert exited.value.code in (1, 2)
    said = " ".join(capsys.readouterr().err.split())
    assert "does not hold: round 0: the signature of 'a' does not fit" in said
    assert "Do not rely on this adapter" in said


def test_a_dispute_says_who_equivocated(
    exported: Callable[..., tuple[Path, Parties]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, parties = exported()
    first = parties.following(None)
    other = replace(first, result="f" * 64)
    signed = [("a", first), ("b", first), ("b", other)]
    votes: dict[str, list[dict[str, str]]] = {}
    for name, statement in signed:
        vote = {"statement": statement.text, "signature": parties.sign(statement, name).value}
        votes.setdefault(name, []).append(vote)
    path = folder / "dispute-1.jsonl"
    path.write_text(dispute_of(votes, first, parties.identities).text)
    assert main(["verify", str(path), "--trust", str(folder.parent / "keys")]) == 0
    said = capsys.readouterr().out
    assert "b has signed more than one: it equivocated." in said
    assert f"  b: {parties.public['b']}" in said
    path.write_text(path.read_text().replace("f" * 64, "e" * 64))
    with pytest.raises(EvidenceError, match=r"dispute-1.jsonl does not hold: .* It proves nothing about any"):
        verified_dispute(path)
    with pytest.raises(EvidenceError, match=r"not two statements that differ|not of one attempt"):
        verified_dispute(folder / "evidence.jsonl")
