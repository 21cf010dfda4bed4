// The LoRA update of a linear layer on a CPU, for a batch in which every row has its own adapter or none:
//
//     y[row, slice] += B[slot of row, slice] · (A[slot of row, slice] · x[row])
//
// The weights are read where vLLM keeps them: A as [slots, rank, in] and B as [slots, out, rank], row-major. Rows come grouped
// into blocks of one slot each, so a slot's weights are read once for all of its rows. A row's sums are taken in the same order
// whatever else is in the batch: the result of a row does not depend on its neighbours, to the last bit.
//
// Sums are kept in float32. Between A and B the values are rounded to the weights' type, as vLLM's GPU kernels do.
//
// Called through ctypes (kernels.py); the structs here and there must agree.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX512_BF16_PATH 1
#endif

namespace {

constexpr int kBlockRows = 32;  // most rows of a block (kernels.py cuts them)
constexpr int kMaxRank = 512;   // vLLM's largest
constexpr int kAhead = 2048;    // values between those in use and those being fetched: what memory delivers in its latency

struct Bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(_Float16 value) { return static_cast<float>(value); }
inline float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, _Float16& out) { out = static_cast<_Float16>(value); }
inline void narrow(float value, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

extern "C" {

// One slice of a layer (q, k or v of a fused projection; the only one of the others).
struct Slice {
  const void* a;   // [slots, rank, in]
  const void* b;   // [slots, out, rank]
  int32_t* ranks;  // [slots]: rows of A in use, 0 for an adapter that leaves this layer alone, -1 for not yet known
  int32_t out;
  int32_t y_offset;  // first column of y
};

struct Layer {
  const Slice* slices;
  int32_t n_slices;
  int32_t in;
  int32_t rank;   // of A and B; smaller adapters are padded with zeros
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16; of x, y, A and B alike
};

struct Batch {
  const int32_t* rows;    // row numbers, those of a block one after the other
  const int32_t* starts;  // [n_blocks + 1]: where each block begins in `rows`
  const int32_t* slots;   // [n_blocks]
  int32_t n_blocks;
};

}  // extern "C"

namespace {

// The rows of one block.
struct Block {
  const int32_t* rows;
  int count;
  int slot;
};

// ---- Any type, any processor: compiled for several and chosen when loaded ---------------------------------------------------

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Eight numbers side by side. GCC makes of them what the clone's processor has.
using Vector = float __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kLine = 64;  // bytes of a cache line
#define INLINE inline __attribute__((always_inline))  // into each clone

INLINE void load(const float* p, Vector& out) { std::memcpy(&out, p, sizeof out); }
INLINE void load(const _Float16* p, Vector& out) {
  _Float16 __attribute__((vector_size(16))) half;
  std::memcpy(&half, p, sizeof half);
  out = __builtin_convertvector(half, Vector);
}
INLINE void load(const Bf16* p, Vector& out) {
  uint16_t __attribute__((vector_size(16))) bits;
  std::memcpy(&bits, p, sizeof bits);
  using Wide = uint32_t __attribute__((vector_size(32)));
  const Wide wide = __builtin_convertvector(bits, Wide) << 16;
  std::memcpy(&out, &wide, sizeof out);
}

INLINE float sum_of(Vector v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

template <class T>
struct Plain {
  using Type = T;

  // t[i, j] = A[j] · x[rows[i]] for j < rank
  CLONES static void shrink(const T* x, int64_t x_stride, const Block& block, const T* a, int in, int rank, float* t,
                            int t_stride) {
    const T* rows[4];
    int i = 0;
    for (; i + 4 <= block.count; i += 4) {
      for (int m = 0; m < 4; ++m) rows[m] = x + block.rows[i + m] * x_stride;
      int j = 0;
      for (; j + 2 <= rank; j += 2) dots<4, 2>(rows, a + static_cast<int64_t>(j) * in, in, t + i * t_stride + j, t_stride);
      for (; j < rank; ++j) dots<4, 1>(rows, a + static_cast<int64_t>(j) * in, in, t + i * t_stride + j, t_stride);
    }
    for (; i < block.count; ++i) {
      rows[0] = x + block.rows[i] * x_stride;
      int j = 0;
      for (; j + 8 <= rank; j += 8) dots<1, 8>(rows, a + static_cast<int64_t>(j) * in, in, t + i * t_stride + j, t_stride);
      for (; j < rank; ++j) dots<1, 1>(rows, a + static_cast<int64_t>(j) * in, in, t + i * t_stride + j, t_stride);
    }
  }

  // y[rows[i]] += B · t[i], with B as [out, b_rank]
  CLONES static void expand(T* y, int64_t y_stride, const Block& block, const T* b, int out, int b_rank, int rank,
                            const float* t, int t_stride) {
    Vector tile[kMaxRank][2];  // sixteen outputs of B, transposed, so that outputs lie side by side
    float rounded[kBlockRows * kMaxRank];
    for (int i = 0; i < block.count; ++i)
      for (int j = 0; j < rank; ++j) {
        T narrowed;
        narrow(t[i * t_stride + j], narrowed);
        rounded[i * rank + j] = widen(narrowed);
      }
    for (int first = 0; first < out; first += 2 * kLanes) {
      const int width = std::min(2 * kLanes, out - first);
      transpose(b + static_cast<int64_t>(first) * b_rank, width, b_rank, rank, tile);
      T* targets[kBlockRows];
      for (int i = 0; i < block.count; ++i) targets[i] = y + block.rows[i] * y_stride + first;
      int i = 0;
      for (; i + 4 <= block.count; i += 4) add_tile<4>(targets + i, width, tile, rank, rounded + i * rank);
      for (; i < block.count; ++i) add_tile<1>(targets + i, width, tile, rank, rounded + i * rank);
    }
  }

 private:
  // t[i..i+M, j..j+N] = A[j..] · x[i..], with M * N sums in registers. The order of additions is part of a row's result: it
  // has to be the same for every M and N. What comes next of A is fetched meanwhile.
  template <int M, int N>
  static INLINE void dots(const T* const* x, const T* a, int in, float* t, int t_stride) {
    Vector sums[M][N] = {};
    int k = 0;
    for (; k + kLanes <= in; k += kLanes) {
      Vector weights[N];
      for (int n = 0; n < N; ++n) {
        load(a + static_cast<int64_t>(n) * in + k, weights[n]);
        __builtin_prefetch(a + static_cast<int64_t>(n + N) * in + k);
      }
      for (int m = 0; m < M; ++m) {
        Vector row;
        load(x[m] + k, row);
        for (int n = 0; n < N; ++n) sums[m][n] += row * weights[n];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        float rest = 0.f;
        for (int l = k; l < in; ++l) rest += widen(x[m][l]) * widen(a[static_cast<int64_t>(n) * in + l]);
        t[m * t_stride + n] = sum_of(sums[m][n]) + rest;
      }
  }

  // tile[j] = rank j of sixteen outputs of B; those above `width` are zero.
  static INLINE void transpose(const T* b, int width, int b_rank, int rank, Vector (*tile)[2]) {
    for (int o = 0; o < 2 * kLanes; ++o)
      for (int j = 0; j < rank; j += kLine / static_cast<int>(sizeof(T))) __builtin_prefetch(b + kAhead + o * b_rank + j);
    int j = 0;
    for (; width == 2 * kLanes && j + kLanes <= rank; j += kLanes)
      for (int half = 0; half < 2; ++half) {
        Vector rows[kLanes];
        for (int o = 0; o < kLanes; ++o) load(b + static_cast<int64_t>(half * kLanes + o) * b_rank + j, rows[o]);
        turn(rows);
        for (int l = 0; l < kLanes; ++l) tile[j + l][half] = rows[l];
      }
    for (; j < rank; ++j)
      for (int o = 0; o < 2 * kLanes; ++o)
        tile[j][o / kLanes][o % kLanes] = o < width ? widen(b[static_cast<int64_t>(o) * b_rank + j]) : 0.f;
  }

  // The sixteen outputs for M rows.
  template <int M>
  static INLINE void add_tile(T* const* y, int width, const Vector (*tile)[2], int rank, const float* t) {
    Vector sums[M][2] = {};
    for (int j = 0; j < rank; ++j)
      for (int m = 0; m < M; ++m) {
        sums[m][0] += t[m * rank + j] * tile[j][0];
        sums[m][1] += t[m * rank + j] * tile[j][1];
      }
    for (int m = 0; m < M; ++m) {
      const float* sum = reinterpret_cast<const float*>(sums[m]);
      if (width == 2 * kLanes)  // a number that the compiler knows becomes vectors
        for (int o = 0; o < 2 * kLanes; ++o) narrow(widen(y[m][o]) + sum[o], y[m][o]);
      else
        for (int o = 0; o < width; ++o) narrow(widen(y[m][o]) + sum[o], y[m][o]);
    }
  }

  // Transposes eight by eight: pairs of numbers, then pairs of pairs, then halves.
  static INLINE void turn(Vector* r) {
    Vector a[kLanes], b[kLanes];
    for (int o = 0; o < kLanes; o += 2) {
      a[o] = __builtin_shufflevector(r[o], r[o + 1], 0, 8, 2, 10, 4, 12, 6, 14);
      a[o + 1] = __builtin_shufflevector(r[o], r[o + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int o = 0; o < kLanes; o += 4)
      for (int l = 0; l < 2; ++l) {
        b[o + l] = __builtin_shufflevector(a[o + l], a[o + l + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        b[o + l + 2] = __builtin_shufflevector(a[o + l], a[o + l + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    for (int l = 0; l < 4; ++l) {
      r[l] = __builtin_shufflevector(b[l], b[l + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      r[l + 4] = __builtin_shufflevector(b[l], b[l + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
};

// ---- bfloat16 on processors with AVX-512 BF16 -------------------------------------------------------------------------------

#ifdef HAVE_AVX512_BF16_PATH
#define AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

// Masked loads cost twice as much as whole ones, so they are left to the ends.
AVX512BF16 inline __m512bh load32(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
AVX512BF16 inline __m512bh load_some(const Bf16* p, int count) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
}
AVX512BF16 inline __m128i load8(const Bf16* p, int count) {
  return count >= 8 ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi16((1u << count) - 1, p);
}

// The sums of four vectors' sixteen numbers. The order of additions is part of a row's result: keep it the same everywhere.
AVX512BF16 inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// t[i..i+M, j..j+N] = A[j..] · x[i..]; M * N sums in registers, 32 products of each per instruction. The rows of A that come
// next are fetched meanwhile: the weights of a batch's adapters are too many to stay in the cache from step to step.
template <int M, int N>
AVX512BF16 inline void dots(const Bf16* const* x, const Bf16* a, int in, float* t, int t_stride) {
  static_assert(N == 1 || N % 4 == 0);
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  int k = 0;
  for (; k + 32 <= in; k += 32) {
    __m512bh weights[N];
    for (int n = 0; n < N; ++n) {
      weights[n] = load32(a + static_cast<int64_t>(n) * in + k);
      _mm_prefetch(a + static_cast<int64_t>(n + N) * in + k, _MM_HINT_T0);
    }
    for (int m = 0; m < M; ++m) {
      const __m512bh row = load32(x[m] + k);
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], row, weights[n]);
    }
  }
  if (k < in) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        sums[m][n] = _mm512_dpbf16_ps(sums[m][n], load_some(x[m] + k, in - k),
                                      load_some(a + static_cast<int64_t>(n) * in + k, in - k));
  }
  for (int m = 0; m < M; ++m) {
    if constexpr (N == 1) {
      t[m * t_stride] = _mm512_reduce_add_ps(sums[m][0]);
    } else {
      for (int n = 0; n < N; n += 4)
        _mm_storeu_ps(t + m * t_stride + n, sums_of_four(sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]));
    }
  }
}

template <int M>
AVX512BF16 inline void dots_of_rows(const Bf16* const* x, const Bf16* a, int in, int rank, float* t, int t_stride) {
  int j = 0;
  if constexpr (M == 1)  // a single row leaves registers for more rows of A
    for (; j + 8 <= rank; j += 8) dots<M, 8>(x, a + static_cast<int64_t>(j) * in, in, t + j, t_stride);
  for (; j + 4 <= rank; j += 4) dots<M, 4>(x, a + static_cast<int64_t>(j) * in, in, t + j, t_stride);
  for (; j < rank; ++j) dots<M, 1>(x, a + static_cast<int64_t>(j) * in, in, t + j, t_stride);
}

// Eight ranks of sixteen outputs of B as four vectors of pairs: pairs[p] has (rank 2p, rank 2p + 1) of output o in lane o.
// Unless they are whole, `outputs` and `ranks` say how many there are of either; the rest is as if it were zero or not there.
template <bool kWhole>
AVX512BF16 inline void pack_eight(const Bf16* b, int64_t b_rank, int outputs, int ranks, __m512i* pairs) {
  __m512i quarter[4];  // quarter[q], 128-bit lane l: output 4l + q
  for (int q = 0; q < 4; ++q) {
    __m128i part[4];
    for (int l = 0; l < 4; ++l) {
      if constexpr (kWhole)
        part[l] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + (4 * l + q) * b_rank));
      else
        part[l] = load8(b + std::min(4 * l + q, outputs - 1) * b_rank, ranks);
    }
    __m512i whole = _mm512_castsi128_si512(part[0]);
    whole = _mm512_inserti32x4(whole, part[1], 1);
    whole = _mm512_inserti32x4(whole, part[2], 2);
    quarter[q] = _mm512_inserti32x4(whole, part[3], 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quarter[0], quarter[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(quarter[0], quarter[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
  pairs[0] = _mm512_unpacklo_epi64(low01, low23);
  pairs[1] = _mm512_unpackhi_epi64(low01, low23);
  pairs[2] = _mm512_unpacklo_epi64(high01, high23);
  pairs[3] = _mm512_unpackhi_epi64(high01, high23);
}

// All used ranks of sixteen outputs, eight at a time.
AVX512BF16 inline void pack_tile(const Bf16* b, int64_t b_rank, int outputs, int rank, __m512i* pairs) {
  const int apart = std::max<int>(1, 32 / b_rank);  // outputs to a cache line
  for (int o = 0; o < 16; o += apart)
    for (int j = 0; j < rank; j += 32) _mm_prefetch(b + kAhead + o * b_rank + j, _MM_HINT_T0);
  for (int j = 0; j < rank; j += 8, pairs += 4) {
    if (outputs == 16 && b_rank - j >= 8)
      pack_eight<true>(b + j, b_rank, 16, 8, pairs);
    else
      pack_eight<false>(b + j, b_rank, outputs, static_cast<int>(b_rank) - j, pairs);
  }
}

// The packed outputs for M rows. `t` holds each row's values as pairs of bfloat16.
template <int M>
AVX512BF16 inline void add_tile(Bf16* const* y, int outputs, const __m512i* pairs, int n_pairs, const int32_t* t) {
  __m512 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int p = 0; p < n_pairs; ++p)
    for (int m = 0; m < M; ++m)
      sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)_mm512_set1_epi32(t[m * n_pairs + p]), (__m512bh)pairs[p]);
  const __mmask16 some = (1u << outputs) - 1;
  for (int m = 0; m < M; ++m) {
    __m256i* target = reinterpret_cast<__m256i*>(y[m]);
    const __m256i old = outputs == 16 ? _mm256_loadu_si256(target) : _mm256_maskz_loadu_epi16(some, target);
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(old), 16));
    const __m256i sum = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(wide, sums[m]));
    if (outputs == 16)
      _mm256_storeu_si256(target, sum);
    else
      _mm256_mask_storeu_epi16(target, some, sum);
  }
}

struct Avx512Bf16 {
  using Type = Bf16;

  AVX512BF16 static void shrink(const Bf16* x, int64_t x_stride, const Block& block, const Bf16* a, int in, int rank,
                                float* t, int t_stride) {
    int i = 0;
    const Bf16* rows[4];
    for (; i + 4 <= block.count; i += 4) {
      for (int m = 0; m < 4; ++m) rows[m] = x + block.rows[i + m] * x_stride;
      dots_of_rows<4>(rows, a, in, rank, t + i * t_stride, t_stride);
    }
    for (; i < block.count; ++i) {
      rows[0] = x + block.rows[i] * x_stride;
      dots_of_rows<1>(rows, a, in, rank, t + i * t_stride, t_stride);
    }
  }

  AVX512BF16 static void expand(Bf16* y, int64_t y_stride, const Block& block, const Bf16* b, int out, int b_rank,
                                int rank, const float* t, int t_stride) {
    alignas(64) __m512i pairs[kMaxRank / 2];
    alignas(64) int32_t rounded[kBlockRows * kMaxRank / 2];
    const int n_pairs = (rank + 7) / 8 * 4;
    for (int i = 0; i < block.count; ++i) round_to_pairs(t + i * t_stride, rank, rounded + i * n_pairs, n_pairs);
    Bf16* targets[kBlockRows];
    for (int first = 0; first < out; first += 16) {
      const int outputs = std::min(16, out - first);
      pack_tile(b + static_cast<int64_t>(first) * b_rank, b_rank, outputs, rank, pairs);
      for (int i = 0; i < block.count; ++i) targets[i] = y + block.rows[i] * y_stride + first;
      int i = 0;
      for (; i + 8 <= block.count; i += 8) add_tile<8>(targets + i, outputs, pairs, n_pairs, rounded + i * n_pairs);
      for (; i + 4 <= block.count; i += 4) add_tile<4>(targets + i, outputs, pairs, n_pairs, rounded + i * n_pairs);
      for (; i + 2 <= block.count; i += 2) add_tile<2>(targets + i, outputs, pairs, n_pairs, rounded + i * n_pairs);
      for (; i < block.count; ++i) add_tile<1>(targets + i, outputs, pairs, n_pairs, rounded + i * n_pairs);
    }
  }

 private:
  AVX512BF16 static void round_to_pairs(const float* t, int rank, int32_t* pairs, int n_pairs) {
    for (int p = 0; p < n_pairs; p += 8) {
      const int left = rank - 2 * p;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m256i row = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, t + 2 * p));
      _mm256_mask_storeu_epi32(pairs + p, n_pairs - p >= 8 ? 0xff : 0x0f, row);
    }
  }
};

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

// ---- The walk over the blocks -----------------------------------------------------------------------------------------------

Block block_of(const Batch& batch, int number) {
  const int start = batch.starts[number];
  return {batch.rows + start, batch.starts[number + 1] - start, batch.slots[number]};
}

// How many rows of a slot's A are in use; found once, and again when vLLM has written to the slots (kernels.py says when).
template <class T>
int used_rank(const Slice& slice, int slot, int rank, int in) {
  int used = slice.ranks[slot];
  if (used >= 0) return used;
  const T* a = static_cast<const T*>(slice.a) + static_cast<int64_t>(slot) * rank * in;
  const T zero{};
  for (used = rank; used > 0; --used) {
    const T* row = a + static_cast<int64_t>(used - 1) * in;
    const bool empty = std::memcmp(row, &zero, sizeof zero) == 0 && std::memcmp(row, row + 1, (in - 1) * sizeof zero) == 0;
    if (!empty) break;
  }
  slice.ranks[slot] = used;  // two threads may both come here; they write the same
  return used;
}

template <class Kernel, class T = typename Kernel::Type>
int linear(const Layer& layer, const Batch& batch, const void* x, int64_t x_stride, void* y, int64_t y_stride) {
  int updates = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : updates) if (batch.n_blocks > 1)
  for (int number = 0; number < batch.n_blocks; ++number) {
    const Block block = block_of(batch, number);
    float t[kBlockRows * kMaxRank];
    for (int s = 0; s < layer.n_slices; ++s) {
      const Slice& slice = layer.slices[s];
      const int rank = used_rank<T>(slice, block.slot, layer.rank, layer.in);
      if (rank == 0) continue;
      ++updates;
      const T* a = static_cast<const T*>(slice.a) + static_cast<int64_t>(block.slot) * layer.rank * layer.in;
      const T* b = static_cast<const T*>(slice.b) + static_cast<int64_t>(block.slot) * slice.out * layer.rank;
      Kernel::shrink(static_cast<const T*>(x), x_stride, block, a, layer.in, rank, t, rank);
      Kernel::expand(static_cast<T*>(y) + slice.y_offset, y_stride, block, b, slice.out, layer.rank, rank, t, rank);
    }
  }
  return updates;
}

template <class Call>
int by_type(int dtype, Call call) {
  switch (dtype) {
    case 0:
      return call(Plain<float>{});
    case 1:
#ifdef HAVE_AVX512_BF16_PATH
      static const bool fast = has_avx512_bf16();
      if (fast) return call(Avx512Bf16{});
#endif
      return call(Plain<Bf16>{});
    case 2:
      return call(Plain<_Float16>{});
    default:
      return 0;
  }
}

}  // namespace

extern "C" {

// y += B · A · x. `x_stride` and `y_stride` are elements from one row to the next. Returns 0 if no adapter of the batch
// changes this layer.
int lora_linear(const Layer* layer, const Batch* batch, const void* x, int64_t x_stride, void* y, int64_t y_stride) {
  return by_type(layer->dtype, [&](auto kernel) { return linear<decltype(kernel)>(*layer, *batch, x, x_stride, y, y_stride); });
}

}  // extern "C"
