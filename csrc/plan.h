// A launch of a compiled Triton kernel, every decision of which Python has made (kernels/_launch.py): nothing is checked or
// chosen here.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace lowrank {

struct Plan {
  enum Kind : int64_t { int32, int64, float32, pointer };  // of a parameter; lowrank/_host.py has the same
  struct Slot {
    uint32_t offset;  // in ``bytes``
    uint32_t index;   // of the float or pointer that a call brings
  };

  void* function;  // CUfunction
  unsigned grid[3], threads, shared;
  int32_t device;
  std::vector<uint64_t> bytes;    // of the parameters, each in as many as it has at a multiple of 8
  std::vector<Slot> floats, pointers;

  // Integers' values are constants of the plan, the others' are indices.
  void add(int64_t kind, int64_t value) {
    const Slot slot{static_cast<uint32_t>(bytes.size()), static_cast<uint32_t>(value)};
    bytes.push_back(kind == int32 || kind == int64 ? static_cast<uint64_t>(value) : 0);
    if (kind == float32) floats.push_back(slot);
    if (kind == pointer) pointers.push_back(slot);
  }
};

}  // namespace lowrank
