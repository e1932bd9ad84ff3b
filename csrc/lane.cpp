#include "lane.hpp"

#include <algorithm>
#include <utility>

namespace computron {
namespace {

std::shared_ptr<HostRegion> create_staging(const std::shared_ptr<Backend>& backend, const LaneOptions& options) {
  if (options.staging_chunks == 0) return nullptr;
  const size_t nbytes = options.staging_chunks * options.chunk_bytes;
  auto ring = HostRegion::create(backend, nbytes, -1, nbytes);
  ring->commit(0, nbytes, 1);
  return ring;
}

size_t filler_count(size_t staging_chunks) {
  const size_t half = std::clamp<size_t>(std::thread::hardware_concurrency() / 2, 1, 4);
  return std::min(staging_chunks, half);
}

}  // namespace

Lane::Lane(std::shared_ptr<DevicePool> pool, LaneOptions options, OnEnd on_end)
    : pool_(std::move(pool)),
      memory_(pool_->memory()),
      options_(options),
      on_end_(std::move(on_end)),
      staging_(create_staging(pool_->backend(), options)),
      copier_(pool_->backend()->create_copier(options.direction)) {
  for (size_t slot = 0; slot < options_.staging_chunks; ++slot) free_slots_.push_back(static_cast<int>(slot));
  for (size_t index = 0; index < backend().copy_threads(); ++index) threads_.emplace_back([this] { run(); });
  if (backend().has_streams()) threads_.emplace_back([this] { run_lander(); });
  for (size_t index = 0; index < filler_count(options_.staging_chunks); ++index) {
    threads_.emplace_back([this] { run_filler(); });
  }
}

bool Lane::must_fill(const Source& source) const {
  if (source.kind() == Source::Kind::kFile) return true;
  return source.kind() == Source::Kind::kPageable && backend().stages_pageable();
}

std::shared_ptr<HostRegion> Lane::region_of(const Source& source, size_t nbytes) const {
  const bool kept = source.kind() == Source::Kind::kFile && source.address() != nullptr;
  if (source.kind() != Source::Kind::kPinned && !kept) return nullptr;
  return backend().region_of(source.address(), nbytes);
}

Lane::Job Lane::submit(TransferRequest request, uint64_t sequence) {
  const size_t pages = request.frames.size();
  size_t pages_of_segments = 0;
  for (const size_t count : request.segment_pages) pages_of_segments += count;
  if (request.sources.size() != pages || request.page_bytes.size() != pages || pages_of_segments != pages) {
    throw std::invalid_argument("frames, sources, page_bytes and the sum of segment_pages must agree");
  }
  for (const size_t nbytes : request.page_bytes) {
    if (nbytes == 0 || nbytes > pool_->frame_bytes()) {
      throw std::invalid_argument("a page of " + std::to_string(nbytes) + " bytes for frames of " +
                                  std::to_string(pool_->frame_bytes()));
    }
  }
  if (request.deadline != request.deadline) throw std::invalid_argument("the deadline is not a number");
  backend().ensure_alive();

  const std::vector<int64_t> frames = request.frames;
  const Job job(new Transfer(shared_from_this(), std::move(request), sequence));
  std::lock_guard lock(mutex_);
  if (closing_) throw TransferError("the transfer engine is closed");
  pool_->pin(frames);
  if (job->left_ == 0) {
    end(job);
    return job;
  }
  jobs_.emplace(job->rank_, job);
  wake_.notify_all();
  fill_wake_.notify_all();
  return job;
}

void Lane::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (in_flight_.size() < options_.depth) {
      if (const auto work = take_send()) {
        const auto flight = send(lock, *work);
        if (flight && !backend().has_streams()) land(lock, *flight);
        continue;
      }
    }
    if (closing_) return;
    wake_.wait(lock);
  }
}

void Lane::run_lander() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (!in_flight_.empty() && in_flight_.front().ticket) {
      land(lock, in_flight_.begin());
    } else if (closing_ && in_flight_.empty()) {
      return;
    } else {
      land_wake_.wait(lock);
    }
  }
}

std::optional<Lane::Work> Lane::take_send() {
  for (const auto& [rank, job] : jobs_) {
    Transfer::Chunk& chunk = job->chunks_[job->next_];
    if (chunk.state == Transfer::ChunkState::kReady) return Work{job, job->next_};
  }
  return std::nullopt;
}

std::optional<Lane::Flights::iterator> Lane::send(std::unique_lock<std::mutex>& lock, const Work& work) {
  const Job& job = work.job;
  Transfer::Chunk& chunk = job->chunks_[work.chunk];
  const Transfer::Page& page = job->pages_[chunk.page];
  activate(work);
  chunk.state = Transfer::ChunkState::kSent;
  job->filled_.erase(work.chunk);
  if (++job->next_ == job->chunks_.size()) jobs_.erase(job->rank_);
  if (in_flight_.empty()) busy_since_ = Clock::now();
  const auto flight = in_flight_.insert(in_flight_.end(), {job, work.chunk, nullptr});
  Copy copy;
  copy.device = memory_->address() + static_cast<uint64_t>(page.frame) * pool_->frame_bytes() + chunk.offset;
  copy.host = host_side(page, chunk);
  copy.nbytes = chunk.nbytes;
  copy.staged = in_ring(page, chunk);
  copy.ready = chunk.ready;

  lock.unlock();
  std::shared_ptr<Ticket> ticket;
  std::optional<Failure> failure;
  try {
    ticket = copier_->submit(copy);
  } catch (const std::exception&) {
    failure = current_failure();
  }
  lock.lock();

  if (failure) {
    landed(flight, failure);
    return std::nullopt;
  }
  flight->ticket = std::move(ticket);
  if (++job->sent_ == job->segments_[page.segment].end_chunk) job->changed_.notify_all();
  land_wake_.notify_one();
  return flight;
}

void Lane::land(std::unique_lock<std::mutex>& lock, Flights::iterator flight) {
  const std::shared_ptr<Ticket> ticket = flight->ticket;
  lock.unlock();
  std::optional<Failure> failure;
  try {
    ticket->wait();
  } catch (const std::exception&) {
    failure = current_failure();
  }
  lock.lock();
  landed(flight, failure);
}

void Lane::landed(Flights::iterator flight, const std::optional<Failure>& failure) {
  const Work work{flight->job, flight->chunk};
  in_flight_.erase(flight);
  if (in_flight_.size() + 1 == options_.depth) wake_.notify_one();
  land_wake_.notify_one();
  if (in_flight_.empty()) statistics_.seconds_busy += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  free_slot(work.job->chunks_[work.chunk]);
  if (!failure) arrive(work);
  deactivate(work);
  if (failure) stop(work.job, Transfer::State::kFailed, *failure);
}

void Lane::run_filler() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (closing_) return;
    if (const auto work = take_fill()) {
      fill(lock, *work);
    } else {
      fill_wake_.wait(lock);
    }
  }
}

std::optional<Lane::Work> Lane::take_fill() {
  for (const auto& [rank, job] : jobs_) {
    size_t& index = job->fill_next_;
    while (index < job->chunks_.size() && job->chunks_[index].state != Transfer::ChunkState::kEmpty) ++index;
    if (index == job->chunks_.size()) continue;
    const std::optional<int> slot = take_slot(rank);
    if (!slot) return std::nullopt;
    job->chunks_[index].slot = *slot;
    return Work{job, index};
  }
  return std::nullopt;
}

// 1. A free slot. 2. The slot of the last filled chunk of the lowest job, if that ranks below the one that asks:
// else a queue of urgent transfers would keep a still more urgent one from being read.
std::optional<int> Lane::take_slot(const Rank& rank) {
  if (!free_slots_.empty()) {
    const int slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
  }
  for (auto lowest = jobs_.rbegin(); lowest != jobs_.rend() && rank < lowest->first; ++lowest) {
    Transfer& loser = *lowest->second;
    if (loser.filled_.empty()) continue;
    const size_t index = *loser.filled_.rbegin();
    loser.filled_.erase(index);
    loser.fill_next_ = std::min(loser.fill_next_, index);
    loser.chunks_[index].state = Transfer::ChunkState::kEmpty;
    return std::exchange(loser.chunks_[index].slot, -1);
  }
  return std::nullopt;
}

void Lane::fill(std::unique_lock<std::mutex>& lock, const Work& work) {
  const Job& job = work.job;
  Transfer::Chunk& chunk = job->chunks_[work.chunk];
  const Transfer::Page& page = job->pages_[chunk.page];
  chunk.state = Transfer::ChunkState::kFilling;
  activate(work);
  char* const target = host_side(page, chunk);
  lock.unlock();
  std::optional<Failure> failure;
  try {
    page.source.fill(target, chunk.offset, chunk.nbytes);
  } catch (const std::exception&) {
    failure = current_failure();
  }
  lock.lock();
  if (failure || job->stopped_) {
    free_slot(chunk);
  } else {
    chunk.state = Transfer::ChunkState::kReady;
    chunk.ready = Clock::now();
    job->filled_.insert(work.chunk);
    wake_.notify_one();
  }
  deactivate(work);
  if (failure) stop(job, Transfer::State::kFailed, *failure);
}

// A chunk of a file page that is kept has a slot too, as a bound on reading ahead, but does not use its memory.
bool Lane::in_ring(const Transfer::Page& page, const Transfer::Chunk& chunk) {
  return chunk.slot >= 0 && (page.source.kind() == Source::Kind::kPageable || page.source.address() == nullptr);
}

char* Lane::host_side(const Transfer::Page& page, const Transfer::Chunk& chunk) const {
  if (!in_ring(page, chunk)) return page.source.address() + chunk.offset;
  return reinterpret_cast<char*>(staging_->address()) + static_cast<size_t>(chunk.slot) * options_.chunk_bytes;
}

}  // namespace computron
