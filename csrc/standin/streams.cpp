// Streams, events, copies and the one kernel; and the table of all functions.
#include <atomic>
#include <cstring>

#include "../digest.hpp"
#include "standin.hpp"

namespace standin {
namespace {

// Counts its recordings: a wait is for the last one made before it.
struct RecordedEvent {
  std::mutex mutex;
  std::condition_variable passed;
  uint64_t recorded = 0;
  uint64_t reached = 0;

  uint64_t record() {
    std::lock_guard lock(mutex);
    return ++recorded;
  }
  uint64_t last() {
    std::lock_guard lock(mutex);
    return recorded;
  }
  void reach(uint64_t number) {
    std::lock_guard lock(mutex);
    reached = std::max(reached, number);
    passed.notify_all();
  }
  void wait(uint64_t number) {
    std::unique_lock lock(mutex);
    passed.wait(lock, [&] { return reached >= number; });
  }
};

class ThreadStream {
 public:
  ThreadStream() : thread_([this] { run(); }) {}
  ~ThreadStream() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

  void enqueue(std::function<Result()> work) {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    wake_.notify_one();
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const auto work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<Result()>> queue_;
  bool stopping_ = false;
  std::thread thread_;
};

// The handle of an event is a shared_ptr on the heap: work that waits for it may outlive its destruction.
std::shared_ptr<RecordedEvent>& of(Event event) { return *reinterpret_cast<std::shared_ptr<RecordedEvent>*>(event); }

ThreadStream& of(Stream stream) {
  static ThreadStream* const default_stream = new ThreadStream;
  return stream ? *reinterpret_cast<ThreadStream*>(stream) : *default_stream;
}

void synchronize(Stream stream) {
  const auto event = std::make_shared<RecordedEvent>();
  const uint64_t number = event->record();
  of(stream).enqueue([event, number] {
    event->reach(number);
    return kSuccess;
  });
  event->wait(number);
}

Result copy(void* target, const void* source, size_t nbytes, DevicePointer device, const void* host, Stream stream) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (const Result result = StandinDevice::instance().strike("copy")) return result;
  if (!is_accessible(device, nbytes)) return kInvalidValue;
  of(stream).enqueue([=] {
    const Result result = StandinDevice::instance().before_copy();
    if (result == kSuccess) std::memcpy(target, source, nbytes);
    return result;
  });
  if (is_registered(host, nbytes)) return kSuccess;
  ++Counters::instance().pageable_copies;
  synchronize(stream);
  return StandinDevice::instance().status();
}

}  // namespace
}  // namespace standin

using namespace standin;

extern "C" {

Result cuStreamCreate(Stream* stream, unsigned flags) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (flags != kStreamNonBlocking) return kInvalidValue;
  *stream = reinterpret_cast<Stream>(new ThreadStream);
  ++Counters::instance().streams;
  return kSuccess;
}

Result cuStreamDestroy(Stream stream) {
  delete reinterpret_cast<ThreadStream*>(stream);
  --Counters::instance().streams;
  return kSuccess;
}

Result cuStreamSynchronize(Stream stream) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  synchronize(stream);
  return StandinDevice::instance().status();
}

Result cuStreamWaitEvent(Stream stream, Event event, unsigned) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  of(stream).enqueue([event = of(event), number = of(event)->last()] {
    event->wait(number);
    return kSuccess;
  });
  return kSuccess;
}

Result cuEventCreate(Event* event, unsigned flags) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (flags != (kEventBlockingSync | kEventDisableTiming)) return kInvalidValue;
  *event = reinterpret_cast<Event>(new std::shared_ptr<RecordedEvent>(std::make_shared<RecordedEvent>()));
  ++Counters::instance().events;
  return kSuccess;
}

Result cuEventDestroy(Event event) {
  delete &of(event);
  --Counters::instance().events;
  return kSuccess;
}

Result cuEventRecord(Event event, Stream stream) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  const uint64_t number = of(event)->record();
  of(stream).enqueue([event = of(event), number] {
    event->reach(number);
    return kSuccess;
  });
  return kSuccess;
}

Result cuEventSynchronize(Event event) {
  of(event)->wait(of(event)->last());
  return StandinDevice::instance().status();
}

Result cuMemcpyHtoDAsync(DevicePointer target, const void* source, size_t nbytes, Stream stream) {
  return copy(reinterpret_cast<void*>(target), source, nbytes, target, source, stream);
}

Result cuMemcpyDtoHAsync(void* target, DevicePointer source, size_t nbytes, Stream stream) {
  return copy(target, reinterpret_cast<const void*>(source), nbytes, source, target, stream);
}

Result cuModuleLoadData(Module* module, const void*) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  if (StandinDevice::instance().refuses_modules()) return kNoBinaryForGpu;
  *module = reinterpret_cast<Module>(1);
  return kSuccess;
}

Result cuModuleUnload(Module) { return kSuccess; }

Result cuModuleGetFunction(Function* function, Module, const char* name) {
  if (std::strcmp(name, "page_leaves") != 0) return kNotFound;
  *function = reinterpret_cast<Function>(1);
  return kSuccess;
}

// The kernel page_leaves, by the host's code for the same thing.
Result cuLaunchKernel(Function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                      Stream stream, void** parameters, void**) {
  if (const Result result = StandinDevice::instance().ready()) return result;
  const auto page = *static_cast<DevicePointer*>(parameters[0]);
  const auto nbytes = *static_cast<unsigned long long*>(parameters[1]);
  const auto leaves = *static_cast<DevicePointer*>(parameters[2]);
  const auto count = *static_cast<unsigned long long*>(parameters[3]);
  if (!is_accessible(page, nbytes) || !is_accessible(leaves, count * sizeof(uint64_t))) return kInvalidValue;
  if (count != computron::leaf_count(nbytes) || count * 4 > uint64_t{blocks} * threads) return kInvalidValue;
  ++Counters::instance().launches;
  of(stream).enqueue([=] {
    computron::digest_leaves(reinterpret_cast<const void*>(page), nbytes, reinterpret_cast<uint64_t*>(leaves));
    return kSuccess;
  });
  return kSuccess;
}

#define STANDIN_DECLARE(name, parameters) Result name parameters;
COMPUTRON_DRIVER_FUNCTIONS(STANDIN_DECLARE)

__attribute__((visibility("default"))) Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                                                  uint64_t, int* status) {
  static const std::map<std::string, void*> table = {
#define STANDIN_ENTRY(name, parameters) {#name, reinterpret_cast<void*>(&name)},
      COMPUTRON_DRIVER_FUNCTIONS(STANDIN_ENTRY)
#undef STANDIN_ENTRY
  };
  if (version > setting("COMPUTRON_STANDIN_VERSION", 13000)) return kInvalidValue;
  const auto found = table.find(symbol);
  *function = found == table.end() ? nullptr : found->second;
  *status = found == table.end();
  return kSuccess;
}

}  // extern "C"
