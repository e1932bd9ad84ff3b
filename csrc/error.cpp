#include "error.hpp"

#include <cerrno>
#include <cstring>

namespace computron {

void throw_system_error(const char* what, const char* file, int line) {
  const int number = errno;
  const char* name = std::strrchr(file, '/');
  throw TransferError(std::string(what) + ": " + std::strerror(number) + " (" + (name ? name + 1 : file) + ":" +
                      std::to_string(line) + ")");
}

void rethrow(const Failure& failure) {
  if (failure.sticky) throw DeviceFailed(failure.message);
  throw TransferError(failure.message);
}

Failure current_failure() {
  try {
    throw;
  } catch (const DeviceFailed& error) {
    return {error.what(), true};
  } catch (const std::exception& error) {
    return {error.what(), false};
  }
}

}  // namespace computron
