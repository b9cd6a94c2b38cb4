// Probes of what ptx.cuh has for every architecture.
#include "calibration.cuh"

namespace fastattn::cuda {
namespace {

// --- matrix fragments ----------------------------------------------------------------------------

// in: a lane's row of 16 bytes, stored at row 5·lane + 3 of 32; lanes bring rows in another order.
template <bool kTransposed>
struct Ldmatrix {
  static constexpr int kThreads = 32, kIn = 4, kOut = 4, kShared = 512;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    const int lane = threadIdx.x;
    auto* rows = reinterpret_cast<uint4*>(shared);
    rows[(5 * lane + 3) % 32] = make_uint4(in[0], in[1], in[2], in[3]);
    __syncwarp();
    uint32_t r[4];
    if constexpr (kTransposed) {
      ptx::ldmatrix_x4_trans(r, rows + (11 * lane + 7) % 32);
    } else {
      ptx::ldmatrix_x4(r, rows + (11 * lane + 7) % 32);
    }
    for (int i = 0; i < 4; i++) out[i] = r[i];
  }
};

// in: a (2 words), b (1), d (4 floats)
struct MmaK8 {
  static constexpr int kThreads = 32, kIn = 7, kOut = 4, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    float d[4] = {as_float(in[3]), as_float(in[4]), as_float(in[5]), as_float(in[6])};
    ptx::mma_m16n8k8(d, in[0], in[1], in[2], fp16{});
    for (int i = 0; i < 4; i++) out[i] = __float_as_uint(d[i]);
  }
};

// --- barriers ------------------------------------------------------------------------------------

// The second warp hands its words to the first by barrier 1, and gets the first's back by 2.
struct NamedBarriers {
  static constexpr int kThreads = 64, kIn = 1, kOut = 1, kShared = 256;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* words = reinterpret_cast<uint32_t*>(shared);
    const int thread = threadIdx.x, other = thread ^ 63;
    words[thread] = in[0];
    if (thread >= 32) {
      ptx::bar_arrive<1>(64);
    } else {
      ptx::bar_sync<1>(64);
      out[0] = words[other];
    }
    ptx::bar_sync<2>(64);
    if (thread >= 32) out[0] = words[other];
  }
};

// --- arithmetic ----------------------------------------------------------------------------------

template <float (*kFunction)(float)>
struct Unary {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(kFunction(as_float(in[0])));
  }
};

template <class T>
struct Pack {
  static constexpr int kThreads = 128, kIn = 2, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = ptx::pack(as_float(in[0]), as_float(in[1]), T{});
  }
};

struct ToFloat {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(ptx::to_float(fp16{static_cast<uint16_t>(in[0])}));
  }
};

struct Anew {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = static_cast<uint32_t>(ptx::anew(static_cast<int>(in[0])));
  }
};

const bool registered = add({
    {"ldmatrix_x4", entry<Ldmatrix<false>>()},
    {"ldmatrix_x4_trans", entry<Ldmatrix<true>>()},
    {"mma_m16n8k8_fp16", entry<MmaK8>()},
    {"named_barriers", entry<NamedBarriers>()},
    {"ex2", entry<Unary<ptx::ex2>>()},
    {"lg2", entry<Unary<ptx::lg2>>()},
    {"rcp", entry<Unary<ptx::rcp>>()},
    {"pack_bf16", entry<Pack<bf16>>()},
    {"pack_fp16", entry<Pack<fp16>>()},
    {"to_float_fp16", entry<ToFloat>()},
    {"anew", entry<Anew>()},
});

}  // namespace
}  // namespace fastattn::cuda
