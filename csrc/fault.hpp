// Failures on purpose, for tests: the nth call of an operation fails.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace computron {

class Faults {
 public:
  // "copy", "map" and "create" fail once; "device" is a copy after which nothing works any more.
  static bool knows(const std::string& operation) {
    return operation == "copy" || operation == "map" || operation == "create" || operation == "device";
  }

  static void require(const std::string& operation) {
    if (!knows(operation)) throw std::invalid_argument("fault injection knows no operation \"" + operation + "\"");
  }

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
