// The instruction sets, and which of them serves.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FQT_X86
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define FQT_ARM
#endif

// The one list: M(namespace, whether this machine runs it, further arguments) for every instruction set that is compiled here,
// the slowest first. A family of kernels has a file <namespace>.cpp for each.
#if defined(FQT_X86)
#define FQT_FOR_EACH_ISA(M, ...)                                                                                            \
  M(portable, true __VA_OPT__(, ) __VA_ARGS__)                                                                              \
  M(avx2, __builtin_cpu_supports("avx2") __VA_OPT__(, ) __VA_ARGS__)                                                        \
  M(avx512,                                                                                                                 \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&        \
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq") &&                                  \
        __builtin_cpu_supports("avx512vnni") __VA_OPT__(, ) __VA_ARGS__)
#elif defined(FQT_ARM)
#define FQT_FOR_EACH_ISA(M, ...)               \
  M(portable, true __VA_OPT__(, ) __VA_ARGS__) \
  M(neon, true __VA_OPT__(, ) __VA_ARGS__)
#else
#define FQT_FOR_EACH_ISA(M, ...) M(portable, true __VA_OPT__(, ) __VA_ARGS__)
#endif

namespace fqt {

// The number in the list of the set that serves: the last that the machine runs, at most the one that ATEN_CPU_CAPABILITY names
// (as for torch's own kernels), at most what a test allows.
int isa();

}  // namespace fqt

// FQT_DECLARE(functions): these declarations in the namespace of every set.
#define FQT_IN_NAMESPACE(set, runs, ...) \
  namespace set {                        \
  __VA_ARGS__                            \
  }
#define FQT_DECLARE(...) FQT_FOR_EACH_ISA(FQT_IN_NAMESPACE, __VA_ARGS__)

// FQT_KERNEL(name): that function of the set that serves.
#define FQT_POINTER(set, runs, name) set::name,
#define FQT_KERNEL(name)                                                                                     \
  ([] {                                                                                                      \
    static constexpr decltype(&portable::name) of_set[] = {FQT_FOR_EACH_ISA(FQT_POINTER, name)};             \
    return of_set[isa()];                                                                                    \
  }())
