// One device's primary context, and what its errors mean.
#pragma once

#include <functional>
#include <string>

#include "driver.hpp"

namespace computron::cuda {

class PrimaryContext {
 public:
  // `on_sticky` is told the words of an error after which the device can do nothing more.
  PrimaryContext(const Driver& driver, int index, std::function<void(const std::string&)> on_sticky);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  const Driver& driver() const { return driver_; }
  Device device() const { return device_; }
  int attribute(int which, int fallback) const;

  // Throws DeviceFailed for a sticky error, TransferError for another.
  void check(Result result, const char* call, const char* file, int line) const;
  // For destructors: a sticky error is noted, nothing is thrown.
  void note(Result result) const noexcept;

  // Makes the context current in this thread, and the former one afterwards.
  class Current {
   public:
    explicit Current(const PrimaryContext& context);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const PrimaryContext& context_;
  };

 private:
  const Driver driver_;
  const std::function<void(const std::string&)> on_sticky_;
  Device device_ = 0;
  Context context_ = nullptr;
};

}  // namespace computron::cuda

// Calls a driver function and throws if it fails.
#define CUDA_CALL(context, function, ...) \
  (context).check((context).driver().function(__VA_ARGS__), #function, __FILE__, __LINE__)
