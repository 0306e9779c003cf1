// Dropout of matrices on a CPU: masks drawn as lowrank/ops/dropout.py draws them, to the bit, and applied as they are drawn; or
// applied from their packed bits.  What is dropped is 0, even where it was inf or NaN; nothing is scaled.
#pragma once

#include "dtype.h"

namespace lowrank {

struct Dropout {
  const void* in;  // [rows, columns], or nullptr: the mask alone
  int64_t in_stride;
  void* out;  // [rows, columns]; may be in
  int64_t out_stride;
  Dtype from, to;
  bool add;  // to what is in out
  uint32_t* keep;  // [rows, ceil(columns / 32)], its first word
  int64_t keep_stride;
  int64_t columns;
};

// Rows [first, last): bits of row m, of which `words` hold a row, from SplitMix64 of the row's place in the whole mask.
struct Draw {
  uint64_t seed;
  int32_t cut;  // of 65536; below it an element is dropped
  int64_t first_row, words;
};

using DropoutDraw = void(const Dropout&, const Draw&, int64_t, int64_t);
using DropoutApply = void(const Dropout&, int64_t, int64_t);

}  // namespace lowrank
