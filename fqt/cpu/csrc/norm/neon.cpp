#include "isa.h"

#if defined(FQT_ARM)
#include <arm_neon.h>  // part of every AArch64
#include <atomic>
#include <type_traits>
#define FQT_NEON
namespace fqt::neon {
#include "norm.h"
}
#endif
