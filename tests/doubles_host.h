// The device operations of `doubles.cuh` on a CPU, one thread after the other: for tests.
#include <cmath>
#include <cstring>
#include <utility>

#define HOST
#define DEVICE static inline
#define METHOD inline
#define ENTRY static void
#define __shared__ static
#define __syncthreads()  // a kernel that needs it takes any count of threads: one here
struct Three { unsigned x, y, z; };
static Three threadIdx, blockIdx, blockDim;

DEVICE unsigned long long bits(double x) { unsigned long long u; memcpy(&u, &x, 8); return u; }
DEVICE double number(unsigned long long u) { double x; memcpy(&x, &u, 8); return x; }
DEVICE double fused(double a, double b, double c) { return a * b + c; }
DEVICE double to_bfloat16(double x) {
    float f = x;
    unsigned u;
    memcpy(&u, &f, 4);
    u = (u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000;
    memcpy(&f, &u, 4);
    return f;
}

#include KERNELS

template <class... A, size_t... I> static void call(void (*kernel)(A...), void **given, std::index_sequence<I...>) {
    kernel(*(A *)given[I]...);
}
template <class... A> static void call(void (*kernel)(A...), void **given) { call(kernel, given, std::index_sequence_for<A...>()); }

extern "C" void launch(unsigned programs, unsigned more, unsigned threads, void **given) {
    blockDim = {threads, 1, 1};
    for (unsigned by = 0; by < more; by++)
        for (unsigned bx = 0; bx < programs; bx++)
            for (unsigned i = 0; i < threads; i++) {
                threadIdx = {i, 0, 0}, blockIdx = {bx, by, 0};
                call(KERNEL, given);
            }
}
