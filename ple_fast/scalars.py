"""Numbers, flags and sequences that users pass: the checks are the encoder's, which needs no torch."""

from ple_fast_encoder.scalars import (
    LONGEST,
    as_tuple,
    check_count,
    check_counts,
    check_flag,
    check_number,
    check_seed,
    is_sequence,
    own_scalar,
    shown,
)

__all__ = [
    "LONGEST",
    "as_tuple",
    "check_count",
    "check_counts",
    "check_flag",
    "check_number",
    "check_seed",
    "is_sequence",
    "own_scalar",
    "shown",
]
