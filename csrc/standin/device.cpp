// Start-up, devices, contexts, errors, injected failures, and how the functions are found.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "standin.hpp"

namespace standin {

thread_local std::vector<Context> contexts;

long setting(const char* name, long fallback) {
  const char* const text = std::getenv(name);
  return text ? std::atol(text) : fallback;
}

StandinDevice& StandinDevice::instance() {
  static StandinDevice* const device = new StandinDevice;  // never destroyed: streams may outlive static destructors
  return *device;
}

Counters& Counters::instance() {
  static Counters* const counters = new Counters;
  return *counters;
}

Result StandinDevice::status() const {
  std::lock_guard lock(mutex_);
  return status_;
}

Result StandinDevice::ready() const {
  if (contexts.empty() || !contexts.back()) return kInvalidContext;
  return status();
}

void StandinDevice::poison(const std::string& words) {
  std::lock_guard lock(mutex_);
  status_ = kLaunchFailed;
  words_ = words;
}

const char* StandinDevice::injected_words() const {
  std::lock_guard lock(mutex_);
  return words_.c_str();
}

Result StandinDevice::strike(const char* operation) {
  const auto message = faults_.strike(operation);
  if (!message) return kSuccess;
  std::lock_guard lock(mutex_);
  words_ = *message;
  return kInjected;
}

void StandinDevice::inject(const char* operation, uint64_t after, const char* message) {
  faults_.inject(operation, after, message);
}

Result StandinDevice::before_copy() {
  {
    std::unique_lock lock(mutex_);
    released_.wait(lock, [this] { return !held_; });
    if (delay_ > 0) {
      const auto delay = std::chrono::microseconds(delay_);
      lock.unlock();
      std::this_thread::sleep_for(delay);
    }
  }
  if (const auto message = faults_.strike("device")) poison(*message);
  return status();
}

void StandinDevice::hold(bool held) {
  std::lock_guard lock(mutex_);
  held_ = held;
  released_.notify_all();
}

void StandinDevice::delay(uint64_t microseconds) {
  std::lock_guard lock(mutex_);
  delay_ = microseconds;
}

void StandinDevice::refuse_modules(bool refuse) {
  std::lock_guard lock(mutex_);
  refuse_modules_ = refuse;
}

bool StandinDevice::refuses_modules() const {
  std::lock_guard lock(mutex_);
  return refuse_modules_;
}

void StandinDevice::reset() {
  faults_.clear();
  std::lock_guard lock(mutex_);
  status_ = kSuccess;
  words_.clear();
  held_ = false;
  delay_ = 0;
  refuse_modules_ = false;
  released_.notify_all();
}

}  // namespace standin

using namespace standin;

extern "C" {

Result cuInit(unsigned) { return setting("COMPUTRON_STANDIN_DEVICES", 1) > 0 ? kSuccess : kErrorNoDevice; }

__attribute__((visibility("default"))) Result cuDriverGetVersion(int* version) {
  *version = static_cast<int>(setting("COMPUTRON_STANDIN_VERSION", 13000));
  return kSuccess;
}

Result cuGetErrorName(Result result, const char** name) {
  static const std::map<Result, const char*> names = {
      {kSuccess, "CUDA_SUCCESS"},
      {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
      {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
      {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"},
      {kErrorNoDevice, "CUDA_ERROR_NO_DEVICE"},
      {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
      {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
      {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
      {kInjected, "CUDA_ERROR_OPERATING_SYSTEM"},
      {kNotFound, "CUDA_ERROR_NOT_FOUND"},
      {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"},
  };
  const auto found = names.find(result);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return kSuccess;
}

Result cuGetErrorString(Result result, const char** text) {
  const bool injected = result == kInjected || result == kLaunchFailed;
  if (!injected) {
    const Result known = cuGetErrorName(result, text);
    if (known == kSuccess) *text = "as its name says";
    return known;
  }
  *text = StandinDevice::instance().injected_words();
  return kSuccess;
}

Result cuDeviceGetCount(int* count) {
  *count = static_cast<int>(setting("COMPUTRON_STANDIN_DEVICES", 1));
  return kSuccess;
}

Result cuDeviceGet(Device* device, int index) {
  if (index < 0 || index >= setting("COMPUTRON_STANDIN_DEVICES", 1)) return kInvalidDevice;
  *device = index;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int length, Device) {
  std::snprintf(name, static_cast<size_t>(length), "stand-in for a CUDA device");
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, Device) {
  if (attribute == kAttributeVirtualMemory) {
    *value = static_cast<int>(setting("COMPUTRON_STANDIN_VIRTUAL_MEMORY", 1));
  } else if (attribute == kAttributeHostNumaId) {
    *value = -1;
  } else {
    return kInvalidValue;
  }
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context* context, Device) {
  static int token = 0;
  *context = reinterpret_cast<Context>(&token);
  ++Counters::instance().contexts;
  return StandinDevice::instance().status();
}

Result cuDevicePrimaryCtxRelease(Device) {
  --Counters::instance().contexts;
  return kSuccess;
}

Result cuCtxPushCurrent(Context context) {
  contexts.push_back(context);
  return kSuccess;
}

Result cuCtxPopCurrent(Context* context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return kSuccess;
}

// What tests turn.
__attribute__((visibility("default"))) void computron_standin_inject(const char* operation, uint64_t after,
                                                                     const char* message) {
  StandinDevice::instance().inject(operation, after, message);
}
__attribute__((visibility("default"))) void computron_standin_hold(int held) {
  StandinDevice::instance().hold(held != 0);
}
__attribute__((visibility("default"))) void computron_standin_delay(uint64_t microseconds) {
  StandinDevice::instance().delay(microseconds);
}
__attribute__((visibility("default"))) void computron_standin_refuse_modules(int refuse) {
  StandinDevice::instance().refuse_modules(refuse != 0);
}
__attribute__((visibility("default"))) void computron_standin_reset() { StandinDevice::instance().reset(); }
__attribute__((visibility("default"))) uint64_t computron_standin_count(const char* name) {
  const Counters& counters = Counters::instance();
  const std::map<std::string, uint64_t> all = {
      {"pageable_copies", counters.pageable_copies},
      {"launches", counters.launches},
      {"contexts", counters.contexts},
      {"allocations", counters.allocations},
      {"mappings", counters.mappings},
      {"registered", counters.registered},
      {"streams", counters.streams},
      {"events", counters.events},
  };
  return all.at(name);
}

}  // extern "C"
