// The part of Lane that keeps its books: what a chunk's start and end mean for its page, its job and its slot.
#include "lane.hpp"

namespace computron {

void Lane::activate(const Work& work) {
  Transfer& job = *work.job;
  if (job.state() == Transfer::State::kQueued) {
    job.begin_ = Clock::now();
    job.state_ = Transfer::State::kRunning;
  }
  ++job.active_;
  ++job.pages_[job.chunks_[work.chunk].page].active;
}

void Lane::deactivate(const Work& work) {
  Transfer& job = *work.job;
  Transfer::Page& page = job.pages_[job.chunks_[work.chunk].page];
  --page.active;
  --job.active_;
  unpin_if_idle(page, job.stopped_ || job.page_done(job.chunks_[work.chunk].page));
  if (job.active_ == 0 && (job.left_ == 0 || job.stopped_)) end(work.job);
}

void Lane::arrive(const Work& work) {
  Transfer& job = *work.job;
  const Transfer::Chunk& chunk = job.chunks_[work.chunk];
  ++statistics_.chunks;
  statistics_.bytes += chunk.nbytes;
  job.bytes_done_ += chunk.nbytes;
  --job.left_;
  --job.page_chunks_left_[chunk.page];
  if (--job.segment_chunks_left_[job.pages_[chunk.page].segment] == 0) job.changed_.notify_all();
}

void Lane::free_slot(Transfer::Chunk& chunk) {
  if (chunk.slot < 0) return;
  free_slots_.push_back(chunk.slot);
  chunk.slot = -1;
  fill_wake_.notify_one();
}

void Lane::unpin_if_idle(Transfer::Page& page, bool finished) {
  if (!finished || page.active > 0 || !page.pinned) return;
  page.pinned = false;
  pool_->unpin(page.frame);
}

void Lane::stop(const Job& job, Transfer::State outcome, const Failure& failure) {
  if (job->stopped_ || job->ended()) return;
  job->stopped_ = true;
  job->outcome_ = outcome;
  job->failure_ = failure;
  jobs_.erase(job->rank_);
  for (const size_t index : job->filled_) free_slot(job->chunks_[index]);
  job->filled_.clear();
  for (Transfer::Page& page : job->pages_) unpin_if_idle(page, true);
  job->changed_.notify_all();
  if (job->active_ == 0) end(job);
}

void Lane::end(const Job& job) {
  if (job->begin_ != Clock::time_point{}) {
    job->seconds_ = std::chrono::duration<double>(Clock::now() - job->begin_).count();
  }
  for (Transfer::Page& page : job->pages_) page.region.reset();
  job->state_ = job->outcome_;
  switch (job->outcome_) {
    case Transfer::State::kFailed:
      ++statistics_.transfers_failed;
      break;
    case Transfer::State::kCancelled:
      ++statistics_.transfers_cancelled;
      break;
    default:
      ++statistics_.transfers_done;
  }
  job->changed_.notify_all();
  on_end_(job);
}

std::vector<std::shared_ptr<Ticket>> Lane::tickets_of(const Transfer& transfer, size_t first_chunk,
                                                      size_t end_chunk) const {
  std::vector<std::shared_ptr<Ticket>> tickets;
  for (const Flight& flight : in_flight_) {
    if (flight.ticket && flight.job.get() == &transfer && flight.chunk >= first_chunk && flight.chunk < end_chunk) {
      tickets.push_back(flight.ticket);
    }
  }
  return tickets;
}

void Lane::raise(Transfer& transfer, int64_t priority, double deadline) {
  if (deadline != deadline) throw std::invalid_argument("the deadline is not a number");
  std::lock_guard lock(mutex_);
  const Rank raised{std::min(transfer.rank_.priority, priority), std::min(transfer.rank_.deadline, deadline),
                    transfer.rank_.sequence};
  auto node = jobs_.extract(transfer.rank_);
  transfer.rank_ = raised;
  if (node.empty()) return;  // everything is on its way already
  node.key() = raised;
  jobs_.insert(std::move(node));
  wake_.notify_all();
  fill_wake_.notify_all();
}

void Lane::cancel(Transfer& transfer) {
  std::lock_guard lock(mutex_);
  const auto found = jobs_.find(transfer.rank_);
  if (found == jobs_.end()) return;  // everything is on its way already
  const Job job = found->second;
  stop(job, Transfer::State::kCancelled, {});
}

LaneStatistics Lane::statistics() const {
  std::lock_guard lock(mutex_);
  LaneStatistics statistics = statistics_;
  if (!in_flight_.empty()) {
    statistics.seconds_busy += std::chrono::duration<double>(Clock::now() - busy_since_).count();
  }
  statistics.in_flight = in_flight_.size();
  statistics.queued = jobs_.size();
  return statistics;
}

void Lane::close() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
    while (!jobs_.empty()) {
      const Job job = jobs_.begin()->second;
      stop(job, Transfer::State::kCancelled, {});
    }
  }
  wake_.notify_all();
  land_wake_.notify_all();
  fill_wake_.notify_all();
  std::lock_guard joining(joining_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace computron
