// y = x @ weight.T + bias over packed panels, with what follows it where the tape fused that in.
//
// A panel holds kPanel output columns over all of the depth.  Weights in bfloat16 are stored as pairs
// along the depth, so that a lane's two halves widen to float with one shift and one mask, or feed
// vdpbf16ps as they are.  A panel is streamed once from memory and stays in the first-level cache while
// all rows of a block pass over it.
#include "gemm.h"
#include "op.h"

extern "C" {

int isthmus_panel() { return kPanel; }

// Bytes of a packed [out, in] weight.
int64_t isthmus_packed_bytes(int64_t out, int64_t in, int bf16) {
  const int64_t panels = (out + kPanel - 1) / kPanel;
  return panels * kPanel * (bf16 ? (in + 1) / 2 * 4 : in * 4);
}

// Pack panels [first, last) of a row-major weight, float32 or bfloat16, into the same type.
void isthmus_pack(const void* weight, int64_t out, int64_t in, void* packed, int bf16, int64_t first, int64_t last) {
  const int64_t pairs = (in + 1) / 2;
  for (int64_t panel = first; panel < last; panel++) {
    const int64_t column = panel * kPanel, width = std::min<int64_t>(kPanel, out - column);
    if (bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(weight) + column * in;
      uint32_t* to = static_cast<uint32_t*>(packed) + panel * pairs * kPanel;
      for (int64_t k = 0; k < in / 2; k++, to += kPanel) {
        for (int64_t j = 0; j < width; j++) memcpy(to + j, from + j * in + 2 * k, 4);
        for (int64_t j = width; j < kPanel; j++) to[j] = 0;
      }
      if (in % 2) {
        for (int64_t j = 0; j < kPanel; j++) to[j] = j < width ? from[j * in + in - 1] : 0;
      }
    } else {
      const float* from = static_cast<const float*>(weight) + column * in;
      float* to = static_cast<float*>(packed) + panel * in * kPanel;
      for (int64_t k = 0; k < in; k++, to += kPanel) {
        for (int64_t j = 0; j < kPanel; j++) to[j] = j < width ? from[j * in + k] : 0;
      }
    }
  }
}
}

// p: x, packed, bias or null, y, residual or null.  i: out, in, bf16, epilogue, x stride, y stride.
// With a gated epilogue, `out` is twice the width of y, and half of it a multiple of kPanel.
KERNEL(run_linear) {
  const int64_t out = op.i[0], depth = op.i[1];
  Gemm gemm{op.p[1], op.i[2] != 0, depth, out, static_cast<const float*>(op.p[2]), Epilogue(op.i[3])};
  const float* x = static_cast<const float*>(op.p[0]);
  float* y = static_cast<float*>(op.p[3]);
  const bool gated = gemm.gated();
  const int64_t panels = gated ? out / 2 / kPanel : (out + kPanel - 1) / kPanel;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  // Whole groups of the panels that few rows take together.
  const int64_t together = panels_for(int(std::min<int64_t>(rows, kBlockRows)));
  const int64_t chunk = std::max<int64_t>(1, panels / (16 * worker.count * together)) * together;
  const int64_t chunks = (panels + chunk - 1) / chunk;
  Block block{worker, depth};
  int64_t held = -1;
  for (int64_t unit; (unit = worker.take(1)) < blocks * chunks;) {
    const int64_t b = unit / chunks, first = unit % chunks * chunk;
    if (b != held) {
      // Blocks of nearly equal height, so that the last is not a sliver.
      const int64_t row = b * rows / blocks, height = (b + 1) * rows / blocks - row;
      block.take_rows(gemm, x + row * op.i[4], op.i[4], height, y + row * op.i[5], op.i[5]);
      held = b;
    }
    block.panels(gemm, first, std::min(first + chunk, panels));
  }
}
