// Runs CUDA kernels on the CPU: the threads of a block are fibers that switch at barriers only.
//
// What it is for is finding mistakes, so it is stricter than a GPU:
// - Between two barriers the threads run one after the other, in an order that is set from outside. A kernel that lacks a
//   barrier gives other results in another order. Blocks run one after the other in that order, too.
// - Shared memory is filled with NaN before each block, device memory when it is allocated.
// - Device memory has inaccessible pages on both sides, so that an access beside it ends the kernel with an error. Blocks
//   are flush with one of the two (align_end); inputs are read-only.
// - Vectors that are not aligned end the kernel with an error (compile with -fsanitize=alignment, and trap). Arrays in
//   shared memory are aligned as they ask for, and no better.
// - Denormals are flushed to zero, as -use_fast_math does (on x86).
// - Threads of a block (warp) that do not all meet at a barrier (shuffle) are an error.
#pragma once

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

struct options {
    int      order     = 0; // 0: ascending, 1: descending, else: shuffled at every barrier
    uint64_t seed      = 0;
    int      warp      = 32;
    bool     align_end = true;
};

inline options     opt;
inline std::string error;
inline int         n_launches = 0;

// ---- device memory

struct memory {
    char * pages = nullptr;
    size_t size  = 0;
    char * data  = nullptr;

    explicit memory(size_t n_bytes) {
        const size_t page = sysconf(_SC_PAGESIZE);
        size  = (n_bytes + page - 1)/page*page + 2*page;
        pages = (char *) mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        data  = pages + page;
        mprotect(data, size - 2*page, PROT_READ | PROT_WRITE);
        memset(data, 0xff, size - 2*page);
        if (opt.align_end) {
            data = pages + size - page - n_bytes;
        }
    }

    memory(const void * src, size_t n_bytes, bool is_writable = false) : memory(n_bytes) {
        if (n_bytes > 0) {
            memcpy(data, src, n_bytes);
        }
        if (!is_writable) {
            const size_t page = sysconf(_SC_PAGESIZE);
            mprotect(pages + page, size - 2*page, PROT_READ);
        }
    }

    memory(const memory &) = delete;
    memory & operator=(const memory &) = delete;

    ~memory() { munmap(pages, size); }
};

// ---- shared memory

constexpr size_t RED_ZONE = 512; // bytes before and behind each array that stay as they are

alignas(64) inline char    arena[1 << 20];
inline size_t              arena_used = RED_ZONE;
inline std::vector<size_t> red_zones  = { 0 };

// "__shared__ T name;" becomes "T & name = simt::shared<T, alignof(T), __LINE__>();" before the source is compiled.
// The array is aligned as asked, and no better
template <typename T, size_t align, int line> T & shared() {
    static char * data = nullptr;
    if (!data) {
        arena_used  = (arena_used + 63)/64*64 + align;
        data        = arena + arena_used;
        arena_used += sizeof(T);
        red_zones.push_back(arena_used);
        arena_used += RED_ZONE;
    }
    return *(T *) data;
}

inline void poison_shared() { memset(arena, 0xff, std::min(sizeof(arena), arena_used + (128 << 10))); } // NaN in every type

inline bool shared_is_intact() {
    for (size_t zone : red_zones) {
        for (size_t i = zone; i < zone + RED_ZONE; i++) {
            if (arena[i] != (char) 0xff) {
                return false;
            }
        }
    }
    return true;
}

// ---- fibers

enum state { RUNNING, AT_BLOCK, AT_WARP, DONE };

struct fiber {
    ucontext_t        context;
    jmp_buf           resume;
    bool              started = false;
    std::vector<char> stack;
    state             st = DONE;
    dim3              idx;
    char              lane[16];
};

inline std::vector<fiber> fibers(1024);

inline fiber                 * current;
inline jmp_buf                 scheduler;
inline sigjmp_buf              fault;
inline std::function<void()>   body; // the kernel with its arguments
inline std::mt19937_64         rng;

inline void yield(state st) {
    current->st = st;
    if (_setjmp(current->resume) == 0) {
        _longjmp(scheduler, 1);
    }
}

inline void fiber_main() {
    for (;;) {
        body();
        yield(DONE);
    }
}

inline void run(fiber & f) {
    current   = &f;
    threadIdx = f.idx;
    if (_setjmp(scheduler) != 0) {
        return;
    }
    if (f.started) {
        _longjmp(f.resume, 1);
    }
    f.started = true;
    f.stack.resize(256*1024);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link          = nullptr;
    makecontext(&f.context, fiber_main, 0);
    setcontext(&f.context);
}

inline void arrange(std::vector<int> & order) {
    const int n = order.size();
    for (int i = 0; i < n; i++) {
        order[i] = opt.order == 1 ? n - 1 - i : i;
    }
    if (opt.order > 1) {
        for (int i = n - 1; i > 0; i--) {
            std::swap(order[i], order[rng() % (i + 1)]);
        }
    }
}

// true if all threads [i0, i1) wait at the same kind of barrier; they go on then
inline bool release(int i0, int i1, state st) {
    for (int i = i0; i < i1; i++) {
        if (fibers[i].st != st) {
            return false;
        }
    }
    for (int i = i0; i < i1; i++) {
        fibers[i].st = RUNNING;
    }
    return true;
}

inline bool run_block() {
    const int n = blockDim.x*blockDim.y*blockDim.z;

    poison_shared();

    for (int i = 0; i < n; i++) {
        fibers[i].st  = RUNNING;
        fibers[i].idx = dim3(i % blockDim.x, i/blockDim.x % blockDim.y, i/(blockDim.x*blockDim.y));
    }

    std::vector<int> order(n);
    for (;;) {
        arrange(order);
        for (int i : order) {
            if (fibers[i].st == RUNNING) {
                run(fibers[i]);
            }
        }

        bool all_done = true;
        for (int i = 0; i < n; i++) {
            all_done = all_done && fibers[i].st == DONE;
        }
        if (all_done) {
            if (!shared_is_intact()) {
                error = "a write beside an array in shared memory";
            }
            return error.empty();
        }
        bool any = release(0, n, AT_BLOCK);
        for (int i = 0; i < n; i += opt.warp) {
            any = release(i, std::min(n, i + opt.warp), AT_WARP) || any;
        }
        if (!any) {
            error = "the threads of a block do not meet at a barrier";
            return false;
        }
    }
}

inline void on_fault(int signal, siginfo_t *, void *) {
    error = signal == SIGILL ? "a vector that is not aligned" : "an access outside of device memory";
    siglongjmp(fault, 1);
}

// fibers that were left in the middle start anew
inline void reset() {
    for (fiber & f : fibers) {
        f.started = false;
    }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
    if (!error.empty()) {
        return;
    }
    if (block.x*block.y*block.z > fibers.size() || grid.x*grid.y*grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        error = "a launch beyond the limits of a device";
        return;
    }

    n_launches++;

    gridDim  = grid;
    blockDim = block;
    body     = kernel;
    rng.seed(opt.seed);

    struct sigaction action = {}, old_segv, old_bus, old_ill;
    action.sa_sigaction = on_fault;
    action.sa_flags     = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS,  &action, &old_bus);
    sigaction(SIGILL,  &action, &old_ill);

#ifdef __SSE__
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(csr | 0x8040);
#endif

    bool ok = true;
    if (sigsetjmp(fault, 1) == 0) {
        std::vector<int> order((size_t) grid.x*grid.y*grid.z);
        arrange(order);
        for (int i : order) {
            blockIdx = dim3(i % grid.x, i/grid.x % grid.y, i/(grid.x*grid.y));
            ok = run_block();
            if (!ok) {
                break;
            }
        }
    } else {
        ok = false;
    }
    if (!ok) {
        reset();
    }

#ifdef __SSE__
    _mm_setcsr(csr);
#endif

    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS,  &old_bus,  nullptr);
    sigaction(SIGILL,  &old_ill,  nullptr);
}

} // namespace simt

// ---- what kernels call

inline void __syncthreads() { simt::yield(simt::AT_BLOCK); }

inline void __syncwarp() { simt::yield(simt::AT_WARP); }

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int width) {
    static_assert(sizeof(T) <= sizeof(simt::fiber::lane), "");

    const int me   = simt::current - simt::fibers.data();
    const int lane = me % width;
    const int from = (lane ^ mask) < width ? me - lane + (lane ^ mask) : me;

    memcpy(simt::current->lane, &value, sizeof(T));
    __syncwarp(); // all values are there
    memcpy(&value, simt::fibers[from].lane, sizeof(T));
    __syncwarp(); // all values were read
    return value;
}
