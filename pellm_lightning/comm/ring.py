"""Order of the additions of an all-reduce: that of Gloo's ring, which sums in shared memory keep to the bit.

The tensor has one chunk per party. Chunk c starts at party c - 1, goes to c - 2 and so on, and ends at c.
"""

# Of gloo/allreduce.h: a chunk is cut into segments of at most so many bytes, two per party at least.
_MAX_SEGMENT_BYTES = 1 << 20


def chunk_size(numel: int, item_bytes: int, parties: int) -> int:
    """Return the scalars of each chunk; the last ones may be shorter, or empty.

    Example:
        >>> chunk_size(1000, item_bytes=4, parties=3)
        334
    """
    largest = item_bytes * max(1, _MAX_SEGMENT_BYTES // item_bytes)
    least = max(_divided_up(numel * item_bytes, largest), 2 * parties)
    per_party = _divided_up(least, parties)
    segment = _divided_up(numel * item_bytes, per_party * parties)
    return per_party * _divided_up(segment, item_bytes)


def chunk_of(party: int, numel: int, item_bytes: int, parties: int) -> slice:
    """Return the range of the chunk that ends at a party.

    Example:
        >>> chunk_of(2, 1000, item_bytes=4, parties=3)
        slice(668, 1000, None)
    """
    size = chunk_size(numel, item_bytes, parties)
    return slice(min(party * size, numel), min((party + 1) * size, numel))


def order(party: int, parties: int) -> list[int]:
    """Return the parties in the order in which the chunk that ends at a party is summed.

    Example:
        >>> order(1, parties=4)
        [0, 3, 2, 1]
    """
    return [(party - 1 - step) % parties for step in range(parties)]


def _divided_up(number: int, by: int) -> int:
    return -(-number // by)
