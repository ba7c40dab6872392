/* A GPU that computes nothing: the CUDA runtime, driver and cuBLAS calls that torch makes, preloaded before theirs.

   Torch sees an H100. Its host code, allocator, streams and autograd threads are the real ones; kernels and matrix
   products return at once. Device memory is address space without pages: whoever reads it on the CPU crashes, and a
   copy to the host brings zeros. Calls that are not here reach NVIDIA's libraries, which report that there is no driver. */
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GIB ((size_t)1 << 30)
#define SEGMENT ((size_t)2 << 20) /* cudaMalloc aligns large blocks to it, and expandable_segments relies on that */

static size_t total_bytes(void) {
    const char *gib = getenv("MOCK_GPU_GIB");
    return (size_t)((gib ? atof(gib) : 80.0) * GIB);
}

/* --- the device --------------------------------------------------------------------------------------------------- */

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13020; return 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
    return 0;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "NVIDIA H100 80GB HBM3", .totalGlobalMem = total_bytes(), .major = 9, .minor = 0,
        .multiProcessorCount = 132, .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048,
        .sharedMemPerBlock = 49152, .sharedMemPerMultiprocessor = 233472, .sharedMemPerBlockOptin = 232448,
        .regsPerBlock = 65536, .regsPerMultiprocessor = 65536, .l2CacheSize = 52428800, .unifiedAddressing = 1,
        .canMapHostMemory = 1, .maxGridSize = {2147483647, 65535, 65535}, .maxThreadsDim = {1024, 1024, 64},
    };
    return 0;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90,
        .maxDynamicSharedSizeBytes = 232448};
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int size, size_t shared) {
    *blocks = 1;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size, size_t shared,
                                                           unsigned flags) {
    *blocks = 1;
    return 0;
}
const char *cudaGetErrorString(int error) { return error == 2 ? "out of memory" : error ? "mock error" : "no error"; }
const char *cudaGetErrorName(int error) { return error == 2 ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }

/* --- memory ------------------------------------------------------------------------------------------------------- */

static struct block { void *address; size_t bytes; struct block *next; } *blocks;
static size_t used_bytes;
static int last_error;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int cudaGetLastError(void) { int error = last_error; last_error = 0; return error; }
int cudaPeekAtLastError(void) { return last_error; }

int cudaMalloc(void **address, size_t bytes) {
    size_t rounded = (bytes + SEGMENT - 1) & ~(SEGMENT - 1);
    char *reserved = MAP_FAILED;
    pthread_mutex_lock(&lock);
    if (used_bytes + rounded <= total_bytes())
        reserved = mmap(0, rounded + SEGMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) {
        last_error = 2;
    } else {
        struct block *block = malloc(sizeof *block);
        *address = (void *)(((uintptr_t)reserved + SEGMENT - 1) & ~(uintptr_t)(SEGMENT - 1));
        *block = (struct block){*address, rounded, blocks};
        blocks = block;
        used_bytes += rounded;
    }
    pthread_mutex_unlock(&lock);
    return reserved == MAP_FAILED ? 2 : 0;
}
int cudaFree(void *address) {
    pthread_mutex_lock(&lock);
    for (struct block **place = &blocks; *place; place = &(*place)->next)
        if ((*place)->address == address) {
            struct block *freed = *place;
            *place = freed->next;
            used_bytes -= freed->bytes;
            munmap(freed->address, freed->bytes);
            free(freed);
            break;
        }
    pthread_mutex_unlock(&lock);
    return 0;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
    *total = total_bytes();
    *available = *total - used_bytes;
    return 0;
}
int cudaHostAlloc(void **address, size_t bytes, unsigned flags) { return posix_memalign(address, 4096, bytes ? bytes : 1); }
int cudaFreeHost(void *address) { free(address); return 0; }
int cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) memset(to, 0, bytes);
    return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, void *stream) {
    return cudaMemcpy(to, from, bytes, kind);
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    *attributes = (struct cudaPointerAttributes){0};
    return 0;
}

/* --- streams, events, handles ------------------------------------------------------------------------------------- */

static int new_handle(void **handle) {
    static uintptr_t last = 0;
    *handle = (void *)__sync_add_and_fetch(&last, 16);
    return 0;
}
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return new_handle(stream); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return new_handle(event); }
int cudaStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *capturing) { *capturing = 0; return 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasLtCreate(void **handle) { return new_handle(handle); }
int cublasLtMatmulDescCreate(void **handle) { return new_handle(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return new_handle(handle); }
int cublasLtMatrixLayoutCreate(void **handle) { return new_handle(handle); }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetVersion_v2(void *handle, int *version) { *version = 130400; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    *found = 1;
    return 0;
}

/* --- what does nothing -------------------------------------------------------------------------------------------- */

#define NOTHING(name) int name(void) { return 0; }
static NOTHING(driver_call)
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)16; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, unsigned long long flags, int *found) {
    if (found) *found = 0;
    *entry = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)driver_call : (void *)cuDevicePrimaryCtxGetState;
    return 0;
}
int __cudaGetKernel(void **handle, const void *kernel) { *handle = (void *)kernel; return 0; }
NOTHING(__cudaLaunchKernel)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventQuery)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventSynchronize)
NOTHING(cudaFuncSetAttribute)
NOTHING(cudaLaunchKernel)
NOTHING(cudaLaunchKernelExC)
NOTHING(cudaMemset)
NOTHING(cudaMemsetAsync)
NOTHING(cudaSetDevice)
NOTHING(cudaStreamDestroy)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)
NOTHING(cublasDestroy_v2)
NOTHING(cublasGemmEx)
NOTHING(cublasGemmStridedBatchedEx)
NOTHING(cublasLtMatmul)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasSgemm_v2)
NOTHING(cublasSgemmStridedBatched)
NOTHING(cuCtxSetCurrent)
NOTHING(cuDevicePrimaryCtxRetain)
