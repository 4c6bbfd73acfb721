"""What it means that two parties' frozen tensors differ, and which cure works."""

from collections.abc import Mapping, Sequence

from pellm_lightning.tensors.adapter_config import AdapterConfigs, init_that_writes_base
from pellm_lightning.tensors.digest import TensorDigest, differing_rows

_MOST_RANGES = 3
_PREPARED = (
    "build the model once, save it (the page on parties shows how, with an adapter that has changed it, too)"
    " and load the saved one at every party"
)
_SEED = "call seed_everything with one seed at every party before the model is built"


def base_difference(
    base: str,
    party: str,
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    adapters: AdapterConfigs,
) -> str | None:
    """Return in which frozen tensors a party differs from another, why that may be, and what to do.

    Args:
        base: Name of one party.
        party: Name of the other.
        ours: Digests of the first one's tensors, by name.
        theirs: Those of the other's.
        adapters: Configurations of the adapters, which are those of both.

    Returns:
        None if nothing differs.
    """
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if not names:
        return None
    what = (
        f"The frozen base model of party {party} is not that of party {base}: the first tensor that differs"
        f" is {names[0]!r}"
    )
    rows = _rows(ours.get(names[0], ""), theirs.get(names[0], ""))
    if rows:
        what += f", in {rows}"
    if len(names) > 1:
        what += f" ({len(names)} of {len(ours.keys() | theirs.keys())} differ)"
    one, other = ours.get(names[0]), theirs.get(names[0])
    if one is None or other is None:
        has, lacks = (base, party) if other is None else (party, base)
        return f"{what}, which party {has} has and party {lacks} has not. {_CHECKPOINT}"
    first, second = TensorDigest.parse(one), TensorDigest.parse(other)
    if first.kind != second.kind:
        return f"{what}, {first.kind} at party {base} but {second.kind} at party {party}. {_CHECKPOINT}"
    values = {
        name: (TensorDigest.parse(ours[name]), TensorDigest.parse(theirs[name]))
        for name in names
        if name in ours and name in theirs
    }
    same_kind = len(values) == len(names) and all(one.kind == other.kind for one, other in values.values())
    cause = _cause(values, len(ours), adapters) if same_kind else None
    return f"{what}. {cause or _CHECKPOINT}"


_CHECKPOINT = (
    "Load the same checkpoint and revision in the same dtype, or pass Parameters(check_frozen=False) if the"
    " difference is intended (for example a quantised base at one party)."
)


def _cause(
    differing: Mapping[str, tuple[TensorDigest, TensorDigest]],
    of: int,
    adapters: AdapterConfigs,
) -> str | None:
    """Return why values differ, and the cure; None if another checkpoint is likely."""
    inits = [found for config in adapters.values() if (found := init_that_writes_base(config)) is not None]
    adapted = [name for name in differing if "base_layer" in name.split(".")]
    if inits and len(adapted) == len(differing):
        return _written_by_init(*inits[0])
    parts = {part for name in differing for part in name.split(".")}
    if parts & adapters.keys() and all(set(name.split(".")) & adapters.keys() for name in differing):
        return (
            "These belong to the adapter and are not trained, and each party drew its own when it built it."
            f" Let all have the same: {_SEED}, or {_PREPARED}. check_frozen=False leaves them uncompared."
        )
    if all(".quant_state." in name or name.endswith(".SCB") for name in differing):
        return (
            "They are what the quantised weights are read by. Quantise the same checkpoint with the same"
            " settings and the same version of the library, or quantise it once, save it and load that at"
            " every party; check_frozen=False leaves the base uncompared."
        )
    rows = _added_rows(differing)
    if rows:
        return (
            f"Only {rows} differ, as when tokens were added and their rows drawn at random at each party. Let"
            f" all have the same rows: {_SEED} (before resize_token_embeddings), or train them"
            " (modules_to_save, trainable_token_indices), so that the parties begin with those of the first,"
            f" or {_PREPARED}. check_frozen=False leaves the base uncompared."
        )
    if len(differing) < of and not any(_in_a_stack(name) for name in differing):
        return (
            "The other layers are the same, so these are probably new ones, which from_pretrained draws at"
            f" random if the checkpoint lacks them (a head, a pooler). Let all have the same: {_SEED},"
            " or train them (modules_to_save), so that the parties begin with those of the first, or"
            f" {_PREPARED}. If they come from a checkpoint, load the same one; check_frozen=False leaves the"
            " base uncompared."
        )
    return None


def _written_by_init(init: str, why: str) -> str:
    seed = f"{_SEED}, " if "random" in why else ""
    return (
        f"The adapter's initialisation ({init}) writes into the frozen weights of the layers that it adapts,"
        f" and {why}. Let all parties have the same: {seed}take an initialisation that leaves the base alone"
        f" (init_lora_weights=True), or {_PREPARED}. check_frozen=False leaves the base uncompared."
    )


def _added_rows(differing: Mapping[str, tuple[TensorDigest, TensorDigest]]) -> str | None:
    """Return which rows differ, if these are the last ones of tall matrices, such as embeddings."""
    found = []
    for name, (ours, theirs) in differing.items():
        ranges = differing_rows(ours.shape, ours.blocks, theirs.blocks)
        if len(ranges) != 1 or ranges[0].stop != ours.shape[0] or not ranges[0].start:
            return None
        found.append(f"{_named([ranges[0]])} of {name!r}")
    more = f" and {len(found) - _MOST_RANGES} more" if len(found) > _MOST_RANGES else ""
    return ", ".join(found[:_MOST_RANGES]) + more


def _rows(one: str, other: str) -> str:
    """Return in which rows a tall matrix differs; nothing if in all, or if it is none."""
    ours, theirs = TensorDigest.parse(one), TensorDigest.parse(other)
    ranges = differing_rows(ours.shape, ours.blocks, theirs.blocks) if ours.kind == theirs.kind else []
    whole = ranges == [range(ours.shape[0])] if ranges else True
    return "" if whole or len(ranges) > _MOST_RANGES else _named(ranges)


def _named(ranges: Sequence[range]) -> str:
    """Name rows, of which the first may be equal yet: blocks are compared."""
    several = [f"{rows.start} to {rows.stop - 1}" if len(rows) > 1 else str(rows.start) for rows in ranges]
    return ("row " if len(ranges) == 1 and len(ranges[0]) == 1 else "rows ") + ", ".join(several)


def _in_a_stack(name: str) -> bool:
    """Tell whether a tensor is of one of several like layers, which are numbered."""
    return any(part.isdigit() for part in name.split("."))
