#include "transfer.hpp"

#include <algorithm>

#include "lane.hpp"

namespace computron {

Transfer::Transfer(std::shared_ptr<Lane> lane, TransferRequest&& request, uint64_t sequence)
    : lane_(std::move(lane)), rank_sequence_(sequence), rank_{request.priority, request.deadline, sequence} {
  const auto now = Clock::now();
  const size_t count = request.frames.size();
  page_chunks_left_ = std::vector<std::atomic<size_t>>(count);
  segment_chunks_left_ = std::vector<std::atomic<size_t>>(request.segment_pages.size());
  pages_.reserve(count);
  size_t page = 0;
  for (size_t segment = 0; segment < request.segment_pages.size(); ++segment) {
    const size_t first_chunk = chunks_.size();
    for (const size_t end = page + request.segment_pages[segment]; page < end; ++page) {
      const size_t nbytes = request.page_bytes[page];
      const Source& source = request.sources[page];
      pages_.push_back({request.frames[page], source, nbytes, segment, lane_->region_of(source, nbytes)});
      const ChunkState state = lane_->must_fill(source) ? ChunkState::kEmpty : ChunkState::kReady;
      const size_t page_first = chunks_.size();
      for (size_t offset = 0; offset < nbytes; offset += lane_->chunk_bytes()) {
        const size_t size = std::min(lane_->chunk_bytes(), nbytes - offset);
        chunks_.push_back({page, offset, size, state, -1, now});
      }
      page_chunks_left_[page] = chunks_.size() - page_first;
      total_bytes_ += nbytes;
    }
    segments_.push_back({first_chunk, chunks_.size()});
    segment_chunks_left_[segment] = chunks_.size() - first_chunk;
  }
  left_ = chunks_.size();
}

std::optional<std::string> Transfer::error() const {
  std::lock_guard lock(lane_->mutex_);
  if (!ended() || failure_.message.empty()) return std::nullopt;
  return failure_.message;
}

bool Transfer::page_done(size_t page) const {
  if (page >= pages_.size())
    throw std::out_of_range("page " + std::to_string(page) + " of a transfer of " + std::to_string(pages_.size()));
  return page_chunks_left_[page].load() == 0;
}

void Transfer::check_segment(size_t segment) const {
  if (segment >= segments_.size())
    throw std::out_of_range("segment " + std::to_string(segment) + " of a transfer of " +
                            std::to_string(segments_.size()));
}

bool Transfer::segment_done(size_t segment) const {
  check_segment(segment);
  return segment_chunks_left_[segment].load() == 0;
}

void Transfer::throw_if_stopped() const {
  if (!stopped_) return;
  if (outcome_ == State::kCancelled) throw TransferError("the transfer was cancelled");
  rethrow(failure_);
}

void Transfer::wait_segment(size_t segment, uint64_t stream) {
  check_segment(segment);
  std::vector<std::shared_ptr<Ticket>> tickets;
  {
    std::unique_lock lock(lane_->mutex_);
    const bool streams = lane_->backend().has_streams();
    changed_.wait(
        lock, [&] { return stopped_ || segment_done(segment) || (streams && sent_ >= segments_[segment].end_chunk); });
    throw_if_stopped();
    if (segment_done(segment)) return;
    tickets = lane_->tickets_of(*this, segments_[segment].first_chunk, segments_[segment].end_chunk);
  }
  for (const auto& ticket : tickets) ticket->make_wait(stream);
}

bool Transfer::wait(std::optional<double> timeout) {
  std::unique_lock lock(lane_->mutex_);
  const auto is_over = [this] { return ended(); };
  if (!timeout) {
    changed_.wait(lock, is_over);
    return true;
  }
  // More than a year would overflow the clock.
  const double seconds = std::min(std::max(*timeout, 0.0), 3e7);
  return changed_.wait_for(lock, std::chrono::duration<double>(seconds), is_over);
}

void Transfer::raise_priority(int64_t priority, double deadline) { lane_->raise(*this, priority, deadline); }

void Transfer::cancel() { lane_->cancel(*this); }

}  // namespace computron
