/* A libcuda whose launches do nothing: Triton's real launcher then runs on a machine without a GPU, and the launches of
   the host code can be counted. */
#include <stddef.h>
#include <stdint.h>

typedef unsigned long long pointer;

static unsigned long long launched = 0;

/* Of the last launch: the first 8 bytes of so many parameters. */
static pointer words[32];
static int watched = 0;
void stub_watch(int count) { watched = count; }
pointer stub_word(int i) { return words[i]; }

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launched++;
  for (int i = 0; i < watched; i++) words[i] = *(pointer *)parameters[i];
  return 0;
}
unsigned long long stub_launches(void) { return launched; }

int cuPointerGetAttribute(void *out, int attribute, pointer p) { *(pointer *)out = p; return 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, void **out, pointer p) {
  for (unsigned i = 0; i < n; i++) *(pointer *)out[i] = p;
  return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "stub"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : attribute == 16 ? 132 : attribute == 1 ? 1024 : 0;
  return 0;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
/* A descriptor that begins with the address it is of; the innermost axis of a tensor and of a box comes first. */
static pointer sizes[2][5];
pointer stub_size(int i) { return sizes[0][i]; }
pointer stub_step(int i) { return sizes[1][i]; }
int cuTensorMapEncodeTiled(void *map, int kind, uint32_t rank, void *address, const uint64_t *shape, const uint64_t *steps) {
  *(pointer *)map = (pointer)address;
  for (uint32_t i = 0; i < rank; i++) sizes[0][i] = shape[i];
  for (uint32_t i = 0; i + 1 < rank; i++) sizes[1][i] = steps[i];
  return 0;
}
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
