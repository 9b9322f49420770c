#include "isa.h"

namespace fqt::portable {
#include "quantize.h"
}
