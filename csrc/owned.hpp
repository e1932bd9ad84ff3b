// Owners of system resources: move-only, freed in the destructor.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <utility>

namespace computron {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~FileDescriptor() {
    if (number_ >= 0) close(number_);
  }
  int get() const { return number_; }

 private:
  int number_ = -1;
};

class Mapping {
 public:
  Mapping() = default;
  Mapping(void* address, size_t nbytes) : address_(address), nbytes_(nbytes) {}
  Mapping(Mapping&& other) noexcept
      : address_(std::exchange(other.address_, MAP_FAILED)), nbytes_(std::exchange(other.nbytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(address_, other.address_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }
  ~Mapping() {
    if (address_ != MAP_FAILED) munmap(address_, nbytes_);
  }
  char* address() const { return static_cast<char*>(address_); }

 private:
  void* address_ = MAP_FAILED;
  size_t nbytes_ = 0;
};

}  // namespace computron
