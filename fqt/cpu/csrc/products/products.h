// The kernels of the products, included once for each instruction set, inside a namespace of its own.

#include "vector.h"
#include "bits.h"
#include "output.h"
#include "lookup.h"
#include "grad_input.h"
#include "grad_weight_of_rows.h"
#include "grad_weight.h"
#include "integers.h"
#include "integer_tiles.h"
#include "few_rows.h"
#include "integer_gather.h"
#include "integer_grad_weight.h"
