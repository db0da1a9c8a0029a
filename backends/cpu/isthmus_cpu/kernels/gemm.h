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
static ALWAYS vf gelu_tanh(vf x) {
  return x * 0.5f * (1.0f + vtanh(0.7978845608028654f * (x + 0.044715f * (x * x * x))));
}

// Rows of x in the form the tiles read, and room for a panel's results, in a thread's scratch.
class Block {
 public:
  Block(Worker& worker, int64_t depth) {
    const int64_t even = (depth + 1) / 2 * 2;
    char* memory = static_cast<char*>(
        worker.scratch(sizeof(float) * (kBlockRows * even + 2 * kBlockRows * kPanel)));
    result_ = reinterpret_cast<float*>(memory);
    gate_ = result_ + kBlockRows * kPanel;
    copy_ = gate_ + kBlockRows * kPanel;
  }

  // Take `rows` consecutive rows of x, or those that `index` names.
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

  // Compute one panel of the output and write it to y.
  void panel(const Gemm& gemm, int64_t panel) {
    const int64_t width = std::min<int64_t>(kPanel, (gemm.gated() ? gemm.out / 2 : gemm.out) - panel * kPanel);
    if (gemm.gated()) {
      multiply(gemm, panel, gate_);
      multiply(gemm, panel + gemm.out / 2 / kPanel, result_);
    } else {
      multiply(gemm, panel, result_);
    }
    float* y = y_ + panel * kPanel;
    for (int64_t r = 0; r < rows_; r++, y += y_stride_) {
      float* result = result_ + r * kPanel;
      finish(gemm, gate_ + r * kPanel, result, y, width);
      if (width == kPanel) {
        store(y, load(result));
        store(y + kLanes, load(result + kLanes));
      } else {
        memcpy(y, result, sizeof(float) * width);
      }
    }
  }

 private:
  static void finish(const Gemm& gemm, const float* gate, float* result, const float* y, int64_t width) {
    for (int v = 0; v < kPanel; v += kLanes) {
      vf value = load(result + v);
      if (gemm.epilogue == Epilogue::kSilu) value = value * silu(load(gate + v));
      if (gemm.epilogue == Epilogue::kGeluTanh) value = value * gelu_tanh(load(gate + v));
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

  void multiply(const Gemm& gemm, int64_t panel, float* c) {
    start(gemm, panel, c);
    if (!gemm.bf16) {
      const float* b = static_cast<const float*>(gemm.packed) + panel * gemm.depth * kPanel;
      for (int64_t k = 0; k < gemm.depth; k += kChunkDepth) {
        const int64_t deep = std::min(kChunkDepth, gemm.depth - k);
        tiles<2>(rows_, x_ + k, stride_, b + k * kPanel, kPanel, deep, c, kPanel, false);
      }
      return;
    }
    const uint32_t* b = static_cast<const uint32_t*>(gemm.packed) + panel * gemm.pairs() * kPanel;
#if defined(__AVX512BF16__)
    tiles<2>(rows_, reinterpret_cast<const uint32_t*>(copy_), stride_, b, kPanel, gemm.pairs(), c, kPanel, false);
#else
    for (int64_t k = 0; k < 2 * gemm.pairs(); k += kChunkDepth) {
      const int64_t deep = std::min(kChunkDepth, 2 * gemm.pairs() - k);
      tiles<2>(rows_, x_ + k, stride_, b + k / 2 * kPanel, kPanel, deep, c, kPanel, false);
    }
#endif
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
  const float *x_ = nullptr;
  float* y_ = nullptr;
  int64_t rows_ = 0, stride_ = 0, y_stride_ = 0;
};
