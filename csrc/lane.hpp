// One direction of the link: which chunk travels next, which are under way, what became of them.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "host_memory.hpp"
#include "transfer.hpp"

namespace computron {

struct LaneOptions {
  Direction direction = Direction::kToDevice;
  size_t chunk_bytes = 0;
  size_t depth = 3;           // chunks in flight
  size_t staging_chunks = 0;  // chunks that are filled ahead
};

struct LaneStatistics {
  uint64_t bytes = 0;
  uint64_t chunks = 0;
  double seconds_busy = 0;  // with a chunk in flight
  uint64_t transfers_done = 0;
  uint64_t transfers_failed = 0;
  uint64_t transfers_cancelled = 0;
  uint64_t in_flight = 0;  // chunks
  uint64_t queued = 0;     // transfers with chunks to send
};

class Lane : public std::enable_shared_from_this<Lane> {
 public:
  using OnEnd = std::function<void(std::shared_ptr<Transfer>)>;

  // `on_end` is called once for each transfer, from any thread; it must not call the lane.
  Lane(std::shared_ptr<DevicePool> pool, LaneOptions options, OnEnd on_end);
  ~Lane() { close(); }

  std::shared_ptr<Transfer> submit(TransferRequest request, uint64_t sequence);
  LaneStatistics statistics() const;
  // Cancels everything, waits for the chunks in flight, joins the threads. Idempotent.
  void close();

  const Backend& backend() const { return *pool_->backend(); }
  size_t chunk_bytes() const { return options_.chunk_bytes; }
  bool must_fill(const Source& source) const;
  // What keeps the host side of a page mapped. Throws TransferError if it is not memory that can travel.
  std::shared_ptr<HostRegion> region_of(const Source& source, size_t nbytes) const;

 private:
  friend class Transfer;
  using Clock = std::chrono::steady_clock;
  using Job = std::shared_ptr<Transfer>;

  struct Flight {
    Job job;
    size_t chunk;
    std::shared_ptr<Ticket> ticket;
  };

  struct Work {
    Job job;
    size_t chunk;
  };

  using Flights = std::list<Flight>;  // the oldest first

  // The workers: one; where the CPU copies, as many as copies are made at once, each landing its own.
  void run();
  std::optional<Work> take_send();
  // Nothing if it could not be submitted.
  std::optional<Flights::iterator> send(std::unique_lock<std::mutex>& lock, const Work& work);
  void land(std::unique_lock<std::mutex>& lock, Flights::iterator flight);
  void landed(Flights::iterator flight, const std::optional<Failure>& failure);

  // The lander, where the device copies: it waits for the oldest chunk, so that the worker never has to.
  void run_lander();

  // The filler threads.
  void run_filler();
  std::optional<Work> take_fill();
  std::optional<int> take_slot(const Rank& rank);
  void fill(std::unique_lock<std::mutex>& lock, const Work& work);

  // All of these hold the mutex.
  void activate(const Work& work);
  void deactivate(const Work& work);
  void arrive(const Work& work);
  void free_slot(Transfer::Chunk& chunk);
  void unpin_if_idle(Transfer::Page& page, bool finished);
  void stop(const Job& job, Transfer::State outcome, const Failure& failure);
  void end(const Job& job);
  std::vector<std::shared_ptr<Ticket>> tickets_of(const Transfer& transfer, size_t first_chunk, size_t end_chunk) const;

  // What Transfer asks for.
  void raise(Transfer& transfer, int64_t priority, double deadline);
  void cancel(Transfer& transfer);

  static bool in_ring(const Transfer::Page& page, const Transfer::Chunk& chunk);
  char* host_side(const Transfer::Page& page, const Transfer::Chunk& chunk) const;

  const std::shared_ptr<DevicePool> pool_;
  const std::shared_ptr<PoolMemory> memory_;
  const LaneOptions options_;
  const OnEnd on_end_;
  const std::shared_ptr<HostRegion> staging_;
  const std::unique_ptr<Copier> copier_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;       // the workers: something to send, or room for it
  std::condition_variable land_wake_;  // the lander: something in flight
  std::condition_variable fill_wake_;  // the fillers: something to fill, or a slot
  std::map<Rank, Job> jobs_;           // with chunks to send
  Flights in_flight_;
  std::vector<int> free_slots_;
  LaneStatistics statistics_;
  Clock::time_point busy_since_{};
  bool closing_ = false;

  std::mutex joining_;
  std::vector<std::thread> threads_;
};

}  // namespace computron
