// One block of rows times one panel of packed weights.
#pragma once
#include <algorithm>

#include "op.h"
#include "tile.h"

constexpr int64_t kBlockRows = kDotBf16 ? 96 : 72;  // rows that pass over a panel at once: x stays in the L2 cache
constexpr int64_t kChunkDepth = 512;  // depth that tiles pass over at once

enum class Epilogue : int64_t { kNone, kSilu, kGeluTanh, kAdd };

struct Gemm {
  const void* packed;
  bool bf16;
  int64_t depth;
  int64_t out;
  const float* bias;
  Epilogue epilogue;

  bool gated() const { return epilogue == Epilogue::kSilu || epilogue == Epilogue::kGeluTanh; }
  int64_t pairs() const { return (depth + 1) / 2; }
};

static ALWAYS vf silu(vf x) { return x / (1.0f + vexp(-x)); }
// 1 + tanh(u) is 2 / (1 + exp(-2 u)), which keeps its digits where both are small.
static ALWAYS vf gelu_tanh(vf x) {
  return x / (1.0f + vexp(-1.5957691216057308f * (x + 0.044715f * (x * x * x))));
}

// Rows of x in the form the tiles read, and room for the results of some panels, in a thread's scratch.
class Block {
 public:
  Block(Worker& worker, int64_t depth) {
    const int64_t even = (depth + 1) / 2 * 2;
    char* memory = static_cast<char*>(
        worker.scratch(sizeof(float) * (kBlockRows * even + 2 * std::max(kBlockRows, kMostPanels) * kPanel)));
    result_ = reinterpret_cast<float*>(memory);
    gate_ = result_ + std::max(kBlockRows, kMostPanels) * kPanel;
    copy_ = gate_ + std::max(kBlockRows, kMostPanels) * kPanel;
  }

  // Take `rows` consecutive rows of x, or row index[r] / divisor for each r.
  void take_rows(const Gemm& gemm, const float* x, int64_t stride, int64_t rows, float* y, int64_t y_stride,
                 const int32_t* index = nullptr, int64_t divisor = 1) {
    rows_ = rows;
    x_ = x;
    stride_ = stride;
    y_ = y;
    y_stride_ = y_stride;
    const bool odd = gemm.bf16 && gemm.depth % 2 != 0;
    if (gemm.bf16 && kDotBf16) {
      for (int64_t r = 0; r < rows; r++) {
        const float* from = x + (index ? index[r] / divisor : r) * stride;
        round_row(from, gemm.depth, reinterpret_cast<uint32_t*>(copy_) + r * gemm.pairs());
      }
      stride_ = gemm.pairs();
    } else if (odd || index) {
      const int64_t width = odd ? gemm.depth + 1 : gemm.depth;
      for (int64_t r = 0; r < rows; r++) {
        memcpy(copy_ + r * width, x + (index ? index[r] / divisor : r) * stride, sizeof(float) * gemm.depth);
        if (odd) copy_[r * width + gemm.depth] = 0;
      }
      x_ = copy_;
      stride_ = width;
    }
  }

  // Compute panels [first, last) of the output and write them to y.
  void panels(const Gemm& gemm, int64_t first, int64_t last) {
    const int64_t together = panels_for(int(rows_));
    while (first < last) {
      const int64_t count = first + together <= last ? together : 1;
      if (gemm.gated()) {
        multiply(gemm, first, count, gate_);
        multiply(gemm, first + gemm.out / 2 / kPanel, count, result_);
      } else {
        multiply(gemm, first, count, result_);
      }
      for (int64_t n = 0; n < count; n++) write(gemm, first + n, n * rows_ * kPanel);
      first += count;
    }
  }

 private:
  static constexpr int64_t kMostPanels = panels_for(1);

  // The result of one panel, `at` floats into the scratch, goes to y.
  void write(const Gemm& gemm, int64_t panel, int64_t at) {
    const int64_t width = std::min<int64_t>(kPanel, (gemm.gated() ? gemm.out / 2 : gemm.out) - panel * kPanel);
    float* y = y_ + panel * kPanel;
    for (int64_t r = 0; r < rows_; r++, y += y_stride_) {
      float* result = result_ + at + r * kPanel;
      finish(gemm, gate_ + at + r * kPanel, result, y, width);
      if (width == kPanel) {
        store(y, load(result));
        store(y + kLanes, load(result + kLanes));
      } else {
        memcpy(y, result, sizeof(float) * width);
      }
    }
  }

  static void finish(const Gemm& gemm, const float* gate, float* result, const float* y, int64_t width) {
    for (int v = 0; v < kPanel; v += kLanes) {
      vf value = load(result + v);
      if (gemm.epilogue == Epilogue::kSilu) value = silu(load(gate + v)) * value;
      if (gemm.epilogue == Epilogue::kGeluTanh) value = gelu_tanh(load(gate + v)) * value;
      if (gemm.epilogue == Epilogue::kAdd) {
        if (width == kPanel) {
          value += load(y + v);
        } else {
          for (int64_t j = v; j < std::min<int64_t>(width, v + kLanes); j++) value[j - v] += y[j];
        }
      }
      store(result + v, value);
    }
  }

  static void round_row(const float* x, int64_t depth, uint32_t* to) {
    int64_t k = 0;
#if defined(__AVX512BF16__)
    for (; k + 32 <= depth; k += 32) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)load(x + k + 16), (__m512)load(x + k));
      store(to + k / 2, (vu)pairs);
    }
#endif
    for (; k < depth; k += 2) {
      to[k / 2] = to_bf16(x[k]) | (k + 1 < depth ? uint32_t(to_bf16(x[k + 1])) << 16 : 0);
    }
  }

  // Panels [panel, panel + count) into c, one after the other.
  void multiply(const Gemm& gemm, int64_t panel, int64_t count, float* c) {
    for (int64_t n = 0; n < count; n++) start(gemm, panel + n, c + n * rows_ * kPanel);
    if (!gemm.bf16) {
      const int64_t size = gemm.depth * kPanel;
      pass(count, x_, static_cast<const float*>(gemm.packed) + panel * size, size, gemm.depth, 1, c);
      return;
    }
    const int64_t size = gemm.pairs() * kPanel;
    const uint32_t* b = static_cast<const uint32_t*>(gemm.packed) + panel * size;
#if defined(__AVX512BF16__)
    pass(count, reinterpret_cast<const uint32_t*>(copy_), b, size, gemm.pairs(), 1, c);
#else
    pass(count, x_, b, size, 2 * gemm.pairs(), 2, c);
#endif
  }

  // `step`: elements of A that meet one row of B.
  template <class A, class B>
  void pass(int64_t count, const A* a, const B* b, int64_t size, int64_t depth, int64_t step, float* c) {
    for (int64_t k = 0; k < depth; k += kChunkDepth) {
      const Operands<A, B> operands{a + k, stride_, b + k / step * kPanel, kPanel,        size,
                                    std::min(kChunkDepth, depth - k), c, kPanel, rows_ * kPanel};
      if (count > 1) {
        wide_tile<2>(rows_, operands);
      } else {
        tiles<2>(rows_, operands);
      }
    }
  }

  void start(const Gemm& gemm, int64_t panel, float* c) {
    alignas(64) float first[kPanel] = {};
    if (gemm.bias) {
      const int64_t width = std::min<int64_t>(kPanel, gemm.out - panel * kPanel);
      memcpy(first, gemm.bias + panel * kPanel, sizeof(float) * width);
    }
    for (int64_t r = 0; r < rows_; r++) {
      store(c + r * kPanel, load(first));
      store(c + r * kPanel + kLanes, load(first + kLanes));
    }
  }

  float *result_, *gate_, *copy_;
  const float* x_ = nullptr;
  float* y_ = nullptr;
  int64_t rows_ = 0, stride_ = 0, y_stride_ = 0;
};
