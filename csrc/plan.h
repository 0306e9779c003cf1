// A launch of a compiled Triton kernel, every decision of which Python has made (kernels/_launch.py): nothing is checked or
// chosen here.
#pragma once

#include <cstdint>
#include <vector>

namespace lowrank {

struct Plan {
  enum Kind : int64_t { int32, int64, float32, pointer };  // of a parameter; lowrank/_host.py has the same
  struct Slot {
    uint32_t at;      // in ``parameters``
    uint32_t index;   // of the float or pointer that a call brings
  };

  void* function;  // CUfunction
  unsigned grid[3], threads, shared;
  int32_t device;
  std::vector<uint64_t> parameters;  // each in the first of 8 bytes
  std::vector<Slot> floats, pointers;

  // An integer's value is a constant of the plan, the others' are indices; below 0 it is null.
  void add(int64_t kind, int64_t value) {
    const Slot slot{static_cast<uint32_t>(parameters.size()), static_cast<uint32_t>(value)};
    parameters.push_back(kind == int32 || kind == int64 ? static_cast<uint64_t>(value) : 0);
    if (value >= 0 && kind == float32) floats.push_back(slot);
    if (value >= 0 && kind == pointer) pointers.push_back(slot);
  }
};

// On torch's current stream of the plan's device, which is to be the current device.
void launch(const Plan& plan, void* const* pointers, const double* floats);

}  // namespace lowrank
