// Vectors of float in GCC's portable notation, sized to the machine the file is compiled for.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ALWAYS inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxRows = 12;  // rows of a register tile: 12 x 2 accumulators leave 8 of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kMaxRows = 6;
#endif

// A weight panel holds this many output columns: two vectors.
constexpr int kPanel = 2 * kLanes;

#if defined(__AVX512BF16__)
constexpr bool kDotBf16 = true;
#else
constexpr bool kDotBf16 = false;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static ALWAYS vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static ALWAYS vu load(const uint32_t* p) { return *reinterpret_cast<const vu_any*>(p); }
static ALWAYS void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
static ALWAYS void store(uint32_t* p, vu x) { *reinterpret_cast<vu_any*>(p) = x; }
static ALWAYS vf splat(float x) { return x - vf{}; }
static ALWAYS vf max(vf a, vf b) { return a > b ? a : b; }
static ALWAYS vf min(vf a, vf b) { return a < b ? a : b; }

static ALWAYS float sum(vf x) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
}
static ALWAYS float highest(vf x) {
  float best = x[0];
  for (int i = 1; i < kLanes; i++) best = x[i] > best ? x[i] : best;
  return best;
}

// A bfloat16 pair in a 32-bit lane: the even element is the low half.
static ALWAYS vf even_half(vu pair) { return reinterpret_cast<vf>(pair << 16); }
static ALWAYS vf odd_half(vu pair) { return reinterpret_cast<vf>(pair & 0xffff0000u); }

static ALWAYS float from_bf16(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even; a NaN stays one.
static ALWAYS uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// exp to about 2 ulp (Cephes' expf polynomial); 0 below -87.3, saturates near 3e38 above 88.
static ALWAYS vf vexp(vf x) {
  x = min(x, splat(88.3762626647949f));
  const vi tiny = x < splat(-87.3365447504f);
  x = max(x, splat(-87.3365447504f));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vi exponent = reinterpret_cast<vi>(shifted) << 23;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vf y = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
  return tiny ? vf{} : y;
}

static ALWAYS vf vtanh(vf x) {
  x = max(min(x, splat(15.0f)), splat(-15.0f));
  const vf e = vexp(x * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}
