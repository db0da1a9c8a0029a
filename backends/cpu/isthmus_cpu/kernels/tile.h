// The register tile all matrix work is made of: R rows of A times V vectors of columns of B.
#pragma once
#include "simd.h"

// Independent sums per accumulator: a fused multiply-add takes about four cycles and two start in each,
// so that fewer than eight chains would wait for themselves.
template <int R, int V>
constexpr int kSets = R * V >= 8 ? 1 : R * V >= 4 ? 2 : 4;

// Keeps a loaded vector in its register: folded into each multiply-add it would be loaded once a row.
template <class T>
static ALWAYS void pin(T& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// acc += a[.][k] * column, one row of B.
template <int R, int V>
static ALWAYS void step(vf (&acc)[R][V], const float* a, int64_t lda, vf (&column)[V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) pin(column[v]);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const vf x = splat(a[r * lda]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][v] += x * column[v];
  }
}

// B as float rows, `ldb` floats apart.
template <int R, int V>
static ALWAYS void load_step(vf (&acc)[R][V], const float* a, int64_t lda, const float* b) {
  vf column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) column[v] = load(b + v * kLanes);
  step<R, V>(acc, a, lda, column);
}

// B as bfloat16 pairs: lane j of row k / 2 is (B[k][j], B[k + 1][j]).
template <int R, int V>
static ALWAYS void load_step(vf (&even)[R][V], vf (&odd)[R][V], const float* a, int64_t lda, const uint32_t* b) {
  vu pair[V];
  vf column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    pair[v] = load(b + v * kLanes);
    column[v] = even_half(pair[v]);
  }
  step<R, V>(even, a, lda, column);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) column[v] = odd_half(pair[v]);
  step<R, V>(odd, a + 1, lda, column);
}

template <int R, int V>
static ALWAYS void merge(vf (&acc)[R][V], const vf (&more)[R][V]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][v] += more[r][v];
  }
}

template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth) {
  int64_t k = 0;
  if constexpr (kSets<R, V> > 1) {
    vf more[R][V] = {};
    for (; k + 2 <= depth; k += 2, b += 2 * ldb) {
      load_step<R, V>(acc, a + k, lda, b);
      load_step<R, V>(more, a + k + 1, lda, b + ldb);
    }
    merge<R, V>(acc, more);
  }
  for (; k < depth; k++, b += ldb) load_step<R, V>(acc, a + k, lda, b);
}

// `depth` is rounded up to even.
template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const float* a, int64_t lda, const uint32_t* b, int64_t ldb,
                              int64_t depth) {
  int64_t k = 0;
  if constexpr (kSets<R, V> == 1) {
    for (; k < depth; k += 2, b += ldb) load_step<R, V>(acc, acc, a + k, lda, b);
  } else {
    vf odd[R][V] = {};
    if constexpr (kSets<R, V> == 4) {
      vf third[R][V] = {}, fourth[R][V] = {};
      for (; k + 4 <= depth; k += 4, b += 2 * ldb) {
        load_step<R, V>(acc, odd, a + k, lda, b);
        load_step<R, V>(third, fourth, a + k + 2, lda, b + ldb);
      }
      merge<R, V>(acc, third);
      merge<R, V>(odd, fourth);
    }
    for (; k < depth; k += 2, b += ldb) load_step<R, V>(acc, odd, a + k, lda, b);
    merge<R, V>(acc, odd);
  }
}

#if defined(__AVX512BF16__)
template <int R, int V>
static ALWAYS void load_step(vf (&acc)[R][V], const uint32_t* a, int64_t lda, const uint32_t* b) {
  vu column[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    column[v] = load(b + v * kLanes);
    pin(column[v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[r * lda]));
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], x, (__m512bh)column[v]);
  }
}

// Both hold bfloat16 pairs along the depth, which is counted in pairs.
template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                              int64_t pairs) {
  int64_t k = 0;
  if constexpr (kSets<R, V> > 1) {
    vf second[R][V] = {}, third[R][V] = {}, fourth[R][V] = {};
    for (; k + 4 <= pairs; k += 4, b += 4 * ldb) {
      load_step<R, V>(acc, a + k, lda, b);
      load_step<R, V>(second, a + k + 1, lda, b + ldb);
      load_step<R, V>(third, a + k + 2, lda, b + 2 * ldb);
      load_step<R, V>(fourth, a + k + 3, lda, b + 3 * ldb);
    }
    merge<R, V>(third, fourth);
    merge<R, V>(acc, second);
    merge<R, V>(acc, third);
  }
  for (; k < pairs; k++, b += ldb) load_step<R, V>(acc, a + k, lda, b);
}
#endif

// c[R][V vectors] (+)= a @ b.  `fresh` starts from zero, else from what c holds.
template <int R, int V, class A, class B>
static void tile(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool fresh) {
  vf acc[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][v] = fresh ? vf{} : load(c + r * ldc + v * kLanes);
  }
  accumulate<R, V>(acc, a, lda, b, ldb, depth);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(c + r * ldc + v * kLanes, acc[r][v]);
  }
}

template <class A, class B>
using Tile = void (*)(const A*, int64_t, const B*, int64_t, int64_t, float*, int64_t, bool);

// The tile of `rows` rows, 1 to kMaxRows.
template <int V, class A, class B>
static ALWAYS Tile<A, B> tile_of(int rows) {
  static constexpr Tile<A, B> table[] = {
      tile<1, V, A, B>, tile<2, V, A, B>,  tile<3, V, A, B>,  tile<4, V, A, B>, tile<5, V, A, B>, tile<6, V, A, B>,
#if defined(__AVX512F__)
      tile<7, V, A, B>, tile<8, V, A, B>,  tile<9, V, A, B>,  tile<10, V, A, B>, tile<11, V, A, B>, tile<12, V, A, B>,
#endif
  };
  return table[rows - 1];
}

// All rows of a block, split into tiles of nearly equal height.
template <int V, class A, class B>
static ALWAYS void tiles(int64_t rows, const A* a, int64_t lda, const B* b, int64_t ldb, int64_t depth, float* c,
                         int64_t ldc, bool fresh) {
  const int64_t count = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t n = 0, row = 0; n < count; n++) {
    const int64_t height = (rows - row + count - n - 1) / (count - n);
    tile_of<V, A, B>(int(height))(a + row * lda, lda, b, ldb, depth, c + row * ldc, ldc, fresh);
    row += height;
  }
}
