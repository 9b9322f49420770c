"""1-bit products on the tensor cores of NVIDIA GPUs, in CUDA C++ compiled at run time. docs/gpu.md maps the kernels."""
