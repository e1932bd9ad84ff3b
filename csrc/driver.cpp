#include "driver.hpp"

#include <dlfcn.h>

namespace computron::cuda {
namespace {

// By the driver's ABI; 0 asks for the functions that use the legacy default stream where no other is named.
using GetProcAddress = Result (*)(const char* symbol, void** function, int version, uint64_t flags, int* status);

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string Driver::words(Result result) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || cuGetErrorString(result, &text) != kSuccess) {
    return "unknown CUDA error " + std::to_string(result);
  }
  return std::string(name) + ": " + text;
}

Driver load_driver(const std::string& library) {
  // Never closed: the driver keeps threads and exit handlers of its own.
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw TransferError(std::string("there is no CUDA driver: ") + dlerror());
  const auto get_version = reinterpret_cast<Result (*)(int*)>(dlsym(handle, "cuDriverGetVersion"));
  int version = 0;
  if (!get_version || get_version(&version) != kSuccess) {
    throw TransferError("there is no CUDA driver: " + library + " does not tell its version");
  }
  const auto resolve = reinterpret_cast<GetProcAddress>(dlsym(handle, "cuGetProcAddress_v2"));
  if (version < kNeededVersion || !resolve) {
    throw TransferError("the CUDA driver is too old: it supports CUDA " + version_text(version) + ", and " +
                        version_text(kNeededVersion) + " is needed; install a newer driver");
  }

  Driver driver;
  const auto find = [&](const char* name) {
    void* function = nullptr;
    int status = 0;
    if (resolve(name, &function, kNeededVersion, 0, &status) != kSuccess || !function) {
      throw TransferError(std::string("the CUDA driver has no ") + name);
    }
    return function;
  };
#define COMPUTRON_RESOLVE(name, parameters) driver.name = reinterpret_cast<decltype(driver.name)>(find(#name));
  COMPUTRON_DRIVER_FUNCTIONS(COMPUTRON_RESOLVE)
#undef COMPUTRON_RESOLVE
  driver.standin_inject = reinterpret_cast<StandinInject>(dlsym(handle, kStandinInject));

  Result result = driver.cuInit(0);
  int count = 0;
  if (result == kSuccess) result = driver.cuDeviceGetCount(&count);
  if (result == kErrorNoDevice || (result == kSuccess && count == 0)) {
    throw TransferError("the CUDA driver (" + version_text(version) + ") finds no device");
  }
  if (result != kSuccess) throw TransferError("the CUDA driver does not start: " + driver.words(result));
  return driver;
}

}  // namespace computron::cuda
