"""The C++ source of the kernels that fake-quantize in one pass on MLX's CUDA build. Strings only; `cuda` launches them.

A few macros stand for CUDA's operations, so that an ordinary C++ compiler takes the source too. The tests compile it so, and
compare it with `qkit.reference` on every grid. There is no Metal version, since no Metal machine was available for tests.
"""

from qkit import element as constants
from qkit.element import STEP
from qkit.grid import Grid

#: The elements and scale rules of the kernels, see `declares`; rules by their number in `ARITHMETIC`.
INTEGER_BITS = range(2, 9)
FLOATS = ("e2m1", "e4m3", "e5m2")
RULES = {"signed": 0, "absmax": 1, "midmax": 1, "minmax": 2, "rceil": 3, "even": 4, "floor": 5, "nvfp4": 6}
BIT_RULES = ("even", "floor")  #: rules without a step: they read the exponent's bits

#: Added to a number below 2^22 and subtracted again, it leaves the nearest whole number, ties to even.
SHIFT = 1.5 * 2.0**23
FINE = 1.5 * 2.0**9  #: the same for a number below 2^8 and multiples of 2^-14

#: CUDA's operations for the macros. No compiler may contract their roundings.
CUDA = """
#define QKIT_INLINE __device__ __forceinline__
#define QKIT_BITS __float_as_uint
#define QKIT_FLOAT __uint_as_float
#define QKIT_ADD __fadd_rn
#define QKIT_MULTIPLY __fmul_rn
#define QKIT_FMA __fmaf_rn
#define QKIT_DIVIDE __fdiv_rn
#define QKIT_ROUND rintf
#define QKIT_LEAST fminf
#define QKIT_MOST fmaxf
"""

#: One group: `see` every element, then compute its `step_of`, then the `value` of every element. R2 to R9 of numerics.md.
ARITHMETIC = """
struct Step { float s, inverse, zero; };

QKIT_INLINE float magnitude(float x) { return QKIT_FLOAT(QKIT_BITS(x) & 0x7FFFFFFFu); }
QKIT_INLINE float least(float x, float y) { return QKIT_LEAST(x, y); }
QKIT_INLINE float most(float x, float y) { return QKIT_MOST(x, y); }
QKIT_INLINE float power(int code) { return QKIT_FLOAT((unsigned)code << 23); }
QKIT_INLINE int scale_code(int code) { return code < MIN_CODE ? MIN_CODE : code > MAX_CODE ? MAX_CODE : code; }

QKIT_INLINE int ceil_exponent(float x) {
  unsigned u = QKIT_BITS(x);
  return (int)(u >> 23) + ((u & 0x7FFFFFu) != 0);
}

QKIT_INLINE float round_to_bfloat16(float x) {
  unsigned u = QKIT_BITS(x);
  return QKIT_FLOAT((u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u);
}

// x to a small float: adding and subtracting 1.5 * 2^k leaves multiples of the distance between neighbours
QKIT_INLINE float small_float(float x, int mantissa, int min_exponent) {
  const unsigned smallest = (unsigned)(127 + min_exponent) << 23;
  unsigned binade = QKIT_BITS(x) & 0x7F800000u;
  binade = binade > smallest ? binade : smallest;
  const float coarse = QKIT_FLOAT(binade + ((unsigned)(23 - mantissa) << 23) + 0x400000u);
  return QKIT_ADD(QKIT_ADD(x, coarse), -coarse);
}

// lift, plus a number that rounds as x / s does to integers and to floats of few bits, below 256. The quotient of a narrow x
// (16 bits) and s (8 bits) is a tie of such a rounding, or over 2^-15 away from all ties. A first rounding to multiples of 2^-14
// therefore undoes the error of the reciprocal. For a wide x the exact remainder corrects the product (Markstein, 1990).
QKIT_INLINE float lifted_quotient(float x, Step step, float lift, bool narrow) {
  if (narrow) return QKIT_ADD(QKIT_FMA(x, step.inverse, FINE), lift - FINE);
  float y = QKIT_MULTIPLY(x, step.inverse);
  y = QKIT_FMA(QKIT_FMA(-y, step.s, x), step.inverse, y);
  return QKIT_ADD(y, lift);
}

// Bit patterns order magnitudes, and a NaN above all. Under `signed` the last bit prefers the positive of two equal magnitudes.
QKIT_INLINE void see(unsigned& high, unsigned& low, float x) {
  unsigned u = QKIT_BITS(x), m = u & 0x7FFFFFFFu;
  if (RULE == 0) m = (u << 1) | (~u >> 31);
  if (RULE == 2 && (u >> 31)) low = m > low ? m : low;
  else high = m > high ? m : high;
}

QKIT_INLINE Step step_of(unsigned high, unsigned low, float tensor_peak) {
  const unsigned infinite = 0x7F800000u;
  const float nan = QKIT_FLOAT(0x7FC00000u);
  Step step = {0.0f, 0.0f, 0.0f};
  float peak = QKIT_FLOAT(high);
  bool poisoned = high >= infinite;
  if (RULE == 0) {
    peak = QKIT_FLOAT((high >> 1) | ((high & 1u) ? 0u : 0x80000000u));
    poisoned = (high >> 1) >= infinite;
    float s = round_to_bfloat16(QKIT_MULTIPLY(peak, STEP));
    step.s = magnitude(s) < MIN_SCALE ? (peak > 0.0f ? -MIN_SCALE : MIN_SCALE) : s;
  } else if (RULE == 1) {
    step.s = most(round_to_bfloat16(QKIT_MULTIPLY(peak, STEP)), MIN_SCALE);
  } else if (RULE == 2) {
    float span = QKIT_ADD(peak, QKIT_FLOAT(low));
    poisoned = !(span < QKIT_FLOAT(infinite));
    step.s = most(round_to_bfloat16(QKIT_MULTIPLY(span, STEP)), MIN_SCALE);
    step.zero = least(QKIT_ROUND(QKIT_DIVIDE(QKIT_FLOAT(low), step.s)), HIGHEST);
  } else if (RULE == 6) {
    int code = scale_code(ceil_exponent(QKIT_MULTIPLY(tensor_peak, TENSOR_STEP)));
    float block = QKIT_MULTIPLY(QKIT_MULTIPLY(peak, power(254 - code)), STEP);
    block = small_float(most(least(block, 448.0f), MIN_BLOCK_SCALE), 3, -6);
    step.s = QKIT_MULTIPLY(block, power(code));
    step.inverse = QKIT_DIVIDE(1.0f, step.s);
    poisoned = !(tensor_peak < QKIT_FLOAT(infinite));
  } else {
    int code = (int)(high >> 23) - MAX_EXPONENT;
    if (RULE == 3) code = ceil_exponent(QKIT_MULTIPLY(peak, STEP));
    if (RULE == 4) code = (int)((high + (1u << (22 - MANTISSA))) >> 23) - MAX_EXPONENT;
    code = scale_code(code);
    step.s = power(code);
    step.inverse = power(254 - code);
  }
  if (RULE < 3) step.inverse = QKIT_DIVIDE(1.0f, step.s);
  if (poisoned) step.s = nan;
  return step;
}

// Clips only where a rule's steps leave something to clip.
QKIT_INLINE float value(float x, Step step, bool narrow) {
  if (RULE < 3) {
    float q = least(lifted_quotient(x, step, SHIFT, narrow), SHIFT + HIGHEST - step.zero);
    if (RULE == 2) q = most(q, SHIFT - step.zero);
    return QKIT_MULTIPLY(QKIT_ADD(q, -SHIFT), step.s);
  }
  float y = RULE == 6 ? lifted_quotient(x, step, 0.0f, narrow) : QKIT_MULTIPLY(x, step.inverse);
  if (RULE != 3) y = most(least(y, HIGHEST), LOWEST);
  return QKIT_MULTIPLY(small_float(y, MANTISSA, MIN_EXPONENT), step.s);
}
"""

#: Loads of 16 bytes, if the address is a multiple of 16.
VECTORS = """
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector { T at[V]; };

template <typename T, int V>
QKIT_INLINE Vector<T, V> load(const T* from) {
  if (reinterpret_cast<size_t>(from) % (sizeof(T) * V) == 0) return *reinterpret_cast<const Vector<T, V>*>(from);
  Vector<T, V> x;
  for (int v = 0; v < V; v++) x.at[v] = from[v];
  return x;
}

QKIT_INLINE void reduce(unsigned& high, unsigned& low, int lanes) {
  for (int offset = lanes / 2; offset; offset >>= 1) {
    unsigned other = __shfl_xor_sync(0xFFFFFFFFu, high, offset);
    high = other > high ? other : high;
    if (RULE != 2) continue;
    other = __shfl_xor_sync(0xFFFFFFFFu, low, offset);
    low = other > low ? other : low;
  }
}
"""

#: L neighbouring threads of a warp share a group: K vectors of V elements each. Reads the array once.
SHORT = """
  const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, groups = w_shape[0] / G;
  const bool inside = thread / L < groups;
  const size_t group = inside ? thread / L : groups - 1, lane = thread % L;
  const T* from = w + group * G + lane * V;
  T* to = out + group * G + lane * V;
  NAME::Vector<T, V> x[K];
  unsigned high = 0, low = 0;
  #pragma unroll
  for (int k = 0; k < K; k++) {
    x[k] = NAME::load<T, V>(from + k * L * V);
    #pragma unroll
    for (int v = 0; v < V; v++) NAME::see(high, low, static_cast<float>(x[k].at[v]));
  }
  NAME::reduce(high, low, L);
  const NAME::Step step = NAME::step_of(high, low, PEAK);
  if (!inside) return;
  #pragma unroll
  for (int k = 0; k < K; k++) {
    #pragma unroll
    for (int v = 0; v < V; v++) x[k].at[v] = static_cast<T>(NAME::value(static_cast<float>(x[k].at[v]), step, sizeof(T) == 2));
    *reinterpret_cast<NAME::Vector<T, V>*>(to + k * L * V) = x[k];
  }
"""

#: A block of L threads shares a group, and reads it twice, the second time from the cache.
LONG = """
  __shared__ unsigned highs[32], lows[32];
  const T* from = w + size_t(blockIdx.x) * G;
  T* to = out + size_t(blockIdx.x) * G;
  unsigned high = 0, low = 0;
  for (int i = threadIdx.x * V; i < G; i += L * V) {
    const NAME::Vector<T, V> x = NAME::load<T, V>(from + i);
    for (int v = 0; v < V; v++) NAME::see(high, low, static_cast<float>(x.at[v]));
  }
  NAME::reduce(high, low, 32);
  if (threadIdx.x % 32 == 0) { highs[threadIdx.x / 32] = high; lows[threadIdx.x / 32] = low; }
  __syncthreads();
  high = threadIdx.x % 32 < L / 32 ? highs[threadIdx.x % 32] : 0;
  low = threadIdx.x % 32 < L / 32 ? lows[threadIdx.x % 32] : 0;
  NAME::reduce(high, low, 32);
  const NAME::Step step = NAME::step_of(high, low, PEAK);
  for (int i = threadIdx.x * V; i < G; i += L * V) {
    NAME::Vector<T, V> x = NAME::load<T, V>(from + i);
    for (int v = 0; v < V; v++) x.at[v] = static_cast<T>(NAME::value(static_cast<float>(x.at[v]), step, sizeof(T) == 2));
    *reinterpret_cast<NAME::Vector<T, V>*>(to + i) = x;
  }
"""


def declares(grid: Grid) -> bool:
    """Whether the kernels compute `grid`: one of their elements and rules, and groups that do not span the tensor."""
    element = grid.element
    known = element.bits in INTEGER_BITS if element.kind == "integer" else element.name in FLOATS
    return known and grid.scale in RULES and grid.group != "tensor"


def name(grid: Grid) -> str:
    """The identifier of `grid`: its namespace in the source."""
    return f"qkit_{grid}".replace("-", "_")


def arithmetic(grid: Grid) -> str:
    """`see`, `step_of` and `value` of `grid`, in the namespace `name(grid)`; needs the macros of `CUDA` before it."""
    return f"namespace {name(grid)} {{\n{_constants(grid)}{ARITHMETIC}}}\n"


def header(grid: Grid) -> str:
    """The source that precedes the body of a kernel for `grid`."""
    return f"{CUDA}{arithmetic(grid)}namespace {name(grid)} {{{VECTORS}}}\n"


def body(grid: Grid, template: str) -> str:
    """The body, `SHORT` or `LONG`, for `grid`: inputs `w` and, for nvfp4, the tensor's `peak`; output `out`."""
    return template.replace("NAME", name(grid)).replace("PEAK", "peak[0]" if grid.scale == "nvfp4" else "0.0f")


def _constants(grid: Grid) -> str:
    element = grid.element
    low, high = (-element.largest, element.largest) if element.kind == "float" else (element.lowest, element.highest)
    if grid.scale == "minmax":
        low, high = 0, element.levels
    floats = {
        "STEP": 1.0 if grid.scale in BIT_RULES else STEP[element.name, grid.scale],
        "TENSOR_STEP": constants.NVFP4_STEP,
        "LOWEST": low,
        "HIGHEST": high,
        "MIN_SCALE": constants.MIN_SCALE,
        "MIN_BLOCK_SCALE": constants.MIN_BLOCK_SCALE,
        "SHIFT": SHIFT,
        "FINE": FINE,
    }
    integers = {
        "RULE": RULES[grid.scale],
        "MANTISSA": element.mantissa,
        "MIN_EXPONENT": element.min_exponent,
        "MAX_EXPONENT": element.max_exponent,
        "MIN_CODE": constants.MIN_SCALE_CODE,
        "MAX_CODE": constants.MAX_SCALE_CODE,
    }
    lines = [f"constexpr float {key} = {float(number).hex()}f;\n" for key, number in floats.items()]
    return "".join([*lines, *(f"constexpr int {key} = {number};\n" for key, number in integers.items())])
