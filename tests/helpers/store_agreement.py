"""The same steps on a store of ours and on one of torch's, compared."""

from typing import Any

import torch.distributed as dist
from hypothesis import strategies as st

from pellm_lightning.comm.rendezvous.polling_store import PollingStore

KEYS = ["@clinic-a/a", "@clinic-a/b", "@clinic-a/c"]
key = st.sampled_from(KEYS)
word = st.sampled_from(["", "x", "y", "1"])
number = st.integers(-5, 5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), key, word),
        st.tuples(st.just("compare_set"), key, word, word),
        st.tuples(st.just("add"), st.just("@clinic-a/n"), number),
        st.tuples(st.just("check"), st.lists(key, max_size=3)),
        st.tuples(st.just("delete_key"), key),
        st.tuples(st.just("num_keys")),
        st.tuples(st.just("get_if_there"), key),
    ),
    max_size=30,
)


def result(store: dist.Store, step: tuple[Any, ...]) -> Any:
    name, *arguments = step
    if name == "get_if_there":
        return store.get(arguments[0]) if store.check(arguments) else None
    return getattr(store, name)(*arguments)


def agree(ours: PollingStore, theirs: dist.Store, steps: list[tuple[Any, ...]], extra_keys: int = 0) -> None:
    """Take the same steps on both and compare; of nothing torch returns what was expected, we nothing."""
    wrapped = dist.PrefixStore("p", ours)  # the way through C++
    for store in (ours, theirs):
        for clear in [*KEYS, "@clinic-a/n", *(f"p/{key}" for key in KEYS)]:
            store.delete_key(clear)
    before = theirs.num_keys() - extra_keys - ours.num_keys()
    for at, step in enumerate(steps):
        missing = step[0] == "compare_set" and not ours.check([step[1]])
        found, expected = result(ours, step), result(theirs, step)
        if missing and step[2]:
            assert (found, expected) == (b"", step[2].encode())
        elif step[0] == "num_keys":
            assert expected - found == before + extra_keys, (at, step)
        else:
            assert found == expected, (at, step)
        if step[0] in ("set", "compare_set"):
            assert result(wrapped, step) is None or step[0] == "compare_set"
            wrapped.delete_key(step[1])
