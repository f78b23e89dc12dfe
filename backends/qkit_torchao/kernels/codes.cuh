// Packed codes in the layout of `arithmetic.words`, as the products of `products.cu` and `few.cu` read them on tensor cores.
//
// A warp takes 16 TILES outputs, in tiles of 16, and every WARPS-th block of 16 words of their rows. Lane 4 g + t has rows g and
// g + 8 of a tile, and the t-th four words of the block, read at once. Codes become 16-bit floats, which the instruction `mma`
// multiplies by eight columns. Any order of a row's codes will do there, as long as both sides have the same: so a register has
// codes i and i + 16 / HIGH of a word, which lie 16 bits apart.
//
// Constants (macros):
//   XS: the type of x: 0 bfloat16, 1 float16, 2 float32.
//   HIGH, LOW: widths of the planes, LOW 0 where there is one.
//   ELEMENT: 0 integer, 1 e2m1, 2 e4m3, 3 e5m2.
//   SCALES: 0 bfloat16, 1 e8m0, 2 e4m3 under a power of two, 3 float32, 4 float16; of files alone: 5 any code of e8m0, 6 and 7 e4m3
//     times a float32 and over one.
//   ZEROS: whether there are zero points.
//   BIASES: 0 if there are none, else their type as that of scales, and one more. Codes of such integers are from 0 on.
//   UNIT: columns of a unit. RATIO: units of a group; 0 where a row is one group.
//   EIGHTS: rows of x over eight. TILES, WARPS: see above.
//   SAFE: whether columns, words or addresses may be odd, so that nothing is read at once.
//   WHOLE: whether rows are whole blocks.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

#ifndef HOST
#define DEVICE __device__ __forceinline__
#define ENTRY extern "C" __global__ void __launch_bounds__(32 * WARPS)
#define SHARED(name) extern __shared__ u32x4 name[]
struct __align__(16) u32x4 { u32 x, y, z, w; };

DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 turned(u32 word, int right) { return __funnelshift_r(word, word, right & 31); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float f) { return __float_as_uint(f); }
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }  // never one operation with the product before
// word & mask | more, and word & mask ^ more, as one instruction each, where the compiler makes two of constants.
DEVICE u32 masked(u32 word, u32 mask, u32 more) { u32 d; asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "r"(mask), "r"(more)); return d; }
DEVICE u32 flipped(u32 word, u32 mask, u32 more) { u32 d; asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(word), "r"(mask), "r"(more)); return d; }
#if __CUDA_ARCH__ >= 900
DEVICE u32 minus(u32 a, u32 b) { u32 d; asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 times(u32 a, u32 b) { u32 d; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
#else  // as b * -1 + a, and as a * b + -0, which older devices have
DEVICE u32 fma(u32 a, u32 b, u32 c) { u32 d; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
DEVICE u32 minus(u32 a, u32 b) { return fma(b, 0xBF80BF80, a); }
DEVICE u32 times(u32 a, u32 b) { return fma(a, b, 0x80008000); }
#endif
DEVICE u32 halves(float low, float high) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
DEVICE u32 shorts(float low, float high) { u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)); return d; }
DEVICE u16 rounded_bf16(float f) { u16 d; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(f)); return d; }
DEVICE u16 rounded_f16(float f) { u16 d; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(f)); return d; }
DEVICE float of_f16(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE float from_lane(float f, int mask) { return __shfl_xor_sync(0xFFFFFFFF, f, mask); }
// Begins to copy `size` bytes, 4, 8 or 16.
template <int size> DEVICE void copy(void *to, const void *from) {
#if EIGHTS == 1  // to registers
    if (size == 16) {
        u32x4 d;
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(from));
        *(u32x4 *)to = d;
    } else {
        for (int i = 0; i < size / 4; i++) ((u32 *)to)[i] = ((const u32 *)from)[i];
    }
#else
    u32 at = (u32)__cvta_generic_to_shared(to);
    if (size == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(at), "l"(from), "n"(size) : "memory");
#endif
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int later> DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(later) : "memory"); }
#if __CUDA_ARCH__ >= 900
// Lets the next kernel of the stream begin, up to where it awaits this one; and awaits the one before.
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Begins to bring `size` bytes to the second cache, 16 at a time: whoever changes them before they are read is heard.
DEVICE void bring(const void *from, u32 size) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(from), "r"(size)); }
#else
DEVICE void let_next_begin() {}
DEVICE void await_previous() {}
DEVICE void bring(const void *, u32) {}
#endif
DEVICE void mma(float *c, const u32 *a, u32 b0, u32 b1) {
#if XS == 0
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

constexpr u32 WORDS = UNIT * HIGH / 32;      // of the high plane, a unit
constexpr u32 LOWS = UNIT * LOW / 32;        // of the low plane
constexpr u32 SCALED = WORDS < 4 ? 4 / WORDS : 1;  // units of four words
constexpr u32 PAIRS = 16 / HIGH;             // pairs of columns of a word, and registers
constexpr u32 ROWS = 2 * TILES;              // outputs of a lane
constexpr u32 WIDE = 8 * EIGHTS;             // rows of x
constexpr u32 BITS = HIGH + LOW;
constexpr u32 MIDDLE = BIASES ? 0 : 1u << (BITS - 1);  // the code of 0 where there are no zero points
constexpr bool SHORT_SCALES = SCALES < 3 || SCALES == 5;  // whether scales are bfloat16 numbers
constexpr u32 TOGETHER = WORDS >= 4 ? (LOWS < 4 ? LOWS : 4) : SCALED * LOWS;  // words of the low plane of four words
constexpr u32 ROOM = 49152 / (WARPS * ROWS * 32 * (LOW ? 32 : 16));  // stages for which there is memory
constexpr u32 STEP = 16 * WARPS;               // words of a row from one block of a warp to its next
constexpr u32 STAGES = EIGHTS == 1 ? 2 : ROOM < 4 ? ROOM : 4;  // copies: those on their way, and one that is read

// Four words of the high plane; where there are two planes, the even codes of words and the odd ones, each at every 2 HIGH bits.
struct Four { u32 words[4], odds[4]; };

// Code registers --------------------------------------------------------------------------------------------------------------

// Codes of 8 bits, less 128: 128 and seven bits, less 256, or less 128 where the eighth is set.
DEVICE u32 less_128(u32 word) {
    return minus(masked(word, 0x007F007F, 0x43004300), flipped(word, 0x00800080, 0x43804380));
}

// Codes i and i + 16 / HIGH as bfloat16, exact, less `zero`: of integers, 128 + zero in both halves, or 2^23 + zero for 8 bits.
DEVICE u32 number(u32 word, u32 odds, u32 i, u32 zero) {
#if ELEMENT == 0 && HIGH == 8 && !ZEROS && !BIASES
    return less_128(turned(word, 8 * i));
#elif ELEMENT == 0 && HIGH == 8
    float even = as_float(bytes_of(word, 0x4B000000, 0x7440 + i)) - as_float(zero);
    float odd = as_float(bytes_of(word, 0x4B000000, 0x7442 + i)) - as_float(zero);
    return bytes_of(bits_of(even), bits_of(odd), 0x7632);
#elif ELEMENT == 0
    constexpr u32 mask = ((1u << BITS) - 1) * 0x10001;
    u32 codes = LOW ? turned(i % 2 ? odds : word, i / 2 * 2 * HIGH) : turned(word, HIGH * i);
    return minus(masked(codes, mask, 0x43004300), zero);
#elif ELEMENT == 1
    return times(turned(word, 4 * i - 12) & 0x80008000 | turned(word, 4 * i - 6) & 0x01C001C0, 0x7E807E80);  // 2^126
#elif ELEMENT == 2
    return times(turned(word, 8 * i - 8) & 0x80008000 | turned(word, 8 * i - 4) & 0x07F007F0, 0x7B807B80);  // 2^120
#else
    return times(turned(word, 8 * i - 8) & 0x80008000 | turned(word, 8 * i - 5) & 0x0FE00FE0, 0x77807780);  // 2^112
#endif
}

// What `number` takes away: `z` is the zero point, or `MIDDLE`.
DEVICE u32 zero_of(u32 z) {
#if HIGH == 8
    return 0x4B000000 | z;
#else
    return (0x4300 | z) * 0x10001;
#endif
}

DEVICE float low_of(u32 pair) { return as_float(pair << 16); }
DEVICE float high_of(u32 pair) { return as_float(pair & 0xFFFF0000); }

// A code times its scale, plus its bias, as a float32.
DEVICE float value(float code, float s, float b) { return BIASES ? plus(product(code, s), b) : product(code, s); }

// A register of values, rounded once to the type of x.
DEVICE u32 scaled(u32 codes, float s, float b) {
    if (XS == 0 && SHORT_SCALES && !BIASES) return times(codes, bytes_of(bits_of(s), 0, 0x3232));
    float low = value(low_of(codes), s, b), high = value(high_of(codes), s, b);
    return XS == 0 ? shorts(low, high) : halves(low, high);
}

// Reading ---------------------------------------------------------------------------------------------------------------------

// Four words of a row, and those of the low plane that belong to them: four, or as many as there are.
struct Part { u32x4 words[LOW ? 2 : 1]; };

constexpr u32 SIZE = SCALES == 0 || SCALES == 4 ? 2 : SCALES == 3 ? 4 : 1;  // bytes of a scale
constexpr u32 BIAS_SIZE = BIASES == 4 ? 4 : 2;  // of a bias

template <u32 size> DEVICE u32 raw(const u8 *numbers, u32 at) {
    return size == 4 ? ((const u32 *)numbers)[at] : size == 2 ? ((const u16 *)numbers)[at] : numbers[at];
}

DEVICE u32 raw_scale(const u8 *scales, u32 at) { return raw<SIZE>(scales, at); }

DEVICE float scale_of(u32 s, float tensor) {
#if SCALES == 0
    return as_float(s << 16);
#elif SCALES == 1
    return as_float(s << 23);
#elif SCALES == 3
    return as_float(s);
#elif SCALES == 4
    return of_f16(s);
#elif SCALES == 5  // 2^-127 is subnormal, and the last code is no number
    return as_float(s == 0 ? 0x400000 : s == 255 ? 0x7FC00000 : s << 23);
#else  // as a float16, whose exponents have a bias that is 8 more
    float block = of_f16(s << 8 & 0x8000 | s << 7 & 0x3F80) * 256.0f;
    return SCALES == 7 ? quotient(block, tensor) : product(block, tensor);
#endif
}

DEVICE float bias_of(u32 b) { return BIASES == 1 ? as_float(b << 16) : BIASES == 5 ? of_f16(b) : as_float(b); }

// Begins to copy four words, from `first` on of a row whose high plane has `count`, and those of the low plane that belong to them.
DEVICE void fetch(Part *to, const u32 *words, const u32 *lows, u32 first, u32 count) {
#if SAFE
    u32 *all = (u32 *)to->words;
    for (u32 j = 0; j < 4; j++) all[j] = first + j < count ? words[j] : 0;
    for (u32 j = 0; j < TOGETHER && LOW; j++) all[4 + j] = first + j * WORDS / (LOW ? LOWS : 1) < count ? lows[j] : 0;
#else
    if (!WHOLE && first >= count) return;
    copy<16>(to->words, words);
#if LOW
    copy<4 * TOGETHER>(to->words + 1, lows);
#endif
#endif
}

// The codes of four words, the first of which has number `first` modulo 16 in its row.
DEVICE Four joined(const Part &f, u32 first) {
    Four d;
    const u32x4 w = f.words[0];
    u32 words[4] = {w.x, w.y, w.z, w.w};
#if LOW
    const u32x4 l = f.words[1];
    u32 lows[4] = {l.x, l.y, l.z, l.w};
#endif
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
#if LOW
        constexpr u32 mask = 0xFFFFFFFFu / ((1u << 2 * HIGH) - 1) * ((1u << LOW) - 1);  // the low bits of every 2 HIGH
        u32 below = lows[WORDS >= 4 ? j % LOWS % 4 : j / WORDS * LOWS + j % WORDS % LOWS];
        below >>= (first + j) % WORDS / LOWS * (2 * LOW);
        d.words[j] = words[j] << LOW & ~mask | below & mask;
        d.odds[j] = words[j] >> (HIGH - LOW) & ~mask | below >> LOW & mask;
#else
        d.words[j] = words[j], d.odds[j] = 0;
#endif
    }
    return d;
}

#if XS != 2
// The first of the eight columns that are read at once, `load` of PAIRS. They are eight neighbours: those of pair `load` of four
// words; or, where units have four words or fewer, those of several pairs of a word.
DEVICE u32 column_of(u32 first, u32 load) {
    if (WORDS > 4) return first / WORDS * UNIT + 2 * WORDS * load + 2 * (first % WORDS);
    return first * (32 / HIGH) + 8 * load;
}

// Of those loads, and which of four, that of pair k of word j.
DEVICE u32 load_of(u32 k, u32 j) { return WORDS > 4 ? k : (j / WORDS * WORDS * PAIRS + k * WORDS + j % WORDS) / 4; }
DEVICE u32 part_of(u32 k, u32 j) { return WORDS > 4 ? j : (j / WORDS * WORDS * PAIRS + k * WORDS + j % WORDS) % 4; }

// Eight columns of x, the first of which is number `column` of its row.
DEVICE void eight(u32 *pairs, const u16 *x, u32 column, u32 inputs) {
#if SAFE
    for (int j = 0; j < 4; j++, column += 2, x += 2) {
        u32 even = column < inputs ? x[0] : 0, odd = column + 1 < inputs ? x[1] : 0;
        pairs[j] = even | odd << 16;
    }
#else
    u32x4 all = {0, 0, 0, 0};
    if (WHOLE || column < inputs) all = *(const u32x4 *)x;
    pairs[0] = all.x, pairs[1] = all.y, pairs[2] = all.z, pairs[3] = all.w;
#endif
}

// Registers 4 q to 4 q + 3 of the second factor of `mma`: for word j and code i, number j PAIRS + i.
DEVICE void registers(u32 *d, u32 loads[PAIRS][4], u32 q) {
#pragma unroll
    for (u32 e = 0; e < 4; e += 2) {
        u32 j = (4 * q + e) / PAIRS, p = (4 * q + e) % PAIRS / 2, k = p + PAIRS / 2;
        u32 one = loads[load_of(p, j)][part_of(p, j)], two = loads[load_of(k, j)][part_of(k, j)];
        d[e] = bytes_of(one, two, 0x5410), d[e + 1] = bytes_of(one, two, 0x7632);
    }
}

#endif

DEVICE void store(void *out, u64 at, float f) {
#if XS == 0
    ((u16 *)out)[at] = rounded_bf16(f);
#elif XS == 1
    ((u16 *)out)[at] = rounded_f16(f);
#else
    ((float *)out)[at] = f;
#endif
}

DEVICE float biased(const void *bias, u64 at) {
#if XS == 0
    return as_float((u32)((const u16 *)bias)[at] << 16);
#elif XS == 1
    return of_f16(((const u16 *)bias)[at]);
#else
    return ((const float *)bias)[at];
#endif
}
