"""The routing step on a GPU: jitted functions in :mod:`.fused` and :mod:`.pointwise`, sizes in :mod:`.tables`.

Import :mod:`.launch` only where Triton is installed and a kernel is to run: ``@triton.jit`` settles at import whether
the interpreter (``TRITON_INTERPRET=1``) runs it.
"""
