// Operations on one row at a time: embedding, norms, gates, sums, gathers, soft caps.
#include "gemm.h"

namespace {

// Rows are taken in handfuls: one take() costs about as much as a short row.
template <class Body>
ALWAYS void each_row(int64_t rows, Worker& worker, Body body) {
  const int64_t chunk = std::max<int64_t>(1, rows / (8 * worker.count));
  for (int64_t first; (first = worker.take(chunk)) < rows;) {
    for (int64_t row = first; row < std::min(first + chunk, rows); row++) body(row);
  }
}

ALWAYS float inverse_rms(const float* x, int64_t width, float epsilon) {
  vf squares[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= width; j += 4 * kLanes) {
    for (int n = 0; n < 4; n++) {
      const vf v = load(x + j + n * kLanes);
      squares[n] += v * v;
    }
  }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; j < width; j++) total += x[j] * x[j];
  return 1.0f / std::sqrt(total / float(width) + epsilon);
}

ALWAYS void scale_row(const float* x, const float* weight, float factor, float* y, int64_t width) {
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) store(y + j, load(x + j) * factor * load(weight + j));
  for (; j < width; j++) y[j] = x[j] * factor * weight[j];
}

}  // namespace

// p: ids, packed table, y.  i: width, bf16.  f: scale.  The table is a packed linear weight (it also
// serves as the head), so a row is a column of a panel.
KERNEL(run_embed) {
  const int32_t* ids = static_cast<const int32_t*>(op.p[0]);
  const int64_t width = op.i[0], pairs = (width + 1) / 2;
  const float scale = op.f[0];
  each_row(rows, worker, [&](int64_t row) {
    float* y = static_cast<float*>(op.p[2]) + row * width;
    const int64_t panel = ids[row] / kPanel, column = ids[row] % kPanel;
    if (op.i[1]) {
      const uint32_t* from = static_cast<const uint32_t*>(op.p[1]) + panel * pairs * kPanel + column;
      for (int64_t k = 0; k < width; k++) y[k] = from_bf16(uint16_t(from[k / 2 * kPanel] >> (k & 1) * 16)) * scale;
    } else {
      const float* from = static_cast<const float*>(op.p[1]) + panel * width * kPanel + column;
      for (int64_t k = 0; k < width; k++) y[k] = from[k * kPanel] * scale;
    }
  });
}

// p: x, weight, y.  i: width.  f: epsilon.
KERNEL(run_rms_norm) {
  const int64_t width = op.i[0];
  const float* weight = static_cast<const float*>(op.p[1]);
  each_row(rows, worker, [&](int64_t row) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    scale_row(x, weight, inverse_rms(x, width, op.f[0]), static_cast<float*>(op.p[2]) + row * width, width);
  });
}

// p: x, residual (becomes the sum), weight, y.  i: width.  f: epsilon.
KERNEL(run_add_rms_norm) {
  const int64_t width = op.i[0];
  const float* weight = static_cast<const float*>(op.p[2]);
  each_row(rows, worker, [&](int64_t row) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    float* residual = static_cast<float*>(op.p[1]) + row * width;
    for (int64_t j = 0; j < width; j++) residual[j] += x[j];
    const float factor = inverse_rms(residual, width, op.f[0]);
    scale_row(residual, weight, factor, static_cast<float*>(op.p[3]) + row * width, width);
  });
}

// p: x, residual (becomes the sum).  i: width.
KERNEL(run_add) {
  const int64_t width = op.i[0];
  each_row(rows, worker, [&](int64_t row) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    float* residual = static_cast<float*>(op.p[1]) + row * width;
    for (int64_t j = 0; j < width; j++) residual[j] += x[j];
  });
}

// p: gate_up, y.  i: width of y, epilogue.
KERNEL(run_gated) {
  const int64_t width = op.i[0];
  const bool is_silu = Epilogue(op.i[1]) == Epilogue::kSilu;
  each_row(rows, worker, [&](int64_t row) {
    const float* gate = static_cast<const float*>(op.p[0]) + row * 2 * width;
    const float* up = gate + width;
    float* y = static_cast<float*>(op.p[1]) + row * width;
    for (int64_t j = 0; j < width; j += kLanes) {
      if (j + kLanes <= width) {
        const vf g = load(gate + j);
        store(y + j, (is_silu ? silu(g) : gelu_tanh(g)) * load(up + j));
      } else {
        float tail[kLanes] = {};
        memcpy(tail, gate + j, sizeof(float) * (width - j));
        const vf g = load(tail), value = is_silu ? silu(g) : gelu_tanh(g);
        for (int64_t t = j; t < width; t++) y[t] = value[t - j] * up[t];
      }
    }
  });
}

// p: x, index, y.  i: width.
KERNEL(run_take_rows) {
  const int64_t width = op.i[0];
  const int32_t* index = static_cast<const int32_t*>(op.p[1]);
  each_row(rows, worker, [&](int64_t row) {
    memcpy(static_cast<float*>(op.p[2]) + row * width, static_cast<const float*>(op.p[0]) + index[row] * width,
           sizeof(float) * width);
  });
}

// p: x, in place.  i: width.  f: cap.
KERNEL(run_softcap) {
  const int64_t width = op.i[0];
  const float cap = op.f[0];
  each_row(rows, worker, [&](int64_t row) {
    float* x = static_cast<float*>(op.p[0]) + row * width;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) store(x + j, vtanh(load(x + j) / cap) * cap);
    for (; j < width; j++) x[j] = std::tanh(x[j] / cap) * cap;
  });
}
