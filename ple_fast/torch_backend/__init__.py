"""The arithmetic in PyTorch: one file per operator.

``level.py`` runs a whole extraction network forward and backward by hand, in row blocks that stay in cache.
``differentiable.py`` writes the same level in differentiable PyTorch operators: for derivatives of derivatives, for
compilation and for transforms.
"""
