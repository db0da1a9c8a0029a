// Paged attention over spans of any length: rotate and store, then flash-style tiles.
//
// A layer's keys lie as [block][kv_head][head_dim / 2][slot][2], its values as
// [block][kv_head][slot / 2][padded head_dim][2]: both are weight panels to the register tile, keys
// with slots as columns and head_dim as depth, values with head_dim as columns and slots as depth.  In
// float32 caches the pairs are split: [head_dim][slot] and [slot][padded head_dim].
// Online softmax over tiles of keys: Dao et al., FlashAttention, 2022.
#include <type_traits>

#include "gemm.h"

namespace {

constexpr int64_t kQueries = 16;    // queries of a span attended together, times the heads that share a key head
constexpr int64_t kKeys = 128;      // keys scored at once
constexpr int kColumns = 16;        // columns of a tile here: a block of slots, or a slice of head_dim
constexpr int kVectors = kColumns / kLanes > 2 ? 2 : kColumns / kLanes;
constexpr int kWide = kVectors * kLanes;

struct Layer {
  explicit Layer(const Op& op)
      : heads(op.i[0]), kv_heads(op.i[1]), dim(op.i[2]), padded(op.i[3]), block(op.i[4]), window(op.i[5]),
        bf16(op.i[6] != 0), key_block(dim * block), value_block(padded * block) {}
  int64_t heads, kv_heads, dim, padded, block, window;
  bool bf16;
  int64_t key_block, value_block;  // elements of one block of one key head
};

ALWAYS void rotate_head(const float* x, const float* norm, float epsilon, const float* cos_sin, int64_t rotary,
                        int64_t dim, float* y) {
  float factor = 1.0f;
  if (norm) {
    float total = 0;
    for (int64_t j = 0; j < dim; j++) total += x[j] * x[j];
    factor = 1.0f / std::sqrt(total / float(dim) + epsilon);
  }
  for (int64_t j = 0; j < dim; j++) y[j] = norm ? x[j] * factor * norm[j] : x[j];
  const int64_t half = rotary / 2;
  for (int64_t j = 0; j < half; j++) {
    const float low = y[j], high = y[j + half], c = cos_sin[j], s = cos_sin[j + half];
    y[j] = low * c - high * s;
    y[j + half] = high * c + low * s;
  }
}

// One key head's key and value of one token, to its slot.  `last`: nothing of this step follows in the
// same pair of slots, so a stale value there (which may be a NaN) is cleared: it will be multiplied by 0.
ALWAYS void store_head(const Layer& layer, const Op& op, int64_t head, int64_t slot, const float* key,
                       const float* value, bool last) {
  const int64_t at = slot / layer.block * layer.kv_heads + head, within = slot % layer.block;
  if (layer.bf16) {
    uint16_t* k = static_cast<uint16_t*>(op.p[1]) + at * layer.key_block + within * 2;
    uint16_t* v = static_cast<uint16_t*>(op.p[2]) + at * layer.value_block + within / 2 * layer.padded * 2 + within % 2;
    for (int64_t d = 0; d < layer.dim; d++) k[d / 2 * layer.block * 2 + d % 2] = to_bf16(key[d]);
    for (int64_t d = 0; d < layer.dim; d++) v[d * 2] = to_bf16(value[d]);
    if (last && within % 2 == 0) {
      for (int64_t d = 0; d < layer.dim; d++) v[d * 2 + 1] = 0;
    }
  } else {
    float* k = static_cast<float*>(op.p[1]) + at * layer.key_block + within;
    float* v = static_cast<float*>(op.p[2]) + at * layer.value_block + within * layer.padded;
    for (int64_t d = 0; d < layer.dim; d++) k[d * layer.block] = key[d];
    memcpy(v, value, sizeof(float) * layer.dim);
  }
}

// Keys of one head for a tile of queries: the running maximum, sum and weighted values of each row.
template <class Element>
struct Attended {
  const Layer& layer;
  const Element* keys;
  const Element* values;
  const int32_t* table;
  float* scores;  // [rows, kKeys]
  float* query;   // [rows, dim], already scaled
  float* result;  // [rows, padded]
  float* best;
  float* total;
  int64_t rows, group, head;
  int64_t first_position;  // of the tile's first query
  float softcap;

  static constexpr bool kPairs = sizeof(Element) == 4 && !std::is_same<Element, float>::value;
  static constexpr int kStep = kPairs ? 2 : 1;

  int64_t key_at(int64_t block) const {
    return (int64_t(table[block]) * layer.kv_heads + head) * layer.key_block / kStep;
  }
  int64_t value_at(int64_t block) const {
    return (int64_t(table[block]) * layer.kv_heads + head) * layer.value_block / kStep;
  }

  // Ask for a block's values, and for the keys of the block after it: blocks lie anywhere, so that the
  // processor does not guess the next one.
  void fetch_ahead(int64_t position, int64_t end) const {
    const char* value = reinterpret_cast<const char*>(values + value_at(position / layer.block));
    const int64_t value_bytes = layer.value_block / kStep * sizeof(Element);
    for (int64_t n = 0; n < value_bytes; n += 64) __builtin_prefetch(value + n);
    if (position + layer.block >= end) return;
    const char* key = reinterpret_cast<const char*>(keys + key_at(position / layer.block + 1));
    const int64_t key_bytes = layer.key_block / kStep * sizeof(Element);
    for (int64_t n = 0; n < key_bytes; n += 64) __builtin_prefetch(key + n);
  }

  const Element* key_columns(int64_t position) const {
    return keys + key_at(position / layer.block) + position % layer.block;
  }

  // Scores of keys [begin, begin + count), where begin is a multiple of the block size.
  void score(int64_t begin, int64_t count, int64_t end) {
    for (int64_t row = 0; row < rows; row++) std::fill_n(scores + row * kKeys, kKeys, 0.0f);
    for (int64_t column = 0; column < count; column += kWide) {
      const int64_t position = begin + column;
      if (position % layer.block == 0) fetch_ahead(position, end);
      const Element* from = key_columns(position);
      if (rows <= 3 && column + kWide < count) {
        // Two slices of keys together, for as many sums as keep the multipliers busy.
        if ((position + kWide) % layer.block == 0) fetch_ahead(position + kWide, end);
        const Operands<float, Element> two{query, layer.dim, from, layer.block, key_columns(position + kWide) - from,
                                           layer.dim, scores + column, kKeys, kWide};
        if (rows == 1) tile<1, 2, kVectors>(two);
        if (rows == 2) tile<2, 2, kVectors>(two);
        if (rows == 3) tile<3, 2, kVectors>(two);
        column += kWide;
      } else {
        tiles<kVectors>(
            rows, Operands<float, Element>{query, layer.dim, from, layer.block, 0, layer.dim, scores + column, kKeys, 0});
      }
    }
  }

  // Turn scores into weights; rescales what was summed so far.
  void weigh(int64_t begin, int64_t count) {
    const int64_t wide = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t row = 0; row < rows; row++) {
      float* s = scores + row * kKeys;
      if (softcap != 0) {
        for (int64_t j = 0; j < wide; j += kLanes) store(s + j, vtanh(load(s + j) / softcap) * softcap);
      }
      const int64_t position = first_position + row / group;
      const int64_t end = std::min(count, position + 1 - begin);
      const int64_t start = layer.window ? std::max<int64_t>(0, position + 1 - layer.window - begin) : 0;
      if (end <= start) {
        std::fill(s, s + kKeys, 0.0f);
        continue;
      }
      std::fill(s, s + start, -INFINITY);
      std::fill(s + end, s + kKeys, -INFINITY);
      vf highest_vector = splat(-INFINITY);
      for (int64_t j = 0; j < wide; j += kLanes) highest_vector = max(highest_vector, load(s + j));
      const float previous = best[row];
      const float now = std::max(previous, highest(highest_vector));
      vf sum_vector{};
      for (int64_t j = 0; j < wide; j += kLanes) {
        const vf weight = vexp(load(s + j) - now);
        sum_vector += weight;
        store(s + j, weight);
      }
      std::fill(s + wide, s + kKeys, 0.0f);
      best[row] = now;
      if (now != previous) {
        const float factor = std::exp(previous - now);
        total[row] *= factor;
        for (int64_t d = 0; d < layer.padded; d += kLanes) {
          store(result + row * layer.padded + d, load(result + row * layer.padded + d) * factor);
        }
      }
      total[row] += sum(sum_vector);
    }
  }

  // P slices of columns of R rows of the result.
  template <int R, int P>
  __attribute__((noinline)) void gather_slices(int64_t row, int64_t begin, int64_t count, int64_t column) {
    vf acc[R][P * kVectors];
    float* c = result + row * layer.padded + column;
    load_tile<R, P, kVectors>(acc, c, layer.padded, kWide);
    for (int64_t done = 0; done < count; done += layer.block) {
      const Element* from = values + value_at((begin + done) / layer.block) + column;
      accumulate<R, P, kVectors>(acc, Operands<float, Element>{scores + row * kKeys + done, kKeys, from, layer.padded,
                                                               kWide, std::min(layer.block, count - done), c, 0, 0});
    }
    store_tile<R, P, kVectors>(acc, c, layer.padded, kWide);
  }

  template <int R>
  void gather_tile(int64_t row, int64_t begin, int64_t count) {
    constexpr int kSlices = R * kVectors <= 3 ? 4 : R * kVectors <= 6 ? 2 : 1;
    int64_t column = 0;
    for (; column + kSlices * kWide <= layer.padded; column += kSlices * kWide) {
      gather_slices<R, kSlices>(row, begin, count, column);
    }
    for (; column < layer.padded; column += kWide) gather_slices<R, 1>(row, begin, count, column);
  }

  // result += weights @ values
  void gather(int64_t begin, int64_t count) {
    const int64_t parts = (rows + 5) / 6;
    for (int64_t n = 0, row = 0; n < parts; n++) {
      const int64_t height = (rows - row + parts - n - 1) / (parts - n);
      switch (height) {
        case 1: gather_tile<1>(row, begin, count); break;
        case 2: gather_tile<2>(row, begin, count); break;
        case 3: gather_tile<3>(row, begin, count); break;
        case 4: gather_tile<4>(row, begin, count); break;
        case 5: gather_tile<5>(row, begin, count); break;
        default: gather_tile<6>(row, begin, count);
      }
      row += height;
    }
  }

  void attend(int64_t queries) {
    const int64_t end = first_position + queries;  // keys that the last query sees
    const int64_t seen = layer.window ? std::max<int64_t>(0, first_position + 1 - layer.window) : 0;
    // Tiles of keys begin at the same positions for every query, so that a query's result does not
    // depend on those it is attended with.
    for (int64_t begin = seen / layer.block * layer.block, next; begin < end; begin = next) {
      next = (begin / kKeys + 1) * kKeys;
      const int64_t count = std::min(next, end) - begin;
      score(begin, count, end);
      weigh(begin, count);
      gather(begin, count);
    }
  }
};

struct Item {
  int64_t span, kv_head, first, count;  // queries [first, first + count) of a span
};

template <class Element>
void attend_item(const Op& op, const Layer& layer, const Item& item, Worker& worker) {
  const int32_t* query_starts = static_cast<const int32_t*>(op.p[4]);
  const int32_t* contexts = static_cast<const int32_t*>(op.p[5]);
  const int32_t* span_rows = static_cast<const int32_t*>(op.p[6]);
  const int32_t* tables = static_cast<const int32_t*>(op.p[7]);
  const int64_t length = query_starts[item.span + 1] - query_starts[item.span];
  const int64_t token = query_starts[item.span] + item.first;
  const int64_t group = layer.heads / layer.kv_heads, rows = item.count * group;
  // Tails of tiles are read and written in whole vectors.
  float* scores = static_cast<float*>(
      worker.scratch(sizeof(float) * (rows * (kKeys + layer.dim + layer.padded + 2) + 64)));
  float* query = scores + rows * kKeys;
  float* result = query + rows * layer.dim;
  float* best = result + rows * layer.padded;
  float* total = best + rows;
  const float* from = static_cast<const float*>(op.p[0]);
  for (int64_t row = 0; row < rows; row++) {
    const float* q = from + ((token + row / group) * layer.heads + item.kv_head * group + row % group) * layer.dim;
    for (int64_t d = 0; d < layer.dim; d++) query[row * layer.dim + d] = q[d] * op.f[0];
  }
  std::fill(result, result + rows * layer.padded, 0.0f);
  std::fill(best, best + rows, -INFINITY);
  std::fill(total, total + rows, 0.0f);
  Attended<Element> attended{layer, static_cast<const Element*>(op.p[1]), static_cast<const Element*>(op.p[2]),
                             tables + span_rows[item.span] * op.i[7], scores, query, result, best, total, rows, group,
                             item.kv_head, contexts[item.span] - length + item.first, op.f[1]};
  attended.attend(item.count);
  float* out = static_cast<float*>(op.p[3]);
  for (int64_t row = 0; row < rows; row++) {
    float* y = out + ((token + row / group) * layer.heads + item.kv_head * group + row % group) * layer.dim;
    const float share = 1.0f / total[row];
    for (int64_t d = 0; d < layer.dim; d++) y[d] = result[row * layer.padded + d] * share;
  }
}

}  // namespace

extern "C" int isthmus_value_padding() { return kWide; }

// p: qkv, keys, values, query out, positions, slots, cos_sin, query norm, key norm (or null).
// i: as Layer, then rotary dimensions at 8.  f: epsilon.
KERNEL(run_rotate_store) {
  const Layer layer(op);
  const int64_t all = layer.heads + 2 * layer.kv_heads, dim = layer.dim, rotary = op.i[8];
  const int32_t* positions = static_cast<const int32_t*>(op.p[4]);
  const int64_t* slots = static_cast<const int64_t*>(op.p[5]);
  float* turned = static_cast<float*>(worker.scratch(sizeof(float) * dim));
  const int64_t chunk = std::max<int64_t>(1, rows / (8 * worker.count));
  for (int64_t first; (first = worker.take(chunk)) < rows;) {
    for (int64_t token = first; token < std::min(first + chunk, rows); token++) {
      const float* x = static_cast<const float*>(op.p[0]) + token * all * dim;
      const float* cos_sin = static_cast<const float*>(op.p[6]) + positions[token] * rotary;
      float* query = static_cast<float*>(op.p[3]) + token * layer.heads * dim;
      for (int64_t head = 0; head < layer.heads; head++) {
        rotate_head(x + head * dim, static_cast<const float*>(op.p[7]), op.f[0], cos_sin, rotary, dim,
                    query + head * dim);
      }
      const float* key = x + layer.heads * dim;
      const bool last = token + 1 == rows || slots[token + 1] != slots[token] + 1;
      for (int64_t head = 0; head < layer.kv_heads; head++) {
        rotate_head(key + head * dim, static_cast<const float*>(op.p[8]), op.f[0], cos_sin, rotary, dim, turned);
        store_head(layer, op, head, slots[token], turned, key + (layer.kv_heads + head) * dim, last);
      }
    }
  }
}

// p: query starts, tile starts out [spans + 1].  Tiles of queries before each span.
KERNEL(run_plan_attention) {
  if (worker.index != 0) return;
  const int32_t* starts = static_cast<const int32_t*>(op.p[0]);
  int32_t* tile_starts = static_cast<int32_t*>(op.p[1]);
  tile_starts[0] = 0;
  for (int64_t span = 0; span < rows; span++) {
    tile_starts[span + 1] = tile_starts[span] + int32_t((starts[span + 1] - starts[span] + kQueries - 1) / kQueries);
  }
}

// p: query, keys, values, out, query starts, contexts, span rows, block tables, tile starts.
// i: as Layer, then the block tables' width at 7.  f: scale, softcap.  Rows are spans.
KERNEL(run_attend) {
  const Layer layer(op);
  const int32_t* query_starts = static_cast<const int32_t*>(op.p[4]);
  const int32_t* tile_starts = static_cast<const int32_t*>(op.p[8]);
  const int64_t items = rows == 0 ? 0 : tile_starts[rows] * layer.kv_heads;
  for (int64_t n; (n = worker.take(1)) < items;) {
    const int64_t tile = n / layer.kv_heads;
    const int64_t span = std::upper_bound(tile_starts, tile_starts + rows + 1, tile) - tile_starts - 1;
    const int64_t first = (tile - tile_starts[span]) * kQueries;
    const int64_t length = query_starts[span + 1] - query_starts[span];
    const Item item{span, n % layer.kv_heads, first, std::min(kQueries, length - first)};
    if (layer.bf16) {
      attend_item<uint32_t>(op, layer, item, worker);
    } else {
      attend_item<float>(op, layer, item, worker);
    }
  }
}
