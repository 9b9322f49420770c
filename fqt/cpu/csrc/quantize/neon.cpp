#include "isa.h"

#if defined(FQT_ARM)
#include <arm_neon.h>  // part of every AArch64
#define FQT_NEON
namespace fqt::neon {
#include "quantize.h"
}
#endif
