// Logits to tokens: the likeliest, or a draw; and log-probabilities.  Semantics of isthmus.reference.
#include "gemm.h"

namespace {

// The largest of a row, and false if it is not finite or a NaN is among the others.
bool highest_of(const float* x, int64_t width, float& top) {
  vf best = splat(-INFINITY);
  vi strange{};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) {
    const vf v = load(x + j);
    strange |= v != v;
    best = max(v, best);
  }
  top = highest(best);
  bool valid = true;
  for (int n = 0; n < kLanes; n++) valid &= strange[n] == 0;
  for (; j < width; j++) {
    valid &= x[j] == x[j];
    top = x[j] > top ? x[j] : top;
  }
  return valid && std::fabs(top) < INFINITY;
}

ALWAYS bool any(vi mask) {
  int32_t found = 0;
  for (int n = 0; n < kLanes; n++) found |= mask[n];
  return found != 0;
}

// The first place that holds `value`, which is there.
int64_t first_of(const float* x, int64_t width, float value) {
  int64_t j = 0;
  while (j + kLanes <= width && !any(load(x + j) == value)) j += kLanes;
  while (x[j] != value) j++;
  return j;
}

// Noise of isthmus.reference.noise, for vectors and for one token.
template <class T>
ALWAYS T fmix32(T h) {
  h ^= h >> 16;
  h *= 0x85EBCA6Bu;
  h ^= h >> 13;
  h *= 0xC2B2AE35u;
  h ^= h >> 16;
  return h;
}

template <class T>
ALWAYS T noise_bits(uint32_t key, T token) {
  return fmix32(key ^ fmix32(token + 0x7F4A7C15u));
}

float noise_of(uint32_t bits) {
  const float v = float(bits >> 16) * 0x1p-16f + float(bits & 0xffff) * 0x1p-32f;
  return -std::log(-std::log1p(-std::min(v + 0x1p-33f, 1.0f - 0x1p-24f)));
}

// No less than the noise: -log(-log1p(-v)) is at most -log(v), of which the exponent of v tells enough.
ALWAYS vf noise_bound(vu bits) {
  const vf v = __builtin_convertvector(reinterpret_cast<vi>(bits >> 16), vf) * 0x1p-16f +
               __builtin_convertvector(reinterpret_cast<vi>(bits & 0xffffu), vf) * 0x1p-32f + 0x1p-33f;
  const vi exponent = reinterpret_cast<vi>(reinterpret_cast<vu>(v) >> 23) - 127;
  return __builtin_convertvector(exponent, vf) * -0.6931472f + 0.01f;
}

struct Candidate {
  float value;
  int32_t id;
  bool operator<(const Candidate& other) const { return value < other.value; }
};

// One row's draw among the tokens that min_p, top_k and top_p leave.
class Draw {
 public:
  Draw(const float* logits, int64_t width, float temperature, uint32_t key, float highest, Candidate* candidates)
      : logits_(logits), width_(width), temperature_(temperature), key_(key), highest_(highest / temperature),
        candidates_(candidates) {}

  int32_t token(int64_t top_k, float top_p, float min_p) {
    const float threshold = min_p > 0 ? highest_ + std::log(min_p) : -INFINITY;
    if (top_k == 0 && top_p >= 1.0f) {
      consider_all(threshold);
      return best_;
    }
    // Most cuts fall close below the largest: look there first, then further down.
    for (float margin : {4.0f, 10.0f, INFINITY}) {
      const float cut = std::max(threshold, highest_ - margin);
      if (bounded(threshold, cut, top_k, top_p)) break;
    }
    return best_;
  }

 private:
  float value(int64_t token) const { return logits_[token] / temperature_; }

  void consider(float value, int32_t id) {
    const float score = value + noise_of(noise_bits(key_, uint32_t(id)));
    if (score > best_score_ || (score == best_score_ && id < best_)) {
      best_score_ = score;
      best_ = id;
    }
  }

  void consider_all(float threshold) {
    vu ids;
    for (int n = 0; n < kLanes; n++) ids[n] = uint32_t(n);
    int64_t j = 0;
    for (; j + kLanes <= width_; j += kLanes, ids += uint32_t(kLanes)) {
      const vf x = load(logits_ + j) / temperature_;
      const vi promising = (x >= threshold) & (x + noise_bound(noise_bits(key_, ids)) >= best_score_);
      if (!any(promising)) continue;
      for (int n = 0; n < kLanes; n++) {
        if (promising[n]) consider(x[n], int32_t(j + n));
      }
    }
    for (; j < width_; j++) {
      if (value(j) >= threshold) consider(value(j), int32_t(j));
    }
  }

  // Draws among the candidates at or above `cut`; false if the cuts may leave some below it.
  bool bounded(float threshold, float cut, int64_t top_k, float top_p) {
    const bool complete = cut <= threshold;
    int64_t count = collect(cut);
    if (top_k > 0) {
      if (count < top_k && !complete) return false;
      if (count > top_k) {
        Candidate* kth = candidates_ + top_k - 1;
        std::nth_element(candidates_, kth, candidates_ + count, [](auto& a, auto& b) { return b < a; });
        const float least = kth->value;
        count = std::partition(kth + 1, candidates_ + count, [&](auto& c) { return c.value == least; }) - candidates_;
      }
    }
    if (top_p >= 1.0f) {
      if (top_k == 0 && !complete) return false;
      for (int64_t n = 0; n < count; n++) consider(candidates_[n].value, candidates_[n].id);
      return true;
    }
    double total = 0;
    if (top_k > 0) {
      for (int64_t n = 0; n < count; n++) total += std::exp(candidates_[n].value - highest_);
    } else {
      total = mass(threshold);
    }
    return nucleus(count, top_p * total, complete || top_k > 0);
  }

  // Takes the likeliest until they have `wanted` mass, and what ties with the last of them.
  bool nucleus(int64_t count, double wanted, bool complete) {
    double above = 0;
    std::make_heap(candidates_, candidates_ + count);
    float last = 0;
    int64_t left = count;
    while (left > 0 && (above < wanted || left == count || candidates_[0].value == last)) {
      last = candidates_[0].value;
      above += std::exp(last - highest_);
      std::pop_heap(candidates_, candidates_ + left--);
    }
    if (left == 0 && above < wanted && !complete) return false;
    for (int64_t n = left; n < count; n++) consider(candidates_[n].value, candidates_[n].id);
    return true;
  }

  int64_t collect(float cut) {
    int64_t count = 0, j = 0;
    for (; j + kLanes <= width_; j += kLanes) {
      const vf x = load(logits_ + j) / temperature_;
      const vi kept = x >= cut;
      if (!any(kept)) continue;
      for (int n = 0; n < kLanes; n++) {
        if (kept[n]) candidates_[count++] = {x[n], int32_t(j + n)};
      }
    }
    for (; j < width_; j++) {
      if (value(j) >= cut) candidates_[count++] = {value(j), int32_t(j)};
    }
    return count;
  }

  double mass(float threshold) const {
    vf total{};
    int64_t j = 0;
    for (; j + kLanes <= width_; j += kLanes) {
      const vf x = load(logits_ + j) / temperature_;
      total += x >= threshold ? vexp(x - highest_) : vf{};
    }
    double all = sum(total);
    for (; j < width_; j++) all += value(j) >= threshold ? std::exp(value(j) - highest_) : 0;
    return all;
  }

  const float* logits_;
  int64_t width_;
  float temperature_;
  uint32_t key_;
  float highest_;
  Candidate* candidates_;
  float best_score_ = -INFINITY;
  int32_t best_ = 0;
};

}  // namespace

// p: logits, tokens out (int32), invalid out (bytes).  i: vocabulary.  A row is invalid (and gives token 0)
// if it holds a NaN or its largest is not finite.  Ties go to the lowest id.
KERNEL(run_argmax) {
  const int64_t width = op.i[0];
  for (int64_t row; (row = worker.take(1)) < rows;) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    float top;
    const bool valid = highest_of(x, width, top);
    static_cast<int32_t*>(op.p[1])[row] = valid ? int32_t(first_of(x, width, top)) : 0;
    static_cast<uint8_t*>(op.p[2])[row] = !valid;
  }
}

// p: logits, tokens out, invalid out as above, then temperature, top_k (int32), top_p, min_p and keys (int32)
// of each row.  i: vocabulary.  Temperature 0 takes the likeliest.
KERNEL(run_draw) {
  const int64_t width = op.i[0];
  const float* temperature = static_cast<const float*>(op.p[3]);
  Candidate* candidates = static_cast<Candidate*>(worker.scratch(sizeof(Candidate) * width));
  for (int64_t row; (row = worker.take(1)) < rows;) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    float top;
    const bool valid = highest_of(x, width, top);
    int32_t token = 0;
    if (valid && temperature[row] == 0.0f) {
      token = int32_t(first_of(x, width, top));
    } else if (valid) {
      Draw draw(x, width, temperature[row], static_cast<const uint32_t*>(op.p[7])[row], top, candidates);
      token = draw.token(static_cast<const int32_t*>(op.p[4])[row], static_cast<const float*>(op.p[5])[row],
                         static_cast<const float*>(op.p[6])[row]);
    }
    static_cast<int32_t*>(op.p[1])[row] = token;
    static_cast<uint8_t*>(op.p[2])[row] = !valid;
  }
}

// p: logits, tokens (int32), their log-probabilities out, their ranks out (int32), top ids out (int32) and top
// log-probabilities out [rows, k].  i: vocabulary, k.  Under the softmax of the logits; equals by lowest id.
KERNEL(run_logprobs) {
  const int64_t width = op.i[0], k = op.i[1];
  Candidate* best = static_cast<Candidate*>(worker.scratch(sizeof(Candidate) * (k + 1)));
  for (int64_t row; (row = worker.take(1)) < rows;) {
    const float* x = static_cast<const float*>(op.p[0]) + row * width;
    float top;
    highest_of(x, width, top);
    const float own = x[static_cast<const int32_t*>(op.p[1])[row]];
    vf total{};
    vi above{};
    int64_t kept = 0, j = 0;
    float least = -INFINITY;
    const auto insert = [&](float value, int64_t id) {
      int64_t at = kept < k ? kept++ : k - 1;
      for (; at > 0 && best[at - 1].value < value; at--) best[at] = best[at - 1];
      best[at] = {value, int32_t(id)};
      if (kept == k) least = best[k - 1].value;
    };
    for (; j + kLanes <= width; j += kLanes) {
      const vf v = load(x + j);
      total += vexp(v - top);
      above -= v > own;
      if (k == 0 || (kept == k && !any(v > least))) continue;
      for (int n = 0; n < kLanes; n++) {
        if (kept < k || v[n] > least) insert(v[n], j + n);
      }
    }
    double mass = sum(total);
    int64_t rank = 1;
    for (int n = 0; n < kLanes; n++) rank += above[n];
    for (; j < width; j++) {
      mass += std::exp(x[j] - top);
      rank += x[j] > own;
      if (k > 0 && (kept < k || x[j] > least)) insert(x[j], j);
    }
    const float normaliser = top + float(std::log(mass));
    static_cast<float*>(op.p[2])[row] = own - normaliser;
    static_cast<int32_t*>(op.p[3])[row] = int32_t(rank);
    for (int64_t n = 0; n < k; n++) {
      static_cast<int32_t*>(op.p[4])[row * k + n] = best[n].id;
      static_cast<float*>(op.p[5])[row * k + n] = best[n].value - normaliser;
    }
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
