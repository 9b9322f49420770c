#include "isa.h"

namespace fqt::portable {
#include "vector.h"
#include "bits.h"
#include "output.h"
#include "gradients.h"
#include "integers.h"
}
