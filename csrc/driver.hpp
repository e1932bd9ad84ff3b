// The part of the CUDA driver's interface that is used, declared here so that building needs no CUDA headers, and
// resolved at run time so that importing needs no driver. Names, values and layouts are the driver's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.hpp"

namespace computron::cuda {

using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct OpaqueContext*;
using Stream = struct OpaqueStream*;
using Event = struct OpaqueEvent*;
using Module = struct OpaqueModule*;
using Function = struct OpaqueFunction*;

constexpr Result kSuccess = 0;
constexpr Result kErrorNoDevice = 100;

constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventBlockingSync = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostRegisterPortable = 1;
constexpr int kAllocationTypePinned = 1;
constexpr int kLocationTypeDevice = 1;
constexpr int kAccessReadWrite = 3;
constexpr int kGranularityMinimum = 0;
constexpr int kAttributeVirtualMemory = 102;
constexpr int kAttributeHostNumaId = 134;

struct Location {
  int type;
  int id;
};

struct AllocationProperties {
  int type;
  int requested_handle_types;
  Location location;
  void* win32_metadata;
  unsigned char flags[8];
};

struct AccessDescription {
  Location location;
  int flags;
};

// X(name, parameters): every function that is used; all return a Result.
#define COMPUTRON_DRIVER_FUNCTIONS(X)                                                                             \
  X(cuInit, (unsigned flags))                                                                                     \
  X(cuDriverGetVersion, (int* version))                                                                           \
  X(cuGetErrorName, (Result result, const char** name))                                                           \
  X(cuGetErrorString, (Result result, const char** text))                                                         \
  X(cuDeviceGetCount, (int* count))                                                                               \
  X(cuDeviceGet, (Device * device, int index))                                                                    \
  X(cuDeviceGetName, (char* name, int length, Device device))                                                     \
  X(cuDeviceGetAttribute, (int* value, int attribute, Device device))                                             \
  X(cuDevicePrimaryCtxRetain, (Context * context, Device device))                                                 \
  X(cuDevicePrimaryCtxRelease, (Device device))                                                                   \
  X(cuCtxPushCurrent, (Context context))                                                                          \
  X(cuCtxPopCurrent, (Context * context))                                                                         \
  X(cuMemGetInfo, (size_t* free, size_t* total))                                                                  \
  X(cuMemAlloc, (DevicePointer * pointer, size_t nbytes))                                                         \
  X(cuMemFree, (DevicePointer pointer))                                                                           \
  X(cuMemGetAllocationGranularity, (size_t* nbytes, const AllocationProperties* properties, int option))          \
  X(cuMemCreate,                                                                                                  \
    (AllocationHandle * handle, size_t nbytes, const AllocationProperties* properties, unsigned long long flags)) \
  X(cuMemRelease, (AllocationHandle handle))                                                                      \
  X(cuMemAddressReserve,                                                                                          \
    (DevicePointer * pointer, size_t nbytes, size_t alignment, DevicePointer wish, unsigned long long flags))     \
  X(cuMemAddressFree, (DevicePointer pointer, size_t nbytes))                                                     \
  X(cuMemMap,                                                                                                     \
    (DevicePointer pointer, size_t nbytes, size_t offset, AllocationHandle handle, unsigned long long flags))     \
  X(cuMemUnmap, (DevicePointer pointer, size_t nbytes))                                                           \
  X(cuMemSetAccess, (DevicePointer pointer, size_t nbytes, const AccessDescription* access, size_t count))        \
  X(cuMemHostRegister, (void* address, size_t nbytes, unsigned flags))                                            \
  X(cuMemHostUnregister, (void* address))                                                                         \
  X(cuMemcpyHtoDAsync, (DevicePointer target, const void* source, size_t nbytes, Stream stream))                  \
  X(cuMemcpyDtoHAsync, (void* target, DevicePointer source, size_t nbytes, Stream stream))                        \
  X(cuStreamCreate, (Stream * stream, unsigned flags))                                                            \
  X(cuStreamDestroy, (Stream stream))                                                                             \
  X(cuStreamSynchronize, (Stream stream))                                                                         \
  X(cuStreamWaitEvent, (Stream stream, Event event, unsigned flags))                                              \
  X(cuEventCreate, (Event * event, unsigned flags))                                                               \
  X(cuEventDestroy, (Event event))                                                                                \
  X(cuEventRecord, (Event event, Stream stream))                                                                  \
  X(cuEventSynchronize, (Event event))                                                                            \
  X(cuModuleLoadData, (Module * module, const void* image))                                                       \
  X(cuModuleUnload, (Module module))                                                                              \
  X(cuModuleGetFunction, (Function * function, Module module, const char* name))                                  \
  X(cuLaunchKernel,                                                                                               \
    (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,    \
     unsigned block_z, unsigned shared_bytes, Stream stream, void** parameters, void** extra))

// What only the tests' stand-in for the driver exports.
constexpr const char* kStandinInject = "computron_standin_inject";
using StandinInject = void (*)(const char* operation, uint64_t after, const char* message);

struct Driver {
#define COMPUTRON_DECLARE(name, parameters) Result(*name) parameters = nullptr;
  COMPUTRON_DRIVER_FUNCTIONS(COMPUTRON_DECLARE)
#undef COMPUTRON_DECLARE
  StandinInject standin_inject = nullptr;

  // The driver's name and text of an error.
  std::string words(Result result) const;
};

constexpr const char* kDefaultLibrary = "libcuda.so.1";
constexpr int kNeededVersion = 12000;

// Loads and initialises the driver. Throws TransferError: there is none, it is too old, it fails to start, or it has
// no device.
Driver load_driver(const std::string& library);

}  // namespace computron::cuda
