// The panels of `exact_products.unit_upper`, in fp64, with the bits of the law. `cuda_fit`
// launches this, `nvrtc` compiles it.
//
// A panel has BLOCK (a macro) columns of a symmetric matrix, whose rows lie `stride` apart, from the diagonal down. The last one may
// have fewer.

#include "doubles.cuh"

constexpr u32 TALL = 4;  // rows that a program of `eliminate` changes at once, with a thread for each column

// Eliminates the panel's own columns, in one program of TALL * BLOCK threads: `before` [BLOCK, BLOCK] gets its columns as they are
// before their division.
ENTRY eliminate(double *panel, double *before, double *pivots, u32 stride, u32 count) {
    __shared__ double lines[2][BLOCK], kept[BLOCK][BLOCK + 1];
    const u32 c = threadIdx.x % BLOCK, first = threadIdx.x / BLOCK;
    double mine[BLOCK / TALL];
    for (u32 r = first; r < BLOCK; r += TALL) kept[r][c] = r < count && c < count ? panel[(u64)r * stride + c] : 0;
    __syncthreads();
    // A thread has the entries (first, c), (first + TALL, c), ... of the matrix on its side.
#pragma unroll
    for (u32 k = 0; k < BLOCK / TALL; k++) mine[k] = kept[c][first + TALL * k];
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        if (j >= count) break;
        double *const line = lines[j % 2];  // a thread that is ahead writes the other one
        if (first == j % TALL) line[c] = mine[j / TALL];
        __syncthreads();
        const double own = line[c], pivot = line[j], found = own / pivot;
        if (first == j % TALL) {
            before[j * BLOCK + c] = own;
            if (c == j) pivots[j] = pivot;
            if (c > j) kept[c][j] = found;
        }
#pragma unroll
        for (u32 k = j / TALL; k < BLOCK / TALL; k++)
            if (first + TALL * k > j) mine[k] = mine[k] - line[first + TALL * k] * found;
    }
    __syncthreads();
    for (u32 r = first; r < count; r += TALL)
        if (c < r) panel[(u64)r * stride + c] = kept[r][c];
}

// Eliminates the columns from the rows below, from number BLOCK on. LANES threads have a row, and thread number i of these its columns
// i, i + LANES and so on. left [many, 2 BLOCK], parts [2 BLOCK, many]: the halves of the product that updates the rest of the matrix.
ENTRY eliminate_below(double *panel, const double *before, const double *pivots, double *left, double *parts, u32 stride, u32 many) {
    constexpr u32 MINE = BLOCK / LANES, HERE = THREADS / LANES;  // columns of a thread, rows of a program
    __shared__ double above[BLOCK * BLOCK], kept[HERE * BLOCK];
    auto at = [&](u32 row, u32 j) -> double & { return kept[row * BLOCK + (row + j) % BLOCK]; };  // each row begins in another bank
    const u32 me = threadIdx.x, lane = me % LANES, mine = me / LANES, base = blockIdx.x * HERE, row = base + mine;
    const u32 here = many - base < HERE ? many - base : HERE;
    for (u32 i = me; i < BLOCK * BLOCK; i += THREADS) above[i] = before[i];
    panel += (u64)(BLOCK + base) * stride;
    for (u32 i = me; i < here * BLOCK; i += THREADS) at(i / BLOCK, i % BLOCK) = panel[(u64)(i / BLOCK) * stride + i % BLOCK];
    __syncthreads();
    double v[MINE];
#pragma unroll
    for (u32 k = 0; k < MINE; k++) v[k] = at(mine < here ? mine : 0, LANES * k + lane);
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        const u32 first = j / LANES;
        const double by = of_lane(v[first] / pivots[j], j % LANES);
#pragma unroll
        for (u32 k = first; k < MINE; k++) {
            const u32 r = LANES * k + lane;
            if (r == j) v[k] = by;
            if (r > j) v[k] = v[k] - above[j * BLOCK + r] * by;
        }
    }
    int most = 0, largest = 0;
#pragma unroll
    for (u32 k = 0; k < MINE; k++) {
        const int power = power_of(v[k]), by_pivot = power_of(v[k] * pivots[LANES * k + lane]);
        most = most > power ? most : power, largest = largest > by_pivot ? largest : by_pivot;
        if (mine < here) at(mine, LANES * k + lane) = v[k];
    }
    const int e = exponent_of_power(highest(most)), of_left = exponent_of_power(highest(largest));
    __syncthreads();
    for (u32 i = me; i < here * BLOCK; i += THREADS) panel[(u64)(i / BLOCK) * stride + i % BLOCK] = at(i / BLOCK, i % BLOCK);
    if (mine >= here) return;
    left += (u64)row * 2 * BLOCK, parts += row;
#pragma unroll
    for (u32 k = 0; k < MINE; k++) {
        const u32 j = LANES * k + lane;
        double top, rest;
        halve(v[k], e, top, rest);
        parts[(u64)j * many] = top, parts[(u64)(BLOCK + j) * many] = rest;
        halve(v[k] * pivots[j], of_left, left[j], left[BLOCK + j]);
    }
}

// a [rows, columns], of which rows lie `stride` apart, loses the product of the halves `left` [rows, 2 BLOCK] and `parts` [2 BLOCK, rows], of
// its first columns, below its diagonal. A program has a square of TILE, and a thread EACH by EACH numbers of it.
ENTRY take_products(double *a, const double *left, const double *parts, u32 stride, u32 rows, u32 columns) {
    constexpr u32 TILE = 64, DEEP = 16, EACH = 4, SIDE = TILE / EACH, PITCH = TILE + 2;
    alignas(16) __shared__ double highs[DEEP * PITCH], lows[DEEP * PITCH], tops[DEEP * TILE], rests[DEEP * TILE];
    const u32 me = threadIdx.x, across = me % SIDE * EACH, down = me / SIDE * EACH, row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    if (column >= row + TILE) return;
    double large[EACH][EACH] = {}, small[EACH][EACH] = {};
    for (u32 begin = 0; begin < BLOCK; begin += DEEP) {
        for (u32 i = me; i < TILE * DEEP; i += SIDE * SIDE) {
            const u32 r = i / DEEP, k = i % DEEP, j = i / TILE, c = i % TILE;
            const u64 from = (u64)(row + r) * 2 * BLOCK + begin + k, of = (u64)(begin + j) * rows + column + c;
            highs[k * PITCH + r] = row + r < rows ? left[from] : 0, lows[k * PITCH + r] = row + r < rows ? left[from + BLOCK] : 0;
            tops[i] = column + c < columns ? parts[of] : 0, rests[i] = column + c < columns ? parts[of + (u64)BLOCK * rows] : 0;
        }
        __syncthreads();
#pragma unroll 4
        for (u32 k = 0; k < DEEP; k++) {
            double high[EACH], low[EACH], top[EACH], rest[EACH];
            read<EACH>(highs + k * PITCH + down, high), read<EACH>(lows + k * PITCH + down, low);
            read<EACH>(tops + k * TILE + across, top), read<EACH>(rests + k * TILE + across, rest);
#pragma unroll
            for (u32 i = 0; i < EACH; i++)
#pragma unroll
                for (u32 j = 0; j < EACH; j++) {
                    large[i][j] = fused(high[i], top[j], large[i][j]);
                    small[i][j] = fused(low[i], top[j], fused(high[i], rest[j], small[i][j]));
                }
        }
        __syncthreads();
    }
    for (u32 i = 0; i < EACH; i++)
        for (u32 j = 0; j < EACH; j++)
            if (row + down + i < rows && column + across + j < columns) {
                double &out = a[(u64)(row + down + i) * stride + column + across + j];
                out = out - (large[i][j] + small[i][j]);
            }
}

// The digits of `below` [rows, width], of which rows lie `stride` apart: of both halves of its rows times `pivots`, `left` [3, rows,
// 2 width], the high ones first; and of those of its rows, `right` [3, rows, 2 width], the high ones last. units, sizes [rows]: what the
// high ones count.
ENTRY halve_rows(
    const double *below, const double *pivots, signed char *left, signed char *right, double *units, double *sizes, u32 stride, u32 rows,
    u32 width
) {
    const u32 lane = threadIdx.x % LANES, row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    if (row >= rows) return;
    below += (u64)row * stride, left += (u64)row * 2 * width, right += (u64)row * 2 * width;
    int most = 0, largest = 0;
    for (u32 j = lane; j < width; j += LANES) {
        const int mine = power_of(below[j]), by_pivot = power_of(below[j] * pivots[j]);
        most = most > mine ? most : mine, largest = largest > by_pivot ? largest : by_pivot;
    }
    const int e = exponent_of_power(highest(most)), of_left = exponent_of_power(highest(largest));
    const u64 plane = (u64)rows * 2 * width;
    auto write = [&](signed char *out, double number) {
        int rest = (int)number;
        for (u32 k = 0; k < 3; k++) {
            const int digit = (rest + 128 & 255) - 128;
            out[k * plane] = digit, rest = (rest - digit) >> 8;
        }
    };
    for (u32 j = lane; j < width; j += LANES) {
        double top, rest;
        halve(below[j], e, top, rest);
        write(right + j, rest * power(40 - e)), write(right + width + j, top * power(20 - e));
        halve(below[j] * pivots[j], of_left, top, rest);
        write(left + j, top * power(20 - of_left)), write(left + width + j, rest * power(40 - of_left));
    }
    if (!lane) units[row] = power(of_left - 20), sizes[row] = power(e - 20);
}
