#include "range_view.hpp"

namespace computron {
namespace {

struct View {
  std::shared_ptr<AddressRange> range;
  int64_t shape;
  int64_t stride = 1;
  dlpack::ManagedTensor managed{};
};

void delete_view(dlpack::ManagedTensor* managed) { delete static_cast<View*>(managed->context); }

}  // namespace

dlpack::ManagedTensor* view_of(const std::shared_ptr<AddressRange>& range) {
  auto* view = new View{range, static_cast<int64_t>(range->nbytes())};
  const Backend& backend = range->backend();
  dlpack::Tensor& tensor = view->managed.tensor;
  tensor.data = reinterpret_cast<void*>(range->address());
  tensor.device = backend.host_accessible() ? dlpack::Device{dlpack::kCpu, 0}
                                            : dlpack::Device{dlpack::kCuda, backend.device_index()};
  tensor.dimensions = 1;
  tensor.type = {dlpack::kUnsigned, 8, 1};
  tensor.shape = &view->shape;
  tensor.strides = &view->stride;
  view->managed.context = view;
  view->managed.deleter = delete_view;
  return &view->managed;
}

}  // namespace computron
