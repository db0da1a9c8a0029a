// The register tile all matrix work is made of: R rows of A times P panels of V vectors of columns of B.
//
// Each number of the result is one chain of multiply-adds in the order of the depth, whatever R and P
// are: a row's result does not depend, to the last bit, on the rows it is computed with.
#pragma once
#include "simd.h"

// A fused multiply-add takes four cycles and two start in each, so that fewer than eight chains would
// wait for themselves: with few rows, a tile takes several panels, as far as registers go.
constexpr int panels_for(int rows) { return rows == 1 ? 4 : rows == 2 || (rows == 3 && kLanes == 16) ? 2 : 1; }

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

// Asks for what a panel holds some rows further on (its end runs into the next panel): the processor
// streams by itself, but not past the end of a page.  With many panels at once it keeps up alone.
template <int P, class B>
static ALWAYS void fetch_ahead(const B* b) {
  if (P <= 2) __builtin_prefetch(reinterpret_cast<const char*>(b) + 2048);
}

// Where a tile's operands lie.  Strides count elements of their own type.
template <class A, class B>
struct Operands {
  const A* a;
  int64_t lda;
  const B* b;
  int64_t ldb;
  int64_t b_panel;  // from a panel of B to the next
  int64_t depth;
  float* c;
  int64_t ldc;
  int64_t c_panel;
};

// acc[.][at ...] += a[.][0] * column, one row of one panel of B.
template <int R, int V, int N>
static ALWAYS void step(vf (&acc)[R][N], int at, const float* a, int64_t lda, vf (&column)[V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) pin(column[v]);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    const vf x = splat(a[r * lda]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][at + v] += x * column[v];
  }
}

// B as float rows.
template <int R, int P, int V>
static ALWAYS void accumulate(vf (&acc)[R][P * V], const Operands<float, float>& o) {
  const float* b = o.b;
  for (int64_t k = 0; k < o.depth; k++, b += o.ldb) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      vf column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) column[v] = load(b + p * o.b_panel + v * kLanes);
      step<R, V>(acc, p * V, o.a + k, o.lda, column);
    }
  }
}

// B as bfloat16 pairs: lane j of row k / 2 is (B[k][j], B[k + 1][j]).  The depth is rounded up to even.
template <int R, int P, int V>
static ALWAYS void accumulate(vf (&acc)[R][P * V], const Operands<float, uint32_t>& o) {
  const uint32_t* b = o.b;
  for (int64_t k = 0; k < o.depth; k += 2, b += o.ldb) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      fetch_ahead<P>(b + p * o.b_panel);
      vu pair[V];
      vf column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        pair[v] = load(b + p * o.b_panel + v * kLanes);
        column[v] = even_half(pair[v]);
      }
      step<R, V>(acc, p * V, o.a + k, o.lda, column);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) column[v] = odd_half(pair[v]);
      step<R, V>(acc, p * V, o.a + k + 1, o.lda, column);
    }
  }
}

#if defined(__AVX512BF16__)
// Both as bfloat16 pairs along the depth, which is counted in pairs.
template <int R, int P, int V>
static ALWAYS void accumulate(vf (&acc)[R][P * V], const Operands<uint32_t, uint32_t>& o) {
  const uint32_t* b = o.b;
  for (int64_t k = 0; k < o.depth; k++, b += o.ldb) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      fetch_ahead<P>(b + p * o.b_panel);
      vu column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        column[v] = load(b + p * o.b_panel + v * kLanes);
        pin(column[v]);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int(o.a[r * o.lda + k]));
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          acc[r][p * V + v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][p * V + v], x, (__m512bh)column[v]);
        }
      }
    }
  }
}
#endif

template <int R, int P, int V>
static ALWAYS void load_tile(vf (&acc)[R][P * V], const float* c, int64_t ldc, int64_t c_panel) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < P * V; v++) acc[r][v] = load(c + v / V * c_panel + r * ldc + v % V * kLanes);
  }
}

template <int R, int P, int V>
static ALWAYS void store_tile(const vf (&acc)[R][P * V], float* c, int64_t ldc, int64_t c_panel) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < P * V; v++) store(c + v / V * c_panel + r * ldc + v % V * kLanes, acc[r][v]);
  }
}

// c += a @ b.  Not inlined: within a larger function the accumulators would not stay in their registers.
template <int R, int P, int V, class A, class B>
static __attribute__((noinline)) void tile(const Operands<A, B>& o) {
  vf acc[R][P * V];
  load_tile<R, P, V>(acc, o.c, o.ldc, o.c_panel);
  accumulate<R, P, V>(acc, o);
  store_tile<R, P, V>(acc, o.c, o.ldc, o.c_panel);
}

// c += a @ b for 1 to kMaxRows rows and one panel.
template <int V, class A, class B>
static ALWAYS void tile_of(int rows, const Operands<A, B>& o) {
  using Tile = void (*)(const Operands<A, B>&);
  static constexpr Tile table[] = {
      tile<1, 1, V, A, B>, tile<2, 1, V, A, B>, tile<3, 1, V, A, B>,
      tile<4, 1, V, A, B>, tile<5, 1, V, A, B>, tile<6, 1, V, A, B>,
#if defined(__AVX512F__)
      tile<7, 1, V, A, B>, tile<8, 1, V, A, B>, tile<9, 1, V, A, B>,
      tile<10, 1, V, A, B>, tile<11, 1, V, A, B>, tile<12, 1, V, A, B>,
#endif
  };
  table[rows - 1](o);
}

// c += a @ b over all rows of a block, in tiles of nearly equal height.
template <int V, class A, class B>
static ALWAYS void tiles(int64_t rows, Operands<A, B> o) {
  const int64_t count = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t n = 0, row = 0; n < count; n++) {
    const int64_t height = (rows - row + count - n - 1) / (count - n);
    tile_of<V>(int(height), o);
    o.a += height * o.lda;
    o.c += height * o.ldc;
    row += height;
  }
}

// c += a @ b for rows of which panels_for() is more than 1, and that many panels.
template <int V, class A, class B>
static ALWAYS void wide_tile(int64_t rows, const Operands<A, B>& o) {
  switch (rows) {
    case 1: tile<1, panels_for(1), V>(o); break;
    case 2: tile<2, panels_for(2), V>(o); break;
#if defined(__AVX512F__)
    case 3: tile<3, panels_for(3), V>(o); break;
#endif
    default: __builtin_unreachable();
  }
}
