#include "isa.h"  // before the pragma: what it includes must run on every machine

#if defined(FQT_X86)
#include <atomic>
#include <immintrin.h>
#include <type_traits>
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define FQT_AVX512
namespace fqt::avx512 {
#include "norm.h"
}
#endif
