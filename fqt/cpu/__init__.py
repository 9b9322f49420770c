"""The CPU backend: the C++ kernels of fqt/cpu/csrc behind the signatures of the reference."""
