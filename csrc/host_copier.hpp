// Copies of the host backend: made by the threads that wait for them.
#pragma once

#include "host_backend.hpp"

namespace computron {

class HostCopier : public Copier {
 public:
  HostCopier(HostBackend& backend, Direction direction) : backend_(backend), direction_(direction) {}

  std::shared_ptr<Ticket> submit(const Copy& copy) override;

 private:
  HostBackend& backend_;
  const Direction direction_;
};

}  // namespace computron
