// SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): number i of the sequence that
// starts at seed is splitmix64(seed + (i + 1) GOLDEN_GAMMA).
#pragma once

#include "dtype.h"

namespace lowrank {
namespace {

constexpr uint64_t GOLDEN_GAMMA = 0x9E3779B97F4A7C15;

LOWRANK_HD uint64_t splitmix64(uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

}  // namespace
}  // namespace lowrank
