// The two exceptions that leave this library, and the one macro that throws them.
#pragma once

#include <stdexcept>
#include <string>

namespace computron {

// A backend call failed. The message carries the backend's words.
class TransferError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A sticky error: the device can do nothing more.
class DeviceFailed : public TransferError {
 public:
  using TransferError::TransferError;
};

// Throws TransferError with `what`, the text of errno, and where it happened.
[[noreturn]] void throw_system_error(const char* what, const char* file, int line);

// An error on its way from one thread to another.
struct Failure {
  std::string message;
  bool sticky = false;
};

// Throws DeviceFailed or TransferError with its message.
[[noreturn]] void rethrow(const Failure& failure);

// Failure of the exception that is being handled. Call only from a catch block.
Failure current_failure();

}  // namespace computron

// Throws unless `condition`; errno tells why.
#define COMPUTRON_CHECK(condition, what)                                         \
  do {                                                                           \
    if (!(condition)) ::computron::throw_system_error(what, __FILE__, __LINE__); \
  } while (false)
