#include "isa.h"  // before the pragma: what it includes must run on every machine

#if defined(FQT_X86)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: its own _mm512_undefined_epi32
#include <immintrin.h>
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define FQT_AVX512
namespace fqt::avx512 {
#include "quantize.h"
}
#endif
