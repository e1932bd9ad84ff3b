// Failures on purpose, for tests: the nth call of an operation fails.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

namespace computron {

class Faults {
 public:
  // Call number `after` (0: the next) of `operation` will fail, once, with `message`.
  void inject(const std::string& operation, uint64_t after, const std::string& message) {
    std::lock_guard lock(mutex_);
    planned_[operation] = {after, message};
  }

  void clear() {
    std::lock_guard lock(mutex_);
    planned_.clear();
  }

  // Counts one call. The message if this is the one to fail.
  std::optional<std::string> strike(const std::string& operation) {
    std::lock_guard lock(mutex_);
    const auto found = planned_.find(operation);
    if (found == planned_.end()) return std::nullopt;
    if (found->second.remaining-- > 0) return std::nullopt;
    std::string message = found->second.message;
    planned_.erase(found);
    return message;
  }

 private:
  struct Planned {
    uint64_t remaining;
    std::string message;
  };
  std::mutex mutex_;
  std::unordered_map<std::string, Planned> planned_;
};

}  // namespace computron
