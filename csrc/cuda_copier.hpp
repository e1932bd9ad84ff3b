// Copies of one direction on two streams: one for pinned memory, one for staging chunks.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "backend.hpp"
#include "cuda_owned.hpp"

namespace computron {

class CudaCopier : public Copier {
 public:
  CudaCopier(Backend& backend, const cuda::PrimaryContext& context, Direction direction);
  ~CudaCopier() override;

  std::shared_ptr<Ticket> submit(const Copy& copy) override;

 private:
  class Events;
  class CudaTicket;

  Backend& backend_;
  const cuda::PrimaryContext& context_;
  const Direction direction_;
  const cuda::OwnedStream pinned_;
  const cuda::OwnedStream staged_;
  const std::shared_ptr<Events> events_;
};

}  // namespace computron
