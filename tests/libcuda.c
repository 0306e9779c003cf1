// A CUDA driver that launches nothing and remembers what it was asked to: libcuda.so.1 for Triton and for csrc/plan_cuda.cpp,
// and libtorch_cuda.so with torch's current stream.  STUBS: the other functions that Triton's launcher links, which all succeed.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static char seen[1 << 16];  // of one launch, as text
static int sizes[1 << 10], count, broken;

void break_(void) { broken = 1; }

void expect(int parameters, const int* bytes) {
  count = parameters;
  memcpy(sizes, bytes, parameters * sizeof(int));
  seen[0] = 0;
}

const char* recorded(void) { return seen; }

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  char* at = seen + sprintf(seen, "function %p grid %u %u %u block %u %u %u shared %u stream %p%s parameters", function, gx, gy,
                            gz, bx, by, bz, shared, stream, extra ? " extra" : "");
  for (int i = 0; i < count; ++i) {
    *at++ = ' ';
    for (int j = 0; j < sizes[i]; ++j) at += sprintf(at, "%02x", ((unsigned char*)parameters[i])[j]);
  }
  return broken;
}

struct Config {  // CUlaunchConfig
  unsigned gx, gy, gz, bx, by, bz, shared;
  void *stream, *attributes;
  unsigned attribute_count;
};

int cuLaunchKernelEx(const struct Config* c, void* function, void** parameters, void** extra) {
  int error = cuLaunchKernel(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
  if (c->attribute_count) strcat(seen, " attributes");
  return error;
}

int cuPointerGetAttribute(void* out, int attribute, uint64_t pointer) {
  *(uint64_t*)out = pointer;
  return 0;
}

int cuModuleGetFunction(void** function) {
  static uintptr_t last = 0x7a00;
  *function = (void*)++last;
  return 0;
}

int cuFuncGetAttribute(int* value) {
  *value = 1024;
  return 0;
}

int cuDeviceGetAttribute(int* value) {
  *value = 227 << 10;
  return 0;
}

int aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = (void*)(uintptr_t)(0x5000 + device);
  return 0;
}

#define STUB(name) \
  int name() { return 0; }
STUBS
