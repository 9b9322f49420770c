// Which instruction set serves, for every family of kernels.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FQT_X86
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define FQT_ARM
#endif

namespace fqt {

// 0 portable, 1 AVX2 or NEON, 2 AVX-512: what the machine has, at most what ATEN_CPU_CAPABILITY names (as for torch's own
// kernels), at most what a test allows.
int isa();

}  // namespace fqt

// FQT_KERNEL(name): that kernel of the instruction set that serves.
#if defined(FQT_X86)
#define FQT_KERNEL(name) (isa() == 2 ? avx512::name : isa() == 1 ? avx2::name : portable::name)
#elif defined(FQT_ARM)
#define FQT_KERNEL(name) (isa() == 1 ? neon::name : portable::name)
#else
#define FQT_KERNEL(name) (portable::name)
#endif
