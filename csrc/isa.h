// Which of the objects compiled per instruction set runs.  LOWRANK_ISA=baseline|avx2|avx512 asks for one; the bits are the same.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

// The functions NAME_baseline, NAME_avx2 and NAME_avx512 of one type, declared; and the one to call.
#ifdef __x86_64__
#define LOWRANK_DECLARE_ISAS(TYPE, NAME) TYPE NAME##_baseline, NAME##_avx2, NAME##_avx512
#define LOWRANK_BEST_ISA(NAME) ::lowrank::best_isa(NAME##_baseline, NAME##_avx2, NAME##_avx512)
#else
#define LOWRANK_DECLARE_ISAS(TYPE, NAME) TYPE NAME##_baseline
#define LOWRANK_BEST_ISA(NAME) ::lowrank::best_isa(NAME##_baseline, nullptr, nullptr)
#endif

namespace lowrank {

template <class Function>
Function* best_isa(Function* baseline, [[maybe_unused]] Function* avx2, [[maybe_unused]] Function* avx512) {
  const char* asked = std::getenv("LOWRANK_ISA");
  const std::string isa = asked ? asked : "";
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (isa.empty() || isa == "avx512")) return avx512;
  if (has_avx2 && (isa.empty() || isa == "avx2")) return avx2;
#endif
  STD_TORCH_CHECK(isa.empty() || isa == "baseline", "LOWRANK_ISA='", isa, "': this CPU or this build does not have it");
  return baseline;
}

}  // namespace lowrank
