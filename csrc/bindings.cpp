// Python names for the classes of this folder. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "address_range.hpp"
#include "cuda_backend.hpp"
#include "device_pool.hpp"
#include "digest.hpp"
#include "host_backend.hpp"
#include "host_memory.hpp"
#include "no_gil.hpp"
#include "range_view.hpp"
#include "transfer_engine.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace computron {
namespace {

using Unlocked = py::call_guard<NoGil>;
constexpr double kNever = std::numeric_limits<double>::infinity();

// What a memoryview of host memory holds on to.
struct HostBuffer {
  std::shared_ptr<HostRegion> region;
  size_t offset;
  size_t nbytes;
};

// A HostRegion that can be closed.
class HostMemory {
 public:
  HostMemory(std::shared_ptr<Backend> backend, size_t nbytes, int numa_node, size_t slab_bytes)
      : region_(HostRegion::create(std::move(backend), nbytes, numa_node, slab_bytes)) {}
  const std::shared_ptr<HostRegion>& region() const {
    if (!region_) throw TransferError("the host memory is closed");
    return region_;
  }
  void close() { region_.reset(); }

 private:
  std::shared_ptr<HostRegion> region_;
};

template <typename Work>
auto without_gil(Work work) {
  const NoGil nogil;
  return work();
}

py::bytes to_bytes(const Digest& digest) {
  return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

const char* name_of(Transfer::State state) {
  switch (state) {
    case Transfer::State::kQueued:
      return "queued";
    case Transfer::State::kRunning:
      return "running";
    case Transfer::State::kDone:
      return "done";
    case Transfer::State::kCancelled:
      return "cancelled";
    case Transfer::State::kFailed:
      return "failed";
  }
  return "";
}

void release_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // a consumer took it over and renamed it
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::dict to_dict(const LaneStatistics& statistics) {
  return py::dict("bytes"_a = statistics.bytes, "chunks"_a = statistics.chunks,
                  "seconds_busy"_a = statistics.seconds_busy, "transfers_done"_a = statistics.transfers_done,
                  "transfers_failed"_a = statistics.transfers_failed,
                  "transfers_cancelled"_a = statistics.transfers_cancelled, "in_flight"_a = statistics.in_flight,
                  "queued"_a = statistics.queued);
}

void bind_backend(py::module_& m) {
  py::class_<Backend, std::shared_ptr<Backend>>(m, "Backend", py::is_final())
      .def_property_readonly("kind", &Backend::kind)
      .def_property_readonly("device_name", &Backend::device_name)
      .def_property_readonly("device_index", &Backend::device_index)
      .def_property_readonly("granularity", &Backend::granularity)
      .def_property_readonly("free_memory", &Backend::free_memory)
      .def_property_readonly("host_accessible", &Backend::host_accessible)
      .def_property_readonly("failed", &Backend::failed)
      .def("inject_fault", &Backend::inject_fault, "operation"_a, "after"_a, "message"_a);
  m.def(
      "host_backend",
      [](std::optional<double> link_bandwidth, double link_latency, size_t copy_threads) -> std::shared_ptr<Backend> {
        return std::make_shared<HostBackend>(link_bandwidth.value_or(0), link_latency, copy_threads);
      },
      py::kw_only(), "link_bandwidth"_a = py::none(), "link_latency"_a = 0.0, "copy_threads"_a = 1);
  m.def(
      "cuda_backend",
      [](int index, const std::optional<std::string>& library) -> std::shared_ptr<Backend> {
        return std::make_shared<CudaBackend>(index, library.value_or(cuda::kDefaultLibrary));
      },
      "index"_a = 0, py::kw_only(), "library"_a = py::none(), Unlocked());
  m.def(
      "cuda_unavailable_reason",
      [](const std::optional<std::string>& library) {
        return cuda_unavailable_reason(library.value_or(cuda::kDefaultLibrary));
      },
      "library"_a = py::none(), Unlocked());
}

void bind_memory(py::module_& m) {
  py::class_<DevicePool, std::shared_ptr<DevicePool>>(m, "DevicePool", py::is_final())
      .def(py::init<std::shared_ptr<Backend>, size_t, size_t>(), "backend"_a, "frame_bytes"_a, "frames"_a, Unlocked())
      .def_property_readonly("frame_bytes", &DevicePool::frame_bytes)
      .def_property_readonly("frames", &DevicePool::frames)
      .def_property_readonly("free", &DevicePool::free)
      .def("allocate", &DevicePool::allocate, "count"_a)
      .def("release", &DevicePool::release, "frames"_a)
      .def(
          "digest",
          [](const DevicePool& pool, int64_t frame, size_t nbytes) {
            return to_bytes(without_gil([&] { return pool.digest(frame, nbytes); }));
          },
          "frame"_a, "nbytes"_a)
      .def(
          "read",
          [](const DevicePool& pool, int64_t frame, size_t offset, size_t nbytes) {
            py::bytes bytes(nullptr, nbytes);
            char* const target = PyBytes_AS_STRING(bytes.ptr());
            without_gil([&] { pool.read(frame, offset, target, nbytes); });
            return bytes;
          },
          "frame"_a, "offset"_a, "nbytes"_a)
      .def(
          "write",
          [](DevicePool& pool, int64_t frame, size_t offset, const py::buffer& data) {
            const py::buffer_info info = data.request();
            without_gil([&] { pool.write(frame, offset, info.ptr, static_cast<size_t>(info.size * info.itemsize)); });
          },
          "frame"_a, "offset"_a, "data"_a)
      .def("close", &DevicePool::close, Unlocked());

  py::class_<AddressRange, std::shared_ptr<AddressRange>>(m, "AddressRange", py::is_final())
      .def(py::init<std::shared_ptr<DevicePool>, size_t>(), "pool"_a, "nbytes"_a)
      .def_property_readonly("address", &AddressRange::address)
      .def_property_readonly("nbytes", &AddressRange::nbytes)
      .def("map", &AddressRange::map, "slots"_a, "frames"_a, Unlocked())
      .def("unmap", &AddressRange::unmap, "slots"_a, Unlocked())
      .def("mapped", &AddressRange::mapped)
      .def("dlpack",
           [](const std::shared_ptr<AddressRange>& range) {
             return py::capsule(view_of(range), "dltensor", release_capsule);
           })
      .def("close", &AddressRange::close, Unlocked());

  py::class_<HostBuffer>(m, "_HostBuffer", py::buffer_protocol()).def_buffer([](HostBuffer& buffer) {
    return py::buffer_info(reinterpret_cast<unsigned char*>(buffer.region->address() + buffer.offset),
                           static_cast<py::ssize_t>(buffer.nbytes));
  });
  py::class_<HostMemory>(m, "HostMemory", py::is_final())
      .def(py::init<std::shared_ptr<Backend>, size_t, int, size_t>(), "backend"_a, "nbytes"_a, py::kw_only(),
           "numa_node"_a = -1, "slab_bytes"_a = 0, Unlocked())
      .def_property_readonly("address", [](const HostMemory& memory) { return memory.region()->address(); })
      .def_property_readonly("nbytes", [](const HostMemory& memory) { return memory.region()->nbytes(); })
      .def_property_readonly("committed", [](const HostMemory& memory) { return memory.region()->committed(); })
      .def(
          "commit",
          [](const HostMemory& memory, size_t offset, size_t nbytes, size_t threads) {
            memory.region()->commit(offset, nbytes, threads);
          },
          "offset"_a, "nbytes"_a, "threads"_a = 1, Unlocked())
      .def(
          "discard",
          [](const HostMemory& memory, size_t offset, size_t nbytes) { memory.region()->discard(offset, nbytes); },
          "offset"_a, "nbytes"_a, Unlocked())
      .def(
          "buffer",
          [](const HostMemory& memory, size_t offset, size_t nbytes) {
            memory.region()->check_range(offset, nbytes);
            return py::memoryview(py::cast(HostBuffer{memory.region(), offset, nbytes}));
          },
          "offset"_a, "nbytes"_a)
      .def("close", &HostMemory::close);
}

void bind_transfers(py::module_& m) {
  py::class_<Source>(m, "Source", py::is_final())
      .def_static("pinned", &Source::pinned, "address"_a)
      .def_static("pageable", &Source::pageable, "address"_a)
      .def_static(
          "file",
          [](const std::vector<std::tuple<uint64_t, uint64_t, int, uint64_t>>& extents, uint64_t keep) {
            std::vector<Source::Extent> parsed;
            for (const auto& [offset, nbytes, descriptor, position] : extents) {
              parsed.push_back({offset, nbytes, descriptor, position});
            }
            return Source::file(std::move(parsed), keep);
          },
          "extents"_a, "keep"_a = 0);

  py::class_<Transfer, std::shared_ptr<Transfer>>(m, "Transfer", py::is_final())
      .def_property_readonly("id", &Transfer::id)
      .def_property_readonly("state", [](const Transfer& transfer) { return name_of(transfer.state()); })
      .def_property_readonly("error", &Transfer::error)
      .def_property_readonly("total_bytes", &Transfer::total_bytes)
      .def_property_readonly("bytes_done", &Transfer::bytes_done)
      .def_property_readonly("seconds", &Transfer::seconds)
      .def("page_done", &Transfer::page_done, "index"_a)
      .def("segment_done", &Transfer::segment_done, "segment"_a)
      .def("wait_segment", &Transfer::wait_segment, "segment"_a, "stream"_a = 0, Unlocked())
      .def("wait", &Transfer::wait, "timeout"_a = py::none(), Unlocked())
      .def("raise_priority", &Transfer::raise_priority, "priority"_a, "deadline"_a = kNever, Unlocked())
      .def("cancel", &Transfer::cancel, Unlocked());

  const auto submit = [](TransferEngine& engine, std::vector<int64_t> frames, std::vector<Source> sources,
                         std::vector<size_t> page_bytes, std::vector<size_t> segment_pages, int64_t priority,
                         double deadline) {
    return engine.submit(Direction::kToDevice, {std::move(frames), std::move(sources), std::move(page_bytes),
                                                std::move(segment_pages), priority, deadline});
  };
  const auto fetch = [](TransferEngine& engine, std::vector<int64_t> frames, const std::vector<uint64_t>& addresses,
                        std::vector<size_t> page_bytes, int64_t priority, double deadline) {
    std::vector<Source> targets;
    for (const uint64_t address : addresses) targets.push_back(Source::pinned(address));
    const std::vector<size_t> segment_pages{frames.size()};
    return engine.submit(Direction::kToHost, {std::move(frames), std::move(targets), std::move(page_bytes),
                                              segment_pages, priority, deadline});
  };
  py::class_<TransferEngine>(m, "TransferEngine", py::is_final())
      .def(py::init([](const std::shared_ptr<Backend>& backend, std::shared_ptr<DevicePool> pool, size_t chunk_bytes,
                       size_t depth, size_t staging_chunks) {
             if (pool->backend() != backend) throw std::invalid_argument("the pool is of another backend");
             return std::make_unique<TransferEngine>(std::move(pool), chunk_bytes, depth, staging_chunks);
           }),
           "backend"_a, "pool"_a, py::kw_only(), "chunk_bytes"_a, "depth"_a = 3, "staging_chunks"_a = 4)
      .def("submit", submit, "frames"_a, "sources"_a, "page_bytes"_a, "segment_pages"_a, py::kw_only(),
           "priority"_a = 0, "deadline"_a = kNever, Unlocked())
      .def("fetch", fetch, "frames"_a, "addresses"_a, "page_bytes"_a, py::kw_only(), "priority"_a = 0,
           "deadline"_a = kNever, Unlocked())
      .def_property_readonly("completions_fd", &TransferEngine::completions_fd)
      .def("completions", &TransferEngine::completions)
      .def("statistics", [](const TransferEngine& engine) { return to_dict(engine.statistics(Direction::kToDevice)); })
      .def("close", &TransferEngine::close, Unlocked());
}

}  // namespace
}  // namespace computron

PYBIND11_MODULE(_transfer, m) {
  using namespace computron;
  m.doc() = "Bytes between host and device.";
  const auto& transfer_error = py::register_exception<TransferError>(m, "TransferError", PyExc_RuntimeError);
  py::register_exception<DeviceFailed>(m, "DeviceFailed", transfer_error);
  m.def(
      "page_digest",
      [](uint64_t address, size_t nbytes) {
        return to_bytes(without_gil([&] { return page_digest(reinterpret_cast<const void*>(address), nbytes); }));
      },
      "address"_a, "nbytes"_a);
  bind_backend(m);
  bind_memory(m);
  bind_transfers(m);
}
