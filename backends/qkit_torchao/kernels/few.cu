// One or two rows of bfloat16 x times packed codes, see `codes.cuh`. `cuda_words` launches this, `nvrtc` compiles it.
//
// The count of instructions limits one row, so codes are multiplied before their scales. `mma` sums over the codes of four lanes, which
// have groups of their own; but of its eight columns, x needs one. So lane t of those has columns 2 t and 2 t + 1, where all
// other lanes have zeros: they sum the codes of its group, times x. Those are two rows of x, or two groups of four words.
// Integers enter as 128 + code, without a subtraction, those of 8 bits as code - 128; a row of ones finds the sum of x, which takes
// 128 and zero points away, and by which biases are multiplied.
//
// Constants beside those of `codes.cuh`, XS being 0 and EIGHTS 1:
//   BRINGS: whether weights are brought to the second cache while the predecessor in the stream still runs.
//   KEEPS: whether a program keeps x in shared memory.

#include "codes.cuh"

constexpr bool SHIFTED = ELEMENT == 0 && (HIGH != 8 || ZEROS || BIASES);  // whether integers have 128 more or less
constexpr u32 ONE = 0x3F803F80;
constexpr u32 ZEROES = 32;  // eights of columns

// Codes i and i + 16 / HIGH as bfloat16.
DEVICE u32 operand(u32 word, u32 odds, u32 i, u32 zero) {
#if ELEMENT == 0 && HIGH != 8
    u32 codes = LOW ? turned(i % 2 ? odds : word, i / 2 * 2 * HIGH) : turned(word, HIGH * i);
    return masked(codes, ((1u << BITS) - 1) * 0x10001, 0x43004300);
#elif ELEMENT == 0
    return less_128(turned(word, 8 * i));
#else
    return number(word, odds, i, zero);
#endif
}

// The number of which the sum of x takes away as many times, for an integer with a zero point.
DEVICE float shift_of(u32 zero) { return HIGH == 8 ? (float)zero - 128.0f : as_float(0x43000000 | zero << 16); }

// x [count, inputs] times codes [outputs, stride] -> out [count, outputs]; with `experts`, row blockIdx.y by the codes of its own.
// Two rows without `experts` only where units have four words or more. Arguments as those of `multiply`. Dynamic shared memory
// holds x, in whole blocks, for KEEPS.
ENTRY multiply_few(
    const u16 *x, const u32 *codes, const u8 *scales, const u8 *zeros, const float *power, const u8 *biases, const void *bias,
    void *out, const i64 *experts, u32 outputs, u32 inputs, u32 count, u32 words, u32 stride, u32 groups, u32 powers
) {
    __shared__ float sums[WARPS][8 * ROWS][2];
#if KEEPS
    SHARED(kept);
#endif
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, column = g % 2;
    u32 begin = blockIdx.x * (8 * ROWS), rows = experts ? 1 : count, blocks = (words + 15) / 16, first = 16 * warp + 4 * t;
    let_next_begin();
#if !SAFE && BRINGS  // weights, which no kernel before this one is likely to have written
    if (!experts && threadIdx.x < 8 * ROWS && begin + threadIdx.x < outputs) {
        u64 row = begin + threadIdx.x;
        bring(codes + row * stride, stride * 4);
        if (groups * SIZE % 16 == 0 && (u64)scales % 16 == 0) bring(scales + row * groups * SIZE, groups * SIZE);
    }
#endif
    await_previous();
    u64 skipped = experts ? blockIdx.y : 0, above = experts ? experts[skipped] * outputs : 0;
    float tensor = power ? power[experts && powers ? experts[skipped] : 0] : 1.0f;
    const u32 *high[ROWS], *low[ROWS];
    const u8 *scale[ROWS], *offset[ROWS], *added[ROWS];
    Part next[ROWS];
    u32 factor[ROWS][SCALED], off[ROWS][SCALED], more[ROWS][SCALED];
    // Begins to read four words of each row, from number `first` on, with their scales, zero points and biases.
    auto begin_to_read = [&]() {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) fetch(next + r, high[r], low[r], first, words);
#pragma unroll
        for (u32 e = 0; e < SCALED; e++) {
            u32 group = RATIO ? (first / WORDS + e) / (RATIO ? RATIO : 1) : 0;
            if (RATIO && !WHOLE && group >= groups) group = 0;
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                factor[r][e] = raw_scale(scale[r], group);
                if (ZEROS) off[r][e] = offset[r][group];
                if (BIASES) more[r][e] = raw<BIAS_SIZE>(added[r], group);
            }
        }
    };
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 o = begin + 8 * r + g;
        u64 row = above + (o < outputs ? o : outputs - 1);
        high[r] = codes + row * stride + first;
        low[r] = codes + row * stride + words + first / WORDS * LOWS + (LOWS >= 4 ? first % (LOW ? LOWS : 1) : 0);
        scale[r] = scales + row * groups * SIZE, offset[r] = zeros + row * groups, added[r] = biases + row * groups * BIAS_SIZE;
    }
    if (warp < blocks) begin_to_read();
    // Lanes that fill columns of `mma`: with the first half of their loads, and with the second.
    const bool fills = g / 2 == t, one = fills && (SCALED == 2 ? column == 0 : column < rows), two = SCALED == 2 ? fills && column : one;
    u32 from = column_of(first, 0);
#if KEEPS
    u32 eights = blocks * (64 / HIGH);  // of columns, in whole blocks; what precedes them is for lanes that have zeros
    if (threadIdx.x < ZEROES) kept[threadIdx.x] = u32x4{0, 0, 0, 0};
    for (u32 at = threadIdx.x; at < eights * rows; at += 32 * WARPS) {
        u32 n = at / eights, c = at % eights * 8;
        eight((u32 *)(kept + ZEROES + at), x + (skipped + n) * inputs + c, c, inputs);
    }
    __syncthreads();
    const u32x4 *mine = kept + ZEROES + (SCALED == 2 ? 0 : column * eights) + from / 8, *halves_of_x[2] = {one ? mine : kept, two ? mine : kept};
#else
    const u16 *mine = x + (skipped + (SCALED == 2 || !one ? 0 : column)) * inputs + from;
#endif
    float total[ROWS][2] = {};
    for (u32 block = warp; block < blocks; block += WARPS) {
        u32 loads[PAIRS][4];
#pragma unroll
        for (u32 p = 0; p < PAIRS; p++) {
            const u32 second = p / (PAIRS / 2), later = column_of(0, p);  // than the column of `from`
#if KEEPS
            *(u32x4 *)loads[p] = halves_of_x[second][later / 8];
#else
            *(u32x4 *)loads[p] = u32x4{0, 0, 0, 0};
            if (second ? two : one) eight(loads[p], mine + later, from + later, inputs);
#endif
        }
        Four now[ROWS];
        float s[ROWS][SCALED], bias_of_group[ROWS][SCALED];
        u32 zero[ROWS][SCALED];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            now[r] = joined(next[r], 4 * t);
            high[r] += STEP, low[r] += STEP * LOW / HIGH;
#pragma unroll
            for (u32 e = 0; e < SCALED; e++) {
                s[r][e] = scale_of(factor[r][e], tensor);
                bias_of_group[r][e] = BIASES ? bias_of(more[r][e]) : 0;
                zero[r][e] = ZEROS ? off[r][e] : MIDDLE;
            }
        }
        first += STEP, from += STEP * (32 / HIGH);
        if (block + WARPS < blocks) begin_to_read();
#if KEEPS
        halves_of_x[0] += one ? STEP * (32 / HIGH) / 8 : 0, halves_of_x[1] += two ? STEP * (32 / HIGH) / 8 : 0;
#else
        mine += STEP * (32 / HIGH);
#endif
        float c[TILES][4] = {}, x_sums[4] = {};
#pragma unroll
        for (u32 q = 0; q < PAIRS; q++) {
            u32 b[4], ones[4] = {ONE, ONE, ONE, ONE};
            registers(b, loads, q);
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                if (SHIFTED || BIASES) mma(x_sums, ones, b[2 * half], b[2 * half + 1]);
#pragma unroll
                for (u32 m = 0; m < TILES; m++) {
                    u32 a[4];
#pragma unroll
                    for (u32 e = 0; e < 4; e++) {
                        u32 r = 2 * m + e % 2, at = 4 * q + 2 * half + e / 2, j = at / PAIRS;
                        a[e] = operand(now[r].words[j], now[r].odds[j], at % PAIRS, zero_of(zero[r][WORDS < 4 ? j / WORDS : 0]));
                    }
                    mma(c[m], a, b[2 * half], b[2 * half + 1]);
                }
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                float sum = c[r / 2][r % 2 * 2 + e];
                u32 u = SCALED == 2 ? e : 0;
                if (SHIFTED) sum -= shift_of(zero[r][u]) * x_sums[e];
                total[r][e] += s[r][u] * sum;
                if (BIASES) total[r][e] += bias_of_group[r][u] * x_sums[e];
            }
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
#pragma unroll
        for (u32 e = 0; e < 2; e++) {
            float f = SCALED == 2 ? (e ? 0 : total[r][0] + total[r][1]) : total[r][e];
            f += from_lane(f, 1);
            f += from_lane(f, 2);
            if (t == 0) sums[warp][8 * r + g][e] = f;
        }
    __syncthreads();
    for (u32 at = threadIdx.x; at < 8 * ROWS * rows; at += 32 * WARPS) {
        u32 o = at % (8 * ROWS), n = at / (8 * ROWS);
        if (begin + o >= outputs) continue;
        float f = 0;
        for (u32 w = 0; w < WARPS; w++) f += sums[w][o][n];
        if (bias) f += biased(bias, above + begin + o);
        store(out, (skipped + n) * outputs + begin + o, f);
    }
}
