"""The Triton backend: one file a kernel family, kernel and launcher. Triton is loaded by those files alone, when first used.

`plan` says what is served and how it is launched, in plain Python; docs/gpu.md is the map.
"""
