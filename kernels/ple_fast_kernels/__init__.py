"""Triton kernels of ``ple_fast`` and their launchers.

``__all__`` lists the launchers; it is empty while the package holds no kernel. The rules are in ``kernels/README.md``.
"""

__all__: list[str] = []
