// Quantizing and decoding on a CPU, included once for each instruction set, inside a namespace of its own: the loops of
// fqt/reference/codes.py and fqt/reference/packing.py. The operators decide how a tensor is cut (`Plan`), and call them for
// some rows of an image at a time.
//
// No fused multiply-add may be formed (-ffp-contract=off): every float must round as the reference's.

#include "vector.h"
#include "rows.h"
#include "range.h"
#include "calibrate.h"
#include "codes.h"
#include "along.h"
#include "across.h"
#include "decode.h"

bool encode(const Plan& p, const Encoding& e, const Rows& at, const Slots& slots, bool look_for_nan) {
  return (p.along ? encode_along : encode_across)(p, e, at, slots, look_for_nan);
}
