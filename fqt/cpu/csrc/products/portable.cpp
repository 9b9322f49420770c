#include "isa.h"

namespace fqt::portable {
#include "products.h"
}
