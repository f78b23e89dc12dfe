// Rows of x times packed codes, see `codes.cuh`. `cuda_words` launches this, `nvrtc` compiles it.
//
// Codes become values of the weight: times their scales, plus their biases, and rounded as those are.

#include "codes.cuh"

#if XS != 2
// Rows of x as registers of lanes: by 8 EIGHTS rows, block of words, q, eight rows, and lane. For EIGHTS above 1.
ENTRY arrange(const u16 *x, u32x4 *out, u32 inputs, u32 count, u32 words, u32 all) {
    u32 at = blockIdx.x * (32 * WARPS) + threadIdx.x;
    if (at >= all) return;
    u32 lane = at % 32, n = at / 32 % EIGHTS, above = at / (32 * EIGHTS);
    u32 blocks = (words + 15) / 16, first = above % blocks * 16 + lane % 4 * 4, row = (above / blocks * EIGHTS + n) * 8 + lane / 4;
    u32 loads[PAIRS][4] = {}, d[4];
    if (row < count && first < words)
#pragma unroll
        for (u32 k = 0; k < PAIRS; k++) eight(loads[k], x + (u64)row * inputs + column_of(first, k), column_of(first, k), inputs);
#pragma unroll
    for (u32 q = 0; q < PAIRS; q++) {
        registers(d, loads, q);
        out[((u64)above * PAIRS + q) * (32 * EIGHTS) + n * 32 + lane] = u32x4{d[0], d[1], d[2], d[3]};
    }
}
#endif

// x [count, inputs], arranged for EIGHTS above 1, times codes [outputs, stride] -> out [count, outputs]; with
// `experts`, row blockIdx.y by the codes of its own. `words`: of the high plane, a row. `groups`: scales of a row. `powers`: whether
// experts have scales of their own beside those. `power`, `bias`, `experts`: may be null.
ENTRY multiply(
    const void *x, const u32 *codes, const u8 *scales, const u8 *zeros, const float *power, const u8 *biases, const void *bias,
    void *out, const i64 *experts, u32 outputs, u32 inputs, u32 count, u32 words, u32 stride, u32 groups, u32 powers
) {
    constexpr int parts = EIGHTS == 1 ? 16 : WARPS * STAGES * ROWS * 32 * sizeof(Part), totals = WARPS * 8 * ROWS * WIDE * sizeof(float);
    __shared__ u32x4 memory[(parts > totals ? parts : totals) / 16];
#if EIGHTS == 1  // registers wait for one copy; more rows leave none, and copies lie in shared memory, several on their way
    Part next[ROWS];
#define COPY(stage, r) next[r]
#else
    Part(*copies)[ROWS][32] = (Part(*)[ROWS][32])memory + threadIdx.x / 32 * STAGES;
#define COPY(stage, r) copies[stage][r][lane]
#endif
    let_next_begin();
    await_previous();
    float(*sums)[8 * ROWS][WIDE] = (float(*)[8 * ROWS][WIDE])memory;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 begin = blockIdx.x * (8 * ROWS), rows = count, blocks = (words + 15) / 16, first = 16 * warp + 4 * t;
    u64 above = 0, skipped = (u64)blockIdx.y * WIDE;  // outputs of experts before this one, and rows of x before these
    if (experts) {
        skipped = blockIdx.y, rows = 1;
        above = experts[skipped] * outputs;
    } else {
        rows = count - (u32)skipped < WIDE ? count - (u32)skipped : WIDE;
    }
    float tensor = power ? power[experts && powers ? experts[skipped] : 0] : 1.0f;
    const u32 *high[ROWS], *low[ROWS];
    const u8 *scale[ROWS], *offset[ROWS], *added[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 o = begin + 8 * r + g;
        u64 row = above + (o < outputs ? o : outputs - 1);
        high[r] = codes + row * stride + first;
        low[r] = codes + row * stride + words + first / WORDS * LOWS + (LOWS >= 4 ? first % (LOW ? LOWS : 1) : 0);
        scale[r] = scales + row * groups * SIZE, offset[r] = zeros + row * groups, added[r] = biases + row * groups * BIAS_SIZE;
    }
#if XS == 2
    float total[ROWS][WIDE] = {};
#else
    float c[TILES][EIGHTS][4] = {};
#endif
#pragma unroll
    for (u32 stage = 0; stage < STAGES - 1; stage++) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++)
            if (WHOLE ? warp + stage * WARPS < blocks : true)
                fetch(&COPY(stage, r), high[r] + stage * STEP, low[r] + stage * (STEP * LOW / HIGH), first + stage * STEP, words);
        close_copies();
    }
    u32 stage = 0;
    for (u32 block = warp; block < blocks; block += WARPS, first += STEP) {
        await_copies<STAGES - 2>();
        Four now[ROWS];
        float s[ROWS][SCALED], b[ROWS][SCALED];
        u32 zero[ROWS][SCALED];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            now[r] = joined(COPY(stage, r), 4 * t);
#pragma unroll
            for (u32 e = 0; e < SCALED; e++) {
                u32 at = RATIO && (!SAFE || first + e * WORDS < words) ? (first / WORDS + e) / (RATIO ? RATIO : 1) : 0;
                if (!WHOLE && !SAFE && first >= words) at = 0;
                s[r][e] = scale_of(raw_scale(scale[r], at), tensor);
                b[r][e] = BIASES ? bias_of(raw<BIAS_SIZE>(added[r], at)) : 0;
                zero[r][e] = zero_of(ZEROS ? offset[r][at] : MIDDLE);
            }
        }
        u32 free = stage ? stage - 1 : STAGES - 1;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            if (WHOLE ? block + (STAGES - 1) * WARPS < blocks : true)
                fetch(
                    &COPY(free, r), high[r] + (STAGES - 1) * STEP, low[r] + (STAGES - 1) * (STEP * LOW / HIGH),
                    first + (STAGES - 1) * STEP, words
                );
            high[r] += STEP, low[r] += STEP * LOW / HIGH;
        }
        close_copies();
        stage = stage + 1 < STAGES ? stage + 1 : 0;
#if XS == 2
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 word = first + j, e = WORDS < 4 ? j / WORDS : 0;
            u32 start = word / WORDS * UNIT + 2 * (word % WORDS);
#pragma unroll
            for (u32 i = 0; i < PAIRS; i++) {
                u32 both[ROWS];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) both[r] = number(now[r].words[j], now[r].odds[j], i, zero[r][e]);
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    u32 code = i + half * PAIRS, column = start + 2 * WORDS * (code / 2) + code % 2;
                    for (u32 n = 0; n < rows; n++) {
                        float f = column < inputs ? ((const float *)x)[(skipped + n) * inputs + column] : 0;
#pragma unroll
                        for (u32 r = 0; r < ROWS; r++)
                            total[r][n] += value(half ? high_of(both[r]) : low_of(both[r]), s[r][e], b[r][e]) * f;
                    }
                }
            }
        }
#else
#if EIGHTS == 1
        u32 loads[PAIRS][4];
        const u16 *from = (const u16 *)x + (skipped + (g < rows ? g : rows - 1)) * inputs;
#pragma unroll
        for (u32 k = 0; k < PAIRS; k++) eight(loads[k], from + column_of(first, k), column_of(first, k), first < words ? inputs : 0);
#else
        const u32x4 *from = (const u32x4 *)x + ((u64)blockIdx.y * blocks + block) * (PAIRS * EIGHTS * 32) + lane;
#endif
#pragma unroll
        for (u32 q = 0; q < PAIRS; q++) {
            u32 a[TILES][2][4];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) {
                    u32 j = (4 * q + e) / PAIRS, i = (4 * q + e) % PAIRS, u = WORDS < 4 ? j / WORDS : 0;
                    u32 exact = number(now[r].words[j], now[r].odds[j], i, zero[r][u]);
                    a[r / 2][e / 2][e % 2 * 2 + r % 2] = scaled(exact, s[r][u], b[r][u]);
                }
#pragma unroll
            for (u32 n = 0; n < EIGHTS; n++) {
                u32 d[4];
#if EIGHTS == 1
                registers(d, loads, q);
#else
                u32x4 all = from[(q * EIGHTS + n) * 32];
                d[0] = all.x, d[1] = all.y, d[2] = all.z, d[3] = all.w;
#endif
#pragma unroll
                for (u32 m = 0; m < TILES; m++) mma(c[m][n], a[m][0], d[0], d[1]), mma(c[m][n], a[m][1], d[2], d[3]);
            }
        }
#endif
    }
    __syncthreads();
#if XS == 2
    for (u32 r = 0; r < ROWS; r++)
        for (u32 n = 0; n < WIDE; n++) {
            float f = total[r][n] + from_lane(total[r][n], 1);
            f += from_lane(f, 2);
            if (t == 0) sums[warp][8 * r + g][n] = f;
        }
#else
#pragma unroll
    for (u32 m = 0; m < TILES; m++)
#pragma unroll
        for (u32 n = 0; n < EIGHTS; n++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) sums[warp][16 * m + g + e / 2 * 8][8 * n + 2 * t + e % 2] = c[m][n][e];
#endif
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
