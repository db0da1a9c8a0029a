// Mixture of experts: route, group tokens by expert, two gathered products, weighted sum.
#include "gemm.h"

// p: x, router logits, gate_up, down, y, scratch.  i: hidden, inner, experts, top_k, renormalize,
// epilogue, bf16, packed bytes of one gate_up, of one down.  `inner` is a multiple of kPanel.  Scratch
// (int32, then float): starts [experts + 1], order and chosen and shares [rows * top_k] each, activated
// [rows * top_k, inner], mixed [rows * top_k, hidden].
namespace {

struct Routing {
  Routing(const Op& op, int64_t rows)
      : experts(op.i[2]), top_k(op.i[3]), pairs(rows * top_k), hidden(op.i[0]), inner(op.i[1]) {
    starts = static_cast<int32_t*>(op.p[5]);
    order = starts + experts + 1;
    chosen = order + pairs;
    shares = reinterpret_cast<float*>(chosen + pairs);
    activated = shares + pairs;
    mixed = activated + pairs * inner;
  }
  int64_t experts, top_k, pairs, hidden, inner;
  int32_t *starts, *order, *chosen;
  float *shares, *activated, *mixed;
};

// Softmax over the experts, then the likeliest top_k of one token, likeliest first.
void choose(const float* logits, const Routing& routing, int64_t token, bool renormalize) {
  float best = logits[0], total = 0, kept = 0;
  for (int64_t e = 1; e < routing.experts; e++) best = std::max(best, logits[e]);
  for (int64_t e = 0; e < routing.experts; e++) total += std::exp(logits[e] - best);
  for (int64_t k = 0; k < routing.top_k; k++) {
    int64_t winner = -1;
    for (int64_t e = 0; e < routing.experts; e++) {
      bool taken = false;
      for (int64_t n = 0; n < k; n++) taken |= routing.chosen[token * routing.top_k + n] == e;
      if (!taken && (winner < 0 || logits[e] > logits[winner])) winner = e;
    }
    const float share = std::exp(logits[winner] - best) / total;
    routing.chosen[token * routing.top_k + k] = int32_t(winner);
    routing.shares[token * routing.top_k + k] = share;
    kept += share;
  }
  if (renormalize) {
    for (int64_t k = 0; k < routing.top_k; k++) routing.shares[token * routing.top_k + k] /= kept;
  }
}

void group(const Routing& routing) {
  std::fill(routing.starts, routing.starts + routing.experts + 1, 0);
  for (int64_t n = 0; n < routing.pairs; n++) routing.starts[routing.chosen[n] + 1]++;
  for (int64_t e = 0; e < routing.experts; e++) routing.starts[e + 1] += routing.starts[e];
  for (int64_t n = 0; n < routing.pairs; n++) routing.order[routing.starts[routing.chosen[n]]++] = int32_t(n);
  for (int64_t e = routing.experts; e > 0; e--) routing.starts[e] = routing.starts[e - 1];
  routing.starts[0] = 0;
}

// y[n] = x[n] @ its expert's weight for the (token, choice) pairs in order of experts; where gathered,
// pair n reads row order[n] / divisor of x.
void product(const Routing& routing, Worker& worker, Gemm gemm, const void* packed, int64_t expert_bytes,
             const float* x, float* y, int64_t divisor, bool gathered) {
  const int64_t width = gemm.gated() ? gemm.out / 2 : gemm.out;
  const int64_t panels = (width + kPanel - 1) / kPanel;
  Block block{worker, gemm.depth};
  int64_t unit = worker.take(1), base = 0;
  for (int64_t e = 0; e < routing.experts; e++) {
    const int64_t first = routing.starts[e], count = routing.starts[e + 1] - first;
    const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
    gemm.packed = static_cast<const char*>(packed) + e * expert_bytes;
    int64_t held = -1;
    for (; unit < base + blocks * panels; unit = worker.take(1)) {
      const int64_t b = (unit - base) / panels;
      if (b != held) {
        const int64_t row = first + b * count / blocks, height = first + (b + 1) * count / blocks - row;
        block.take_rows(gemm, gathered ? x : x + row * gemm.depth, gemm.depth, height, y + row * width, width,
                        gathered ? routing.order + row : nullptr, divisor);
        held = b;
      }
      const int64_t panel = (unit - base) % panels;
      block.panels(gemm, panel, panel + 1);
    }
    base += blocks * panels;
  }
}

}  // namespace

KERNEL(run_experts) {
  const Routing routing(op, rows);
  const bool bf16 = op.i[6] != 0;
  for (int64_t token; (token = worker.take(1)) < rows;) {
    choose(static_cast<const float*>(op.p[1]) + token * routing.experts, routing, token, op.i[4] != 0);
  }
  worker.barrier();
  if (worker.index == 0) group(routing);
  worker.barrier();
  const Gemm gate_up{nullptr, bf16, routing.hidden, 2 * routing.inner, nullptr, Epilogue(op.i[5])};
  product(routing, worker, gate_up, op.p[2], op.i[7], static_cast<const float*>(op.p[0]), routing.activated,
          routing.top_k, true);
  worker.barrier();
  const Gemm down{nullptr, bf16, routing.inner, routing.hidden, nullptr, Epilogue::kNone};
  product(routing, worker, down, op.p[3], op.i[8], routing.activated, routing.mixed, 1, false);
  worker.barrier();
  // Where each (token, choice) pair's result lies: the inverse of `order`, kept in `chosen`.
  if (worker.index == 0) {
    for (int64_t n = 0; n < routing.pairs; n++) routing.chosen[routing.order[n]] = int32_t(n);
  }
  worker.barrier();
  for (int64_t token; (token = worker.take(1)) < rows;) {
    float* y = static_cast<float*>(op.p[4]) + token * routing.hidden;
    std::fill(y, y + routing.hidden, 0.0f);
    for (int64_t k = 0; k < routing.top_k; k++) {
      const int64_t pair = token * routing.top_k + k;
      const float* from = routing.mixed + int64_t(routing.chosen[pair]) * routing.hidden;
      for (int64_t j = 0; j < routing.hidden; j++) y[j] += routing.shares[pair] * from[j];
    }
  }
}
