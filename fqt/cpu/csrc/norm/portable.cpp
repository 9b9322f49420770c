#include "isa.h"

#include <atomic>
#include <type_traits>

namespace fqt::portable {
#include "norm.h"
}
