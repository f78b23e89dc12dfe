// The device operations of `doubles.cuh` on a CPU, one thread after the other: for tests. Threads of a team are contexts that take
// turns: each runs until it asks the others.
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>
#include <ucontext.h>

#define HOST
#define DEVICE static inline
#define METHOD inline
#define ENTRY static void
#define __shared__ static
#define __syncthreads() wait()
#ifdef WAITS  // threads that wait for each other are contexts, as those of teams
#define TURNS true
#else
#define TURNS (LANES > 1)
#endif
struct Three { unsigned x, y, z; };
static Three threadIdx, blockIdx, blockDim;

DEVICE unsigned long long bits(double x) { unsigned long long u; memcpy(&u, &x, 8); return u; }
DEVICE double number(unsigned long long u) { double x; memcpy(&x, &u, 8); return x; }
DEVICE double fused(double a, double b, double c) { return a * b + c; }
DEVICE float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
DEVICE void raise(int *place, int x) { *place = x > *place ? x : *place; }
DEVICE double to_bfloat16(double x) {
    float f = x;
    unsigned u;
    memcpy(&u, &f, 4);
    u = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000;
    memcpy(&f, &u, 4);
    return f;
}

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    double said[2];
    unsigned asked;
    bool done;
};
static std::vector<Thread> threads;
static ucontext_t turns;

DEVICE void wait() {
#ifdef WAITS
    const unsigned me = threadIdx.x;
    swapcontext(&threads[me].context, &turns);
    threadIdx.x = me;
#endif
}

// The number that thread `other` of the team says at this question; the answer waits until all have been asked.
template <unsigned TEAM> DEVICE double answer(double mine, unsigned other) {
    const unsigned me = threadIdx.x, of_team = me / TEAM * TEAM;
    if (TEAM == 1) return mine;
    const unsigned at = threads[me].asked++ % 2;
    threads[me].said[at] = mine;
    swapcontext(&threads[me].context, &turns);
    threadIdx.x = me;
    return threads[of_team + other].said[at];
}

template <unsigned TEAM> DEVICE int highest_of(int mine) {
    for (unsigned by = TEAM / 2; by; by /= 2) {
        int other = answer<TEAM>(mine, threadIdx.x % TEAM ^ by);
        mine = other > mine ? other : mine;
    }
    return mine;
}
#define of_lane(mine, lane) answer<LANES>(mine, lane)
#define of_neighbor(mine, by) answer<LANES>(mine, threadIdx.x % LANES ^ (by))
#define together() answer<LANES>(0, 0)
#define highest(mine) highest_of<LANES>(mine)

#include KERNELS

template <class... A, size_t... I> static void call(void (*kernel)(A...), void **given, std::index_sequence<I...>) {
    kernel(*(A *)given[I]...);
}
template <class... A> static void call(void (*kernel)(A...), void **given) { call(kernel, given, std::index_sequence_for<A...>()); }

static void **arguments;
static void run(unsigned me) {
    threadIdx = {me, 0, 0};
    call(KERNEL, arguments);
    threads[me].done = true;
}

extern "C" void launch(unsigned programs, unsigned more, unsigned count, void **given) {
    blockDim = {count, 1, 1}, arguments = given;
    threads.resize(count);
    for (unsigned by = 0; by < more; by++)
        for (unsigned bx = 0; bx < programs; bx++) {
            blockIdx = {bx, by, 0};
            if (!TURNS) {
                for (unsigned i = 0; i < count; i++) run(i);
                continue;
            }
            for (unsigned i = 0; i < count; i++) {
                Thread &thread = threads[i];
                thread.stack.resize(1 << 16), thread.asked = 0, thread.done = false;
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
                thread.context.uc_link = &turns;
                makecontext(&thread.context, (void (*)())run, 1, i);
            }
            for (bool any = true; any;) {
                any = false;
                for (unsigned i = 0; i < count; i++)
                    if (!threads[i].done) any = true, swapcontext(&turns, &threads[i].context);
            }
        }
}
