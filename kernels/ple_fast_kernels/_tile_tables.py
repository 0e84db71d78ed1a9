"""The tables that ship: tiles per architecture, and from which amount of work on others than the pointers' kernels
take a product."""

from __future__ import annotations

from ._tile_files import LIBRARY, PARTS, PERSISTENT, Class, Library, Table, Tile

PRODUCTS = ("linear", "data_grad", "input_grad", "weight_grad", "fused", "two_layers")
"""Kernels with matrix products. Their rows of a table are named ``KERNEL/OPERANDS``, or ``OPERANDS`` for every kernel
that has no row of its own."""
OPERANDS = ("half", "tf32", "ieee", "double")
"""half: bfloat16 and float16; tf32 and ieee: float32."""
MIXTURES = ("combine", "combine_grad")
"""Kernels that mix: rows times columns of their tile is the number of elements, and columns is the widest it gets."""

_FUSED_HALF = (Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3), Tile(64, 32, 64, 8, 3))
_FUSED_FLOAT = (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 8, 3))
_FUSED_IEEE = (Tile(64, 64, 16, 8, 3), Tile(64, 32, 16, 8, 3))


_Tiles = dict[str, tuple[Class, ...]]


def _preferred(*tiles: Tile) -> tuple[Class, ...]:
    """Of a fused kernel: the first that fits into registers is taken, whatever the amount of work."""
    return tuple(Class(0, tile) for tile in tiles)


_SM90: _Tiles = {
    "half": (
        Class(0, Tile(64, 64, 64, 4, 4)),
        Class(64, Tile(64, 128, 64, 4, 4)),
        Class(192, Tile(128, 128, 64, 8, 4)),
        Class(512, Tile(128, 256, 64, 8, 3)),
    ),
    "tf32": (Class(0, Tile(64, 64, 32, 4, 4)), Class(192, Tile(128, 128, 32, 8, 3))),
    "ieee": (Class(0, Tile(64, 64, 32, 8, 3)),),
    "linear/ieee": (Class(0, Tile(64, 64, 16, 4, 3)),),
    "input_grad/ieee": (Class(0, Tile(64, 64, 16, 8, 3)),),
    "double": (Class(0, Tile(32, 32, 16, 4, 2)),),
    "weight_grad/half": (
        Class(0, Tile(64, 64, 64, 4, 4)),
        Class(8, Tile(128, 128, 64, 8, 4)),
        Class(48, Tile(128, 256, 64, 8, 3)),
    ),
    "weight_grad/tf32": (Class(0, Tile(64, 64, 32, 4, 3)), Class(32, Tile(128, 128, 32, 8, 3))),
    "weight_grad/ieee": (Class(0, Tile(64, 64, 32, 8, 3)),),
    "weight_grad/double": (Class(0, Tile(32, 32, 16, 4, 3)),),
    "fused/half": _preferred(*_FUSED_HALF),
    "fused/tf32": _preferred(*_FUSED_FLOAT),
    "fused/ieee": _preferred(*_FUSED_IEEE),
    "two_layers/half": _preferred(*_FUSED_HALF[:2]),
    "two_layers/tf32": _preferred(_FUSED_FLOAT[0]),
    "two_layers/ieee": _preferred(_FUSED_IEEE[0]._replace(warps=16)),
    "combine": _preferred(Tile(8, 128, 0, 8, 2)),
    "combine_grad": _preferred(Tile(8, 256, 0, 8, 2)),
}
_SM100_HALF = (Class(0, Tile(64, 64, 64, 8, 4)), *_SM90["half"][1:])
_SM100: _Tiles = {
    **_SM90,
    "half": _SM100_HALF,
    "weight_grad/half": (Class(0, Tile(64, 64, 64, 8, 4)), Class(32, Tile(128, 128, 64, 8, 4))),
    "data_grad/half": _SM100_HALF[:-1],
    "data_grad/tf32": (Class(0, Tile(64, 64, 32, 8, 3)), Class(192, Tile(128, 128, 32, 8, 3))),
}
_SM80: _Tiles = {
    **_SM90,
    "half": (
        Class(0, Tile(64, 64, 64, 4, 3)),
        Class(64, Tile(64, 128, 64, 4, 3)),
        Class(192, Tile(128, 128, 64, 8, 3)),
    ),
    "tf32": (Class(0, Tile(64, 64, 32, 4, 3)), Class(192, Tile(128, 128, 32, 8, 3))),
    "ieee": (Class(0, Tile(64, 64, 16, 4, 3)),),
    "input_grad/ieee": (Class(0, Tile(64, 64, 16, 4, 3)),),
    "weight_grad/half": (Class(0, Tile(64, 64, 32, 4, 3)), Class(32, Tile(128, 128, 64, 8, 3))),
    "fused/half": _preferred(*_FUSED_HALF[1:]),
    "two_layers/half": _preferred(_FUSED_HALF[1]),
}
_AMD: _Tiles = {  # 64 KiB of shared memory: two stages; a warp is twice as wide
    **{name: tuple(Class(c.tiles, c.tile._replace(stages=2)) for c in classes) for name, classes in _SM80.items()},
    "combine": _preferred(Tile(16, 128, 0, 4, 2)),
    "combine_grad": _preferred(Tile(8, 256, 0, 4, 2)),
}
_INTERPRETER: _Tiles = {  # costs a few milliseconds per step, whatever the tile
    **{operands: (Class(0, Tile(32, 32, 32, 4, 2)),) for operands in OPERANDS},
    "combine": _preferred(Tile(32, 128, 0, 4, 2)),
    "combine_grad": _preferred(Tile(32, 256, 0, 4, 2)),
}

_LIBRARY: Table = {
    "library/half": Library(linear=30, input_grad=30, weight_grad=30),
    "library/tf32": Library(linear=4, input_grad=4, weight_grad=4),
}
"""As ``benchmarks/kernel_model.py`` predicts them for sm_90 (no GPU has measured it); on sm_100 the library is further
ahead of what waits for L2. Architectures without a model keep the kernels."""

_PERSISTENT: Table = {
    "persistent_linear/half": (Class(512, Tile(128, 256, 64, 8, 3)),),
    "persistent_data_grad/half": (Class(512, Tile(128, 256, 64, 8, 3)),),
}
"""As the model predicts for sm_90: a program hides the first loads of its next tile."""
_PERSISTENT_SM100 = {"persistent_linear/half": _PERSISTENT["persistent_linear/half"]}
"""Without the data gradient: there it takes all 255 registers."""

TABLES: dict[str, Table] = {
    "sm_80": {**_SM80},
    "sm_90": {**_SM90, **_LIBRARY, **_PERSISTENT},
    "sm_100": {**_SM100, **_LIBRARY, **_PERSISTENT_SM100},
    "amd": {**_AMD},
    "interpreter": {**_INTERPRETER},
}
"""Per architecture. sm_80 serves every NVIDIA GPU that is not sm_9x, sm_10x or sm_11x: also those of workstations,
which have 99 KiB of shared memory."""

KINDS = frozenset(
    {
        *OPERANDS,
        *MIXTURES,
        PARTS,
        *(f"{kernel}/{operands}" for kernel in PRODUCTS for operands in OPERANDS),
        *(LIBRARY + operands for operands in OPERANDS[:2]),
        *(f"{PERSISTENT}{kernel}/half" for kernel in PRODUCTS[:2]),
    }
)
"""Names that a row of a table may have."""
