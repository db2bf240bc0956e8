// What CUDA, HIP and the emulator call differently: the only file that asks which of them it is.
// A kernel is a struct: kThreads, a plain struct Shared, and body(args, shared), which every thread of every block runs.
// launch<Kernel>(n_block, args, stream) runs it; an error is a number, 0 is none. kWarp is 64 on AMD's gfx9, else 32;
// blocks are multiples of 64 threads, all lanes of a warp take part in a shuffle, and no result depends on kWarp.
//
// HIP is spoken in clang's own words, so that clang alone, without ROCm, compiles the device code to the last
// instruction (-nogpuinc -DGPTCORE_HIP_NOHEADER); only the launch needs HIP's header.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__) && !defined(__HIP__)  // -------------------------------------------------------------- CUDA

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

namespace gptcore::gpu {

constexpr int kWarp = 32;

DEVICE int thread_index() { return int(threadIdx.x); }
DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
DEVICE void sync() { __syncthreads(); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t shuffle_up(uint32_t x, int by) { return __shfl_up_sync(0xffffffffu, x, by); }
DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) { return atomicAdd(to, x); }
DEVICE void atomic_add(uint64_t* to, uint64_t x) { atomicAdd(reinterpret_cast<unsigned long long*>(to), x); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }  // never fused, whatever the flags
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
using Sixteen = uint4;                               // bytes, that one instruction loads
DEVICE Sixteen load16(const void* from) { return *static_cast<const uint4*>(from); }

template <class Kernel, class Args>
__global__ void __launch_bounds__(Kernel::kThreads, 1) kernel(const Args args) {
  __shared__ typename Kernel::Shared shared;
  Kernel::body(args, shared);
}

template <class Kernel, class Args>
int launch(int64_t n_block, const Args& args, void* stream) {
  kernel<Kernel, Args><<<unsigned(n_block), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return int(cudaGetLastError());
}

inline const char* error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

inline int n_processors() {
  int device = 0, n = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? n : 1;
}

}  // namespace gptcore::gpu

#elif defined(__HIP__)  // --------------------------------------------------------------------------------------- HIP

#ifndef GPTCORE_HIP_NOHEADER
#include <hip/hip_runtime.h>
#endif

#define DEVICE __attribute__((device)) inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll")

namespace gptcore::gpu {

#if defined(__GFX8__) || defined(__GFX9__)
constexpr int kWarp = 64;
#else
constexpr int kWarp = 32;  // RDNA; the host's half of the compilation asks too, and uses it nowhere
#endif

DEVICE int thread_index() { return int(__builtin_amdgcn_workitem_id_x()); }
DEVICE int64_t block_index() { return int64_t(__builtin_amdgcn_workgroup_id_x()); }
DEVICE void sync() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
DEVICE int lane() { return thread_index() % kWarp; }
DEVICE uint32_t shuffle(uint32_t x, int from) { return uint32_t(__builtin_amdgcn_ds_bpermute(from * 4, int(x))); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return shuffle(x, lane() ^ mask); }
DEVICE uint32_t shuffle_up(uint32_t x, int by) { return shuffle(x, lane() < by ? lane() : lane() - by); }
DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) {
  return __hip_atomic_fetch_add(to, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
DEVICE void atomic_add(uint64_t* to, uint64_t x) {
  __hip_atomic_fetch_add(to, x, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_WORKGROUP);
}
DEVICE float times(float a, float b) {
#pragma clang fp contract(off)
  return a * b;
}
DEVICE float plus(float a, float b) {
#pragma clang fp contract(off)
  return a + b;
}
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
using Sixteen = uint32_t __attribute__((ext_vector_type(4)));
DEVICE Sixteen load16(const void* from) { return *static_cast<const Sixteen*>(from); }

template <class Kernel, class Args>
__attribute__((global)) void __attribute__((amdgpu_flat_work_group_size(1, Kernel::kThreads))) kernel(const Args args) {
  __attribute__((shared)) typename Kernel::Shared shared;
  Kernel::body(args, shared);
}

#ifdef GPTCORE_HIP_NOHEADER  // naming the kernel is enough to compile it

template <class Kernel, class Args>
int launch(int64_t, const Args&, void*) {
  [[maybe_unused]] void (*const named)(Args) = kernel<Kernel, Args>;
  return 0;
}
inline const char* error_text(int) { return ""; }
inline int n_processors() { return 1; }

#else

template <class Kernel, class Args>
int launch(int64_t n_block, const Args& args, void* stream) {
  kernel<Kernel, Args><<<unsigned(n_block), Kernel::kThreads, 0, static_cast<hipStream_t>(stream)>>>(args);
  return int(hipGetLastError());
}

inline const char* error_text(int code) { return hipGetErrorString(hipError_t(code)); }

inline int n_processors() {
  int device = 0, n = 0;
  if (hipGetDevice(&device) != hipSuccess) return 1;
  return hipDeviceGetAttribute(&n, hipDeviceAttributeMultiprocessorCount, device) == hipSuccess ? n : 1;
}

#endif

}  // namespace gptcore::gpu

#else  // ---------------------------------------------------------------------------------------------- the emulator

#define DEVICE inline
#define UNROLL
#include "../emu/emulator.h"

#endif
