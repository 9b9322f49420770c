#include "isa.h"  // before the pragma: what it includes must run on every machine

#if defined(FQT_X86)
#include <immintrin.h>
#pragma GCC target("avx2")
#define FQT_AVX2
namespace fqt::avx2 {
#include "quantize.h"
}
#endif
