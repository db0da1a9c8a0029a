// The register tile all matrix work is made of: R rows of A times V vectors of columns of B.
#pragma once
#include "simd.h"

// B holds float rows, `ldb` floats apart.
template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth) {
  for (int64_t k = 0; k < depth; k++, b += ldb) {
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) column[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vf x = splat(a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] += x * column[v];
    }
  }
}

// B holds bfloat16 pairs: lane j of row k/2 is (B[k][j], B[k + 1][j]).  `depth` is rounded up to even.
template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const float* a, int64_t lda, const uint32_t* b, int64_t ldb,
                              int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2, b += ldb) {
    vu pair[V];
    vf column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      pair[v] = load(b + v * kLanes);
      column[v] = even_half(pair[v]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vf x = splat(a[r * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] += x * column[v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) column[v] = odd_half(pair[v]);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vf x = splat(a[r * lda + k + 1]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] += x * column[v];
    }
  }
}

#if defined(__AVX512BF16__)
// Both hold bfloat16 pairs along the depth, which is counted in pairs.
template <int R, int V>
static ALWAYS void accumulate(vf (&acc)[R][V], const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                              int64_t pairs) {
  for (int64_t k = 0; k < pairs; k++, b += ldb) {
    __m512bh column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) column[v] = (__m512bh)load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[r * lda + k]));
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], x, column[v]);
    }
  }
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
