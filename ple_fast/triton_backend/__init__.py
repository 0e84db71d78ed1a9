"""The arithmetic in Triton kernels: ``level.py`` runs a whole extraction network, forward and backward.

The kernels are ``ple_fast_kernels``, norms and dropout among them. A layer whose activation has learned parameters runs
what follows its product in the operators of ``torch_backend``. Imported at the first call that needs it: triton is
optional.
"""
