// The threads of a GPU threadgroup as fibers on one CPU thread. They switch at barriers only.
//
// What it is for is finding mistakes, so it is stricter than a GPU: between two barriers the threads run one after the
// other, in an order that is set from outside, so that a kernel that lacks a barrier gives other results in another order.
// Threads of a group that do not meet at a barrier are an error.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <ucontext.h>

namespace fibers {

enum order_kind { ASCENDING, DESCENDING, SHUFFLED };

struct options {
    int      order = ASCENDING;
    uint64_t seed  = 0;
};

inline options      opt;
inline const char * error = nullptr; // the first mistake; nothing runs any more
inline uint64_t     rng   = 1;

inline uint64_t random(uint64_t n) {
    rng = rng*6364136223846793005u + 1442695040888963407u;
    return (rng >> 33) % n;
}

enum fiber_state { RUNNING, AT_GROUP, AT_SIMD, DONE };

struct fiber {
    ucontext_t              context;
    jmp_buf                 resume;
    bool                    started = false;
    std::unique_ptr<char[]> stack;
    fiber_state             state   = DONE;
    int                     index   = 0;
    unsigned                n_simd  = 0; // operations of the SIMD group so far
};

constexpr size_t STACK = 128*1024;
constexpr int    SIMD  = 32;

inline std::vector<fiber> all(1024);
inline fiber *            current = nullptr;
inline jmp_buf            scheduler;
inline void            (* body)() = nullptr;

// what the lanes of a SIMD group exchange. Two of them: a lane is at most one operation ahead
struct exchange {
    float value[2][SIMD];
};
inline std::vector<exchange> exchanges(1024/SIMD);

inline void wait(fiber_state state) {
    current->state = state;
    if (_setjmp(current->resume) == 0) {
        _longjmp(scheduler, 1);
    }
}

inline void fiber_main() {
    for (;;) {
        body();
        wait(DONE);
    }
}

inline void resume(fiber & f) {
    current = &f;
    if (_setjmp(scheduler) != 0) {
        return;
    }
    if (f.started) {
        _longjmp(f.resume, 1);
    }
    f.started = true;
    if (!f.stack) {
        f.stack.reset(new char[STACK]);
    }
    getcontext(&f.context);
    f.context.uc_stack.ss_sp   = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link          = nullptr;
    makecontext(&f.context, fiber_main, 0);
    setcontext(&f.context);
}

inline void arrange(std::vector<int> & order, int n) {
    order.resize(n);
    for (int i = 0; i < n; i++) {
        order[i] = opt.order == DESCENDING ? n - 1 - i : i;
    }
    if (opt.order == SHUFFLED) {
        for (int i = n - 1; i > 0; i--) {
            std::swap(order[i], order[random(i + 1)]);
        }
    }
}

// true if all fibers [i0, i1) are in this state, after the same number of operations of their SIMD group
inline bool meet(int i0, int i1, fiber_state state) {
    for (int i = i0; i < i1; i++) {
        if (all[i].state != state || all[i].n_simd != all[i - i % SIMD].n_simd) {
            return false;
        }
    }
    return true;
}

inline void release(int i0, int i1) {
    for (int i = i0; i < i1; i++) {
        all[i].state = RUNNING;
    }
}

// run n fibers to their end; false if they do not meet at a barrier
inline bool run_group(int n) {
    for (int i = 0; i < n; i++) {
        all[i].state  = RUNNING;
        all[i].index  = i;
        all[i].n_simd = 0;
    }

    static std::vector<int> groups, lanes;

    for (;;) {
        arrange(groups, n/SIMD);
        for (int g : groups) {
            const int i0 = g*SIMD;
            do {
                arrange(lanes, SIMD);
                for (int lane : lanes) {
                    if (all[i0 + lane].state == RUNNING) {
                        resume(all[i0 + lane]);
                    }
                }
                if (!meet(i0, i0 + SIMD, AT_SIMD)) {
                    break;
                }
                release(i0, i0 + SIMD);
            } while (true);
        }

        if (meet(0, n, DONE)) {
            return true;
        }
        if (!meet(0, n, AT_GROUP)) {
            error = "the threads of a group do not meet at a barrier";
            for (fiber & f : all) {
                f.started = false; // those left in the middle start anew
            }
            return false;
        }
        release(0, n);
    }
}

} // namespace fibers
