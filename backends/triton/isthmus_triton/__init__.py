"""Triton kernels, and the backend parts made of them, for every device that Triton compiles for.

A library, not a backend: it opens no device and registers nothing.  ``kernels`` holds the kernels
and the functions that launch them, each of which has a plain-torch counterpart in
``isthmus.reference``; the modules beside it are parts of the contract.  Launch parameters come from
:mod:`isthmus_triton.launch`, by the name of the architecture.
"""
