// Tiles of matrices of 16-bit floats in shared memory, that copies bring and tensor cores multiply, on sm_90a alone; or
// their emulation. A tile is 64 columns, 128 bytes, of some rows. It lies swizzled: the c-th 16 bytes of row r are the
// (c ^ r % 8)-th there, so that 8 rows are read at once without a conflict. So a tile begins at whole 1024 bytes.
#pragma once
#include "formats.cuh"

constexpr int tile_columns = 64, tile_alignment = 1024;
constexpr int product_rows = 64, product_columns = 256, product_depth = 16;  // of one instruction of four warps
constexpr int products_of_thread = product_rows * product_columns / 128;

#ifdef SPARC_FAST_EMULATE_CUDA

using TileMap = emulation::TileMap;

inline TileMap map_tiles(const void* data, int64_t rows, int64_t columns, int64_t apart, int rows_of_tile) {
    return emulation::map_tiles(data, rows, columns, apart, rows_of_tile);
}
inline bool has_tiles() { return true; }

inline uint32_t in_shared(const void* p) { return emulation::in_shared(p); }
inline void load_tile(void* to, const TileMap& map, int column, int row, TransactionBarrier barrier, WHERE) {
    emulation::load_tile(to, map, column, row, barrier.at, where);
}
inline void begin_products() { emulation::begin_products(); }
template <class Format>
void multiply(float (&sums)[products_of_thread], uint64_t a, uint64_t b, bool adds, WHERE) {
    emulation::multiply(sums, a, b, adds, Format::value, where);
}
inline void commit_products() { emulation::commit_products(); }
template <int pending>
void wait_for_products(WHERE) {
    emulation::wait_for_products(pending, where);
}
inline void hand_over(float (&)[products_of_thread]) {}
template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}
inline void set_unless_under(unsigned& bits, unsigned bit, float value, float limit) {
    if (!(value < limit)) bits |= bit;
}

#else

#include <cuda.h>

#include <type_traits>

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_SM_90A(...) asm volatile(__VA_ARGS__)
#else
#define ON_SM_90A(...) __trap()
#endif

// How a matrix is cut into tiles; what lies outside the matrix is 0 in a tile.
using TileMap = CUtensorMap;

// The driver's, through the runtime, so that nothing is linked to the driver's library.
inline decltype(&cuTensorMapEncodeTiled) find_map_encoder() {
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &encode, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess)
        throw std::runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode);
}

// Of `rows` by `columns` 16-bit numbers, rows `apart` bytes apart, from whole 16 bytes to whole 16 bytes.
inline TileMap map_tiles(const void* data, int64_t rows, int64_t columns, int64_t apart, int rows_of_tile) {
    static const auto encode = find_map_encoder();
    TileMap map;
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(apart)};
    const cuuint32_t box[] = {cuuint32_t(tile_columns), cuuint32_t(rows_of_tile)}, steps[] = {1, 1};
    const CUresult result = encode(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::runtime_error("CUDA: no tiles of such a matrix: " + std::to_string(result));
    return map;
}

// Of the current device.
inline bool has_tiles() {
    int device, major, minor;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
}

// The tile that begins at a row and column of the matrix; the barrier hears of all its bytes, of what lies outside too.
// The map is a kernel's own argument.
__device__ inline void load_tile(void* to, const TileMap& map, int column, int row, TransactionBarrier barrier) {
    ON_SM_90A(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            in_shared(to)),
        "l"(&map), "r"(column), "r"(row), "r"(in_shared(barrier.at))
        : "memory");
}

// Before the first product, and after its sums were touched.
__device__ inline void begin_products() { ON_SM_90A("wgmma.fence.sync.aligned;" ::: "memory"); }

#define EIGHT(i) \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define THIRTY_TWO(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24)
#define MULTIPLY(type) \
    ON_SM_90A( \
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
        "}, %128, %129, adds, 1, 1, 0, 0;\n}" \
        : THIRTY_TWO(0), THIRTY_TWO(32), THIRTY_TWO(64), THIRTY_TWO(96) \
        : "l"(a), "l"(b), "r"(int(adds)))

// sums = A B^T, or += where it `adds`, begun by four warps together: 64 rows of A, 256 of B, 16 columns, by descriptors.
// Warp w, lane l has in sums[4 j + i] row 16 w + l / 4 + 8 (i / 2), column 8 j + 2 (l % 4) + i % 2.
template <class Format>
__device__ void multiply(float (&sums)[products_of_thread], uint64_t a, uint64_t b, bool adds) {
    if constexpr (std::is_same_v<Format, BFloat16>)
        MULTIPLY("bf16");
    else
        MULTIPLY("f16");
}

#undef MULTIPLY
#undef THIRTY_TWO
#undef EIGHT

// The products begun since the last time become a group.
__device__ inline void commit_products() { ON_SM_90A("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than so many groups are pending: their tiles may be overwritten, and when none is, sums are there.
template <int pending>
__device__ void wait_for_products() {
    ON_SM_90A("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// After no product is pending, before the sums are read: the compiler must not read them earlier.
__device__ inline void hand_over(float (&sums)[products_of_thread]) {
#pragma unroll
    for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// Registers of a thread, from those that others give. All of four warps do it.
template <int registers>
__device__ void take_registers() {
    ON_SM_90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ void give_registers() {
    ON_SM_90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Sets a bit, by one instruction after the comparison.
__device__ inline void set_unless_under(unsigned& bits, unsigned bit, float value, float limit) {
    asm("{\n.reg .pred is;\nsetp.geu.f32 is, %2, %3;\n@is or.b32 %0, %0, %1;\n}"
        : "+r"(bits)
        : "r"(bit), "f"(value), "f"(limit));
}

#endif

// Of a tile's first 16 columns; the next 16 are `next_columns` further. Its start and, in 16 bytes, what 8 rows take; 1
// stands for tiles of 128 bytes a row that are swizzled.
__device__ inline uint64_t descriptor(const void* tile) {
    return uint64_t((in_shared(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}
constexpr uint64_t next_columns = product_depth * 2 >> 4;
