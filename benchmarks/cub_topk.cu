// CUB's batched TopK for rows of TOPK_LENGTH floats, unsorted, ties as they come: a rival of topk_rows. Needs CCCL 3.5.
#if !__has_include(<cub/device/device_batched_topk.cuh>)
#error this CUDA has no cub::DeviceBatchedTopK, which needs CCCL 3.5
#else
#include <cub/device/device_batched_topk.cuh>
#include <cuda/iterator>

template <class T>
struct RowAt {
    T* first;
    int64_t length;
    __host__ __device__ T* operator()(int64_t n) const { return first + n * length; }
};

template <class T>
static auto rows(T* first, int64_t length) {
    return cuda::make_transform_iterator(cuda::make_counting_iterator<int64_t>(0), RowAt<T>{first, length});
}

// indices[n] (int32) = the columns of the TOPK_K largest of scores[n], values their scores, [N, TOPK_K] each. With no workspace
// only `bytes` is set, to what it must have. The error of CUDA, or 0.
extern "C" int cub_topk_rows(
    void* workspace, size_t* bytes, const float* scores, float* values, int32_t* indices, int64_t N, void* stream) {
    namespace execution = cuda::execution;
    const auto required = execution::require(
        execution::determinism::not_guaranteed, execution::tie_break::unspecified,
        execution::output_ordering::unsorted);
    const auto columns = cuda::make_constant_iterator(cuda::make_counting_iterator<int32_t>(0));
    return cub::DeviceBatchedTopK::MaxPairs(
        workspace, *bytes, rows(scores, TOPK_LENGTH), rows(values, TOPK_K), columns, rows(indices, TOPK_K),
        cuda::args::constant<TOPK_LENGTH>{}, cuda::args::constant<TOPK_K>{}, cuda::args::immediate{N},
        cuda::std::execution::env{required, cuda::stream_ref{static_cast<cudaStream_t>(stream)}});
}
#endif
