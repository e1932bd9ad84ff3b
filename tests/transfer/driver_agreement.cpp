// Compiles if csrc/driver.hpp agrees with the toolkit's cuda.h: values, layouts, and the sizes of all parameters.
#include <type_traits>

#include "driver.hpp"

namespace ours = computron::cuda;

// Before cuda.h, which makes macros of some of the names.
#define DECLARE_OURS(name, parameters) using ours_##name = decltype(ours::Driver::name);
COMPUTRON_DRIVER_FUNCTIONS(DECLARE_OURS)

#include <cuda.h>

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kErrorNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(ours::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(ours::kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(ours::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(ours::kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(ours::kAllocationTypePinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(ours::kLocationTypeDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(ours::kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(ours::kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(ours::kAttributeVirtualMemory == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(ours::kAttributeHostNumaId == CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID);

static_assert(sizeof(ours::AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(ours::AllocationProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(ours::AllocationProperties, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(ours::AccessDescription) == sizeof(CUmemAccessDesc));
static_assert(offsetof(ours::AccessDescription, flags) == offsetof(CUmemAccessDesc, flags));

template <typename Ours, typename Theirs>
struct SameShape : std::false_type {};

template <typename... Ours, typename... Theirs>
struct SameShape<ours::Result (*)(Ours...), CUresult (*)(Theirs...)>
    : std::bool_constant<((sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>) &&
                          ...)> {};

#define CHECK_SHAPE(name, parameters) static_assert(SameShape<ours_##name, decltype(&name)>::value, #name);
COMPUTRON_DRIVER_FUNCTIONS(CHECK_SHAPE)
