#include "isa.h"

#if defined(FQT_X86)
#include <emmintrin.h>  // part of every x86-64
#endif
namespace fqt::portable {
#include "quantize.h"
}
