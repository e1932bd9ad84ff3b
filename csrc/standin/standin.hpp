// A stand-in for the CUDA driver: the functions that csrc/driver.hpp declares, over a memfd and threads. Tests load it
// in place of libcuda.so.1. It proves the logic of the CUDA backend on machines without a GPU, never its speed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../driver.hpp"
#include "../fault.hpp"

namespace standin {

using namespace computron::cuda;

constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kNoBinaryForGpu = 209;
constexpr Result kInvalidContext = 201;
constexpr Result kInvalidDevice = 101;
constexpr Result kInjected = 304;  // "operating system": an injected failure that the device survives
constexpr Result kNotFound = 500;
constexpr Result kLaunchFailed = 719;  // sticky

constexpr size_t kGranularity = 64 << 10;

// A number of the environment, or `fallback`.
long setting(const char* name, long fallback);

// What goes for the whole device.
class StandinDevice {
 public:
  static StandinDevice& instance();

  // The sticky error, or success.
  Result status() const;
  // As `status`, or "invalid context" if none is current in this thread.
  Result ready() const;
  void poison(const std::string& words);
  // Words of the last injected failure.
  const char* injected_words() const;
  // Counts a call; the failure to return if this is the one that shall fail.
  Result strike(const char* operation);
  void inject(const char* operation, uint64_t after, const char* message);
  // Called by a stream before each copy: waits while copies are held, and as long as one shall take.
  Result before_copy();
  void hold(bool held);
  void delay(uint64_t microseconds);
  void refuse_modules(bool refuse);
  bool refuses_modules() const;
  void reset();

 private:
  computron::Faults faults_;
  mutable std::mutex mutex_;
  std::condition_variable released_;
  Result status_ = kSuccess;
  std::string words_;
  bool held_ = false;
  uint64_t delay_ = 0;
  bool refuse_modules_ = false;
};

// How often things happened, for tests to look at.
struct Counters {
  std::atomic<uint64_t> pageable_copies{0};
  std::atomic<uint64_t> launches{0};
  std::atomic<uint64_t> contexts{0};     // retained
  std::atomic<uint64_t> allocations{0};  // living
  std::atomic<uint64_t> mappings{0};     // living
  std::atomic<uint64_t> registered{0};   // living
  std::atomic<uint64_t> streams{0};      // living
  std::atomic<uint64_t> events{0};       // living
  static Counters& instance();
};

// Can [pointer, pointer + nbytes) be accessed as device memory?
bool is_accessible(DevicePointer pointer, size_t nbytes);
// Is it registered host memory?
bool is_registered(const void* address, size_t nbytes);

// Work of a stream runs in its thread, in order.
void enqueue(Stream stream, std::function<Result()> work);

}  // namespace standin
