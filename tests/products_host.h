// The device operations of `products.cu` on a CPU, a thread for each lane: for tests, slowly.
#include <pthread.h>
#include <string.h>

#define HOST
#define DEVICE static inline
#define ENTRY static void
#define __shared__ static
#define SHARED(name) static u32x4 name[4096]
#define __syncthreads() pthread_barrier_wait(&everyone)
struct alignas(16) u32x4 { unsigned x, y, z, w; };
struct Three { unsigned x, y, z; };
static thread_local Three threadIdx, blockIdx;
static pthread_barrier_t everyone, warps[WARPS];
static unsigned given[WARPS][32][6];
static float lent[WARPS][32];

typedef unsigned int u32;
typedef unsigned short u16;
DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; i++) d |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return d;
}
DEVICE u32 turned(u32 word, int right) { right &= 31; return right ? word >> right | word << (32 - right) : word; }
DEVICE u32 masked(u32 word, u32 mask, u32 more) { return word & mask | more; }
DEVICE u32 flipped(u32 word, u32 mask, u32 more) { return word & mask ^ more; }
DEVICE float as_float(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
DEVICE u32 bits_of(float f) { u32 b; memcpy(&b, &f, 4); return b; }
DEVICE float product(float a, float b) { return a * b; }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float plus(float a, float b) { return a + b; }
DEVICE u16 rounded_bf16(float f) { u32 b = bits_of(f); return (b + 0x7FFF + (b >> 16 & 1)) >> 16; }
DEVICE u16 rounded_f16(float f) { _Float16 h = f; u16 d; memcpy(&d, &h, 2); return d; }
DEVICE float of_f16(u16 h) { _Float16 f; memcpy(&f, &h, 2); return f; }
DEVICE float low16(u32 a) { return as_float(a << 16); }
DEVICE float high16(u32 a) { return as_float(a & 0xFFFF0000); }
DEVICE u32 shorts(float low, float high) { return rounded_bf16(low) | (u32)rounded_bf16(high) << 16; }
DEVICE u32 minus(u32 a, u32 b) { return shorts(low16(a) - low16(b), high16(a) - high16(b)); }
DEVICE u32 times(u32 a, u32 b) { return shorts(low16(a) * low16(b), high16(a) * high16(b)); }
DEVICE u32 halves(float low, float high) { return rounded_f16(low) | (u32)rounded_f16(high) << 16; }
template <int size> DEVICE void copy(void *to, const void *from) { memcpy(to, from, size); }
DEVICE void let_next_begin() {}
DEVICE void await_previous() {}
DEVICE void bring(const void *, u32) {}
DEVICE void close_copies() {}
template <int later> DEVICE void await_copies() {}
DEVICE float from_lane(float f, int mask) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    lent[warp][lane] = f;
    pthread_barrier_wait(&warps[warp]);
    float d = lent[warp][lane ^ mask];
    pthread_barrier_wait(&warps[warp]);
    return d;
}
DEVICE float half_of(u32 pair, int high) {
#if XS == 0
    return high ? high16(pair) : low16(pair);
#else
    return of_f16(high ? pair >> 16 : pair & 0xFFFF);
#endif
}
// As PTX describes m16n8k16: lane 4 g + t gives rows g and g + 8 of a, column g of b, and takes columns 2 t and 2 t + 1 of c.
DEVICE void mma(float *c, const u32 *a, u32 b0, u32 b1) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(given[warp][lane], mine, sizeof mine);
    pthread_barrier_wait(&warps[warp]);
    for (int e = 0; e < 4; e++) {
        int column = 2 * t + e % 2;
        double sum = c[e];
        for (int k = 0; k < 16; k++) {
            int from = k % 8 / 2;
            sum += (double)half_of(given[warp][4 * g + from][e / 2 + k / 8 * 2], k % 2)
                * half_of(given[warp][4 * column + from][4 + k / 8], k % 2);
        }
        c[e] = sum;
    }
    pthread_barrier_wait(&warps[warp]);
}

#include KERNELS
#ifdef KEEPS
typedef u16 X;
#define ENTERED multiply_few
#else
typedef void X;
#define ENTERED multiply
#endif

#ifdef ARRANGES
extern "C" void launch(int programs, int, const u16 *x, u32x4 *out, u32 inputs, u32 count, u32 words, u32 all) {
    for (int bx = 0; bx < programs; bx++)
        for (unsigned i = 0; i < 32 * WARPS; i++) {
            threadIdx = {i, 0, 0}, blockIdx = {(u32)bx, 0, 0};
            arrange(x, out, inputs, count, words, all);
        }
}
#else

struct Given {
    const void *x; const u32 *codes; const u8 *scales, *zeros; const float *power; const u8 *biases; const void *bias; void *out;
    const i64 *experts; u32 outputs, inputs, count, words, stride, groups, powers;
};
static Given call;
static Three program;

static void *run(void *lane) {
    threadIdx = {(u32)(u64)lane, 0, 0}, blockIdx = program;
    ENTERED(
        (const X *)call.x, call.codes, call.scales, call.zeros, call.power, call.biases, call.bias, call.out, call.experts, call.outputs,
        call.inputs, call.count, call.words, call.stride, call.groups, call.powers
    );
    return 0;
}

extern "C" void launch(
    u32 programs, u32 more, const void *x, const u32 *codes, const u8 *scales, const u8 *zeros, const float *power,
    const u8 *biases, const void *bias, void *out, const i64 *experts, u32 outputs, u32 inputs, u32 count, u32 words, u32 stride, u32 groups,
    u32 powers
) {
    call = {x, codes, scales, zeros, power, biases, bias, out, experts, outputs, inputs, count, words, stride, groups, powers};
    pthread_barrier_init(&everyone, 0, 32 * WARPS);
    for (int w = 0; w < WARPS; w++) pthread_barrier_init(&warps[w], 0, 32);
    for (u32 by = 0; by < more; by++)
        for (u32 bx = 0; bx < programs; bx++) {
            program = {bx, by, 0};
            pthread_t lanes[32 * WARPS];
            for (u64 i = 0; i < 32 * WARPS; i++) pthread_create(&lanes[i], 0, run, (void *)i);
            for (u64 i = 0; i < 32 * WARPS; i++) pthread_join(lanes[i], 0);
        }
}
#endif
