"""PartySpec: what a party declares at the handshake, and the comparison of two of them.

Sizes, order and dtypes that differ make a collective abort an innocent process or return garbage in silence,
so they are compared as text, before any tensor is sent. Pure: builds and compares plain containers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from pellm_lightning.aggregation.base import Part
from pellm_lightning.aggregation.plan import Plan
from pellm_lightning.engine.base_difference import base_difference
from pellm_lightning.tensors.adapter_config import RANK_FIELDS, config_differences, without_ranks
from pellm_lightning.tensors.digest import tensor_digest
from pellm_lightning.tensors.flat_buffer import Layout

PROTOCOL = 8
"""Version of what parties say to each other; parties of different versions refuse each other."""

PartySpec: TypeAlias = dict[str, Any]


def base_digests(frozen: Mapping[str, Tensor | str]) -> dict[str, str]:
    """Return a digest per frozen tensor: of its shape, its dtype and every value.

    Different for another checkpoint, revision or quantisation, and for a single row or value of them. What is
    a digest already, of a tensor in shards, stays it.
    """
    return {
        name: tensor if isinstance(tensor, str) else str(tensor_digest(tensor))
        for name, tensor in frozen.items()
    }


def schema(layout: Layout, plan: Plan) -> list[list[str]]:
    """Return the names of the parameters, and in the same order what each is, without ranks that may differ.

    The rank is the first dimension of factors A, and the second of B. What a parameter is is a text: with ten
    thousand lists in their place Python's garbage collector takes longer than all else.
    """
    ranks: dict[str, int] = {}
    if plan.rule.ranks_may_differ:
        ranks = dict.fromkeys(plan.named((Part.A,)), 0) | dict.fromkeys(plan.named((Part.B,)), 1)
    kinds = [
        f"{dtype} of shape {_without_rank(shape, ranks[name]) if name in ranks else shape}"
        for dtype, (name, shape) in zip(layout.dtypes, layout.shapes.items(), strict=True)
    ]
    return [layout.names, kinds]


def _without_rank(shape: Sequence[int], dim: int) -> list[int | str]:
    return ["rank" if at == dim else size for at, size in enumerate(shape)]


def first_difference(party_specs: Sequence[PartySpec], names: Sequence[str] | None = None) -> str | None:
    """Return what the first party that differs from the first of all should know, or None if all agree.

    Args:
        party_specs: What the parties have shown.
        names: What the parties are called; their indices if None.
    """
    names = names or [str(party) for party in range(len(party_specs))]
    found = next(differences(party_specs, names), None)
    return shared_file(party_specs, names) if found is None else found[1]


def differences(party_specs: Sequence[PartySpec], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what is differed in and what to know of it, for each party that differs from the first of all.

    Args:
        party_specs: What the parties have shown.
        names: What the parties are called.
    """
    first = party_specs[0]
    for party, other in zip(names[1:], party_specs[1:], strict=True):
        for topic, compare in _COMPARED.items():
            for message in compare(names[0], party, first, other):
                yield topic, message


def common(party_spec: PartySpec) -> PartySpec:
    """Return that part of a spec which must be the same at all parties."""
    part = {key: party_spec[key] for key in ("protocol", "schema", "config", "base", "ranks_may_differ")}
    if party_spec["ranks_may_differ"]:
        return part | {"experts": experts(party_spec), "adapters": without_ranks(party_spec["adapters"])}
    return part | {"lora": party_spec["lora"], "adapters": party_spec["adapters"]}


def experts(party_spec: PartySpec) -> dict[str, int]:
    """Return the number of experts of each LoRA pair, which must be the same even where ranks differ."""
    return {name: of_pair[2] for name, of_pair in party_spec["lora"].items()}


def _protocol(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    if first["protocol"] != other["protocol"]:
        yield (
            f"Party {party} speaks protocol version {other['protocol']}, party {base} version"
            f" {first['protocol']}. Install the same version of pellm-lightning at both."
        )


def _schema(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    ours, theirs = (dict(zip(*spec["schema"], strict=True)) for spec in (first, other))
    for name in sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (base, party) if name in ours else (party, base)
        yield (
            f"Party {has} trains parameter {name!r}, party {lacks} does not ({len(ours)} parameters at party"
            f" {base}, {len(theirs)} at party {party}). Give both the same model, the same PEFT configuration"
            " and the same include and exclude patterns."
        )
    for name in sorted(ours.keys() & theirs.keys()):
        if theirs[name] != ours[name]:
            yield (
                f"Parameter {name!r} is {ours[name]} at party {base} but {theirs[name]} at party {party}. Use"
                " the same model, PEFT configuration (rank!) and precision at both."
                f"{_of_eva(first)}"
            )


def _of_eva(party_spec: PartySpec) -> str:
    """Return what to know where ranks follow from a party's own data."""
    if all(config.get("init_lora_weights") != "eva" for config in party_spec["adapters"].values()):
        return ""
    return (
        " EVA (init_lora_weights='eva') gives each layer a rank by the party's own data: set rho=1.0 in its"
        " EvaConfig, or initialise at one party, save the adapter and load it at all."
    )


def _config(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    # Others follow from these.
    causes = ("exchange", "privacy", "drift correction", "roster")
    for key in sorted(first["config"].keys() | other["config"].keys(), key=lambda k: (k not in causes, k)):
        ours, theirs = first["config"].get(key), other["config"].get(key)
        if ours != theirs:
            yield (
                f"Party {base} has {key}={ours!r}, party {party} has {key}={theirs!r}. Give all parties the"
                f" same {key}."
            )


def _lora(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    for name in sorted(first["lora"].keys() ^ other["lora"].keys()):
        has, lacks = (base, party) if name in first["lora"] else (party, base)
        yield (
            f"The LoRA module {name!r} adds the product of its factors at party {has}, not at party {lacks}."
            " Give both the same PEFT configuration and the same version of peft."
        )
    for name in sorted(first["lora"].keys() & other["lora"].keys()):
        (_, scaling, experts), (_, theirs, other_experts) = first["lora"][name], other["lora"][name]
        if experts != other_experts:
            yield (
                f"The LoRA module {name!r} holds {experts} experts at party {base} but {other_experts} at"
                f" party {party}. Give both the same base model."
            )
        if theirs != scaling and not first["ranks_may_differ"]:
            yield (
                f"The LoRA module {name!r} has scaling {scaling:g} (lora_alpha over rank) at party {base} but"
                f" {theirs:g} at party {party}, so equal factors are different updates. Give both the same"
                " lora_alpha and use_rslora, or use the aggregation HeterogeneousRank."
            )


def _adapters(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    differences = config_differences(first["adapters"], other["adapters"], without=RANK_FIELDS)
    yield from _of_config(base, party, differences)


def _ranks(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    if not first["ranks_may_differ"]:
        differences = config_differences(first["adapters"], other["adapters"], fields_of=RANK_FIELDS)
        yield from _of_config(base, party, differences)


def _of_config(base: str, party: str, found: Iterator[tuple[str, str, Any, Any]]) -> Iterator[str]:
    for adapter, field, ours, theirs in found:
        yield (
            f"The PEFT configuration of the adapter {adapter!r} has {_said(field, ours)} at party {base} but"
            f" {_said(field, theirs)} at party {party}, so parameters of equal names do not mean the same."
            " Give both the same PEFT configuration; only paths, dropout, inference_mode and what the"
            " parameters' names show may differ."
        )


def _said(field: str, value: Any) -> str:
    return f"no {field}" if value is None else f"{field}={value!r}"


def _base(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    if first["base"] is None or other["base"] is None:
        return
    difference = base_difference(base, party, first["base"], other["base"], first["adapters"])
    if difference is not None:
        yield difference


def _round(base: str, party: str, first: PartySpec, other: PartySpec) -> Iterator[str]:
    if first["round"] != other["round"]:
        yield (
            f"Party {base} starts at round {first['round']}, party {party} at round {other['round']}. Resume"
            " all parties from checkpoints of the same round, or none."
        )
    elif first["checksum"] != other["checksum"]:
        yield (
            f"Parties {base} and {party} resume round {first['round']} with different global vectors. Their"
            " checkpoints are from different federations: resume all parties from the same run."
        )


_COMPARED: dict[str, Callable[[str, str, PartySpec, PartySpec], Iterator[str]]] = {
    "protocol": _protocol,
    "settings": _config,
    "adapter configuration": _adapters,
    "parameters": _schema,
    "adapter": _lora,
    "ranks": _ranks,
    "base model": _base,
    "resume": _round,
}
"""What is compared, in this order; how, by what is differed in."""


def shared_file(party_specs: Sequence[PartySpec], names: Sequence[str]) -> str | None:
    """Return what two parties that write to the same path should know, or None if there are none."""
    writers: dict[str, str] = {}
    for party, party_spec in zip(names, party_specs, strict=True):
        for path in sorted(set(party_spec["files"])):
            if path in writers:
                return (
                    f"Parties {writers[path]} and {party} would both write to {path!r}. Give each party its"
                    " own path, for example\n    party = os.environ['RANK']\n"
                    "    logger = MyLogger(save_dir=f'logs/party-{party}')"
                )
            writers[path] = party
    return None


def check_shapes(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a saved state of other parameters, or of the same in another order.

    Args:
        saved: Its shapes, by name.
        ours: Those of the parameters here.

    Raises:
        ValueError: If they differ.
    """
    if list(saved.items()) == list(ours.items()):
        return
    differ = sorted(name for name in {*saved, *ours} if saved.get(name) != ours.get(name))
    first = (
        f"the first that differs is {differ[0]!r}"
        if differ
        else "their order differs, as with another aggregation"
    )
    raise ValueError(
        f"The checkpoint's federated state is of {len(saved)} parameters, this module trains"
        f" {len(ours)}; {first}. Resume with the model, PEFT configuration, aggregation, include and"
        " exclude patterns of the checkpoint."
    )
