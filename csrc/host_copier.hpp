// memcpy threads that carry out the host backend's copies of one direction.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "host_backend.hpp"

namespace computron {

class HostTicket;

class HostCopier : public Copier {
 public:
  HostCopier(HostBackend& backend, Direction direction, size_t threads);
  ~HostCopier() override;

  std::shared_ptr<Ticket> submit(const Copy& copy) override;

 private:
  struct Job {
    Copy copy;
    std::shared_ptr<HostTicket> ticket;
  };

  void run();
  void carry_out(const Job& job);

  HostBackend& backend_;
  const Direction direction_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace computron
