// The likeliest token of each row, and whether the row can be trusted.
#include "gemm.h"

// p: logits, tokens out (int32), invalid out (bytes).  i: vocabulary.  A row is invalid (and gives token 0)
// if it holds a NaN or its largest is not finite.  Ties go to the lowest id.
KERNEL(run_argmax) {
  const int64_t width = op.i[0];
  for (int64_t row; (row = worker.take(1)) < rows;) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    vf best = splat(-INFINITY);
    vi strange{};
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      const vf v = load(x + j);
      strange |= v != v;
      best = max(v, best);
    }
    float top = highest(best);
    bool invalid = false;
    for (int n = 0; n < kLanes; n++) invalid |= strange[n] != 0;
    for (; j < width; j++) {
      invalid |= x[j] != x[j];
      top = x[j] > top ? x[j] : top;
    }
    invalid |= !(std::fabs(top) < INFINITY);
    int64_t token = 0;
    if (!invalid) {
      while (token + kLanes <= width) {
        const vi same = load(x + token) == top;
        bool found = false;
        for (int n = 0; n < kLanes; n++) found |= same[n] != 0;
        if (found) break;
        token += kLanes;
      }
      while (x[token] != top) token++;
    }
    static_cast<int32_t*>(op.p[1])[row] = int32_t(token);
    static_cast<uint8_t*>(op.p[2])[row] = invalid;
  }
}

// p: memory.  i: bytes.  Reads all of it once: what measures the machine's bandwidth.
KERNEL(run_read) {
  constexpr int64_t kPiece = 1 << 18;
  (void)rows;
  vu total{};
  for (int64_t piece; (piece = worker.take(1)) * kPiece < op.i[0];) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const char*>(op.p[0]) + piece * kPiece);
    const int64_t words = std::min(kPiece, op.i[0] - piece * kPiece) / 4;
    vu sums[4] = {};
    for (int64_t n = 0; n + 4 * kLanes <= words; n += 4 * kLanes) {
      for (int k = 0; k < 4; k++) sums[k] ^= load(from + n + k * kLanes);
    }
    total ^= (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  }
  volatile uint32_t kept = total[0];
  (void)kept;
}
