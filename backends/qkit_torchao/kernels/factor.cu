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

// Eliminates the columns from the rows below, from number BLOCK on. left [many, 2 BLOCK], parts [3 BLOCK, many]: the halves of the
// product that updates the rest of the matrix.
ENTRY eliminate_below(double *panel, const double *before, const double *pivots, double *left, double *parts, u32 stride, u32 many) {
    __shared__ double above[BLOCK * BLOCK], kept[ROWS * BLOCK];
    const u32 me = threadIdx.x, base = blockIdx.x * ROWS, c = base + me, here = many - base < ROWS ? many - base : ROWS;
    auto at = [&](u32 row, u32 j) -> double & { return kept[row * BLOCK + (row + j) % BLOCK]; };  // each row begins in another bank
    for (u32 i = me; i < BLOCK * BLOCK; i += ROWS) above[i] = before[i];
    panel += (u64)(BLOCK + base) * stride;
    for (u32 r = 0; r < here; r++)
        for (u32 j = me; j < BLOCK; j += ROWS) at(r, j) = panel[(u64)r * stride + j];
    __syncthreads();
    double v[BLOCK], peak = 0, largest = 0;
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) v[j] = at(me < here ? me : 0, j);
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        v[j] = v[j] / pivots[j];
#pragma unroll
        for (u32 r = j + 1; r < BLOCK; r++) v[r] = v[r] - above[j * BLOCK + r] * v[j];
        if (me < here) at(me, j) = v[j];
        peak = larger(peak, fabs(v[j])), largest = larger(largest, fabs(v[j] * pivots[j]));
    }
    __syncthreads();
    for (u32 r = 0; r < here; r++)
        for (u32 j = me; j < BLOCK; j += ROWS) panel[(u64)r * stride + j] = at(r, j);
    const int e = exponent_above(peak), of_left = exponent_above(largest);
    parts += c;
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        double top, rest;
        halve(v[j], e, top, rest);
        if (me < here) parts[(u64)j * many] = parts[(u64)(2 * BLOCK + j) * many] = top, parts[(u64)(BLOCK + j) * many] = rest;
    }
    // Rows of the left side lie one after the other: each half is written through `kept`.
    left += (u64)base * 2 * BLOCK;
    for (u32 half = 0; half < 2; half++) {
        __syncthreads();
        if (me < here)
#pragma unroll
            for (u32 j = 0; j < BLOCK; j++) {
                double high, low;
                halve(v[j] * pivots[j], of_left, high, low);
                at(me, j) = half ? low : high;
            }
        __syncthreads();
        for (u32 r = 0; r < here; r++)
            for (u32 j = me; j < BLOCK; j += ROWS) left[(u64)r * 2 * BLOCK + half * BLOCK + j] = at(r, j);
    }
}

// a [rows, columns], of which rows lie `stride` apart, -= high + low, which lie one after the other.
ENTRY take_both(double *a, const double *high, const double *low, u32 stride, u32 columns) {
    const u64 row = blockIdx.y;
    a += row * stride, high += row * columns, low += row * columns;
    for (u32 i = blockIdx.x * 4 * THREADS + threadIdx.x, k = 0; k < 4 && i < columns; k++, i += THREADS)
        a[i] = a[i] - (high[i] + low[i]);
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
