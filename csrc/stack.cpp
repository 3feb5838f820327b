#include "stack.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "check.hpp"
#include "lora.hpp"
#include "matmul.hpp"
#include "parallel.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kMinShare = 1 << 15;  // numbers that are worth a thread

// out = x / rms(x) * weight
struct Norm {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* x, const float* weight, std::int64_t n,
                                                float epsilon, float* out) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    F32 squares = {};
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const F32 v = S::template widen<DType::float32>(x + i, n - i);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(S::reduce_add(squares) / static_cast<float>(n) + epsilon);
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const F32 v = S::template widen<DType::float32>(x + i, n - i);
      const F32 w = S::template widen<DType::float32>(weight + i, n - i);
      S::template narrow<DType::float32>(v * scale * w, out + i, n - i);
    }
  }
};

// out = x cos + rotate_half(x) sin, rounded
template <DType D>
struct Rotate {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* x, const float* cosines,
                                                const float* sines, std::int64_t n, void* out) {
    using S = Simd<Bytes>;
    const std::int64_t half = n / 2;
    for (std::int64_t i = 0; i < half; i += S::lanes) {
      const std::int64_t left = half - i;
      const auto part = [&](const float* from) __attribute__((always_inline)) {
        return S::template widen<DType::float32>(from + i, left);
      };
      const auto a = part(x), b = part(x + half);
      S::template narrow<D>(a * part(cosines) - b * part(sines), at<D>(out, i), left);
      S::template narrow<D>(b * part(cosines + half) + a * part(sines + half), at<D>(out, half + i),
                            left);
    }
  }
};

template <DType D>
struct Narrow {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* x, std::int64_t n, void* out) {
    using S = Simd<Bytes>;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      S::template narrow<D>(S::template widen<DType::float32>(x + i, n - i), at<D>(out, i), n - i);
    }
  }
};

template <DType D>
struct WidenRow {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const void* x, std::int64_t n, float* out) {
    using S = Simd<Bytes>;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      S::template narrow<DType::float32>(S::template widen<D>(at<D>(x, i), n - i), out + i, n - i);
    }
  }
};

// gate = silu(gate) * up
struct Gate {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(float* gate, const float* up, std::int64_t n) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const F32 g = S::template widen<DType::float32>(gate + i, n - i);
      const F32 u = S::template widen<DType::float32>(up + i, n - i);
      const F32 e = S::exp_nonpositive(g < 0.0f ? g : -g);
      const F32 numerator = g < 0.0f ? e : F32{} + 1.0f;
      S::template narrow<DType::float32>(g * numerator / (1.0f + e) * u, gate + i, n - i);
    }
  }
};

template <DType D>
class Pass {
 public:
  Pass(const StackShape& shape, const StackPass& pass, const Angles& angles, Isa isa, int threads)
      : shape_(shape), pass_(pass), angles_(angles), isa_(isa), threads_(threads) {
    const std::int64_t rows = pass.rows, query = shape.heads * shape.head,
                       key = shape.kv_heads * shape.head;
    hidden_.resize(rows * shape.width);
    normed_.resize(rows * shape.width);
    query_.resize(rows * query);
    key_.resize(rows * key);
    value_.resize(rows * key);
    rotated_.resize(rows * query * size_of(D));
    attended_.resize(rows * query * size_of(D));
    gate_.resize(rows * shape.inner);
    up_.resize(rows * shape.inner);
    if (pass.adapters.count) sums_.resize(rows * pass.adapters.rank);
  }

  Seconds run(const std::vector<Layer>& layers, const float* last_norm) {
    each_row(shape_.width, [&](std::int64_t n) {
      run_loop<WidenRow<D>>(isa_, static_cast<const void*>(at<D>(pass_.hidden, n * shape_.width)),
                            shape_.width, &hidden_[n * shape_.width]);
    });
    for (std::size_t l = 0; l < layers.size(); ++l) {
      attention(layers[l], l);
      feed_forward(layers[l], l);
    }
    norm(last_norm);
    each_row(shape_.width, [&](std::int64_t n) {
      run_loop<Narrow<D>>(isa_, static_cast<const float*>(&normed_[n * shape_.width]), shape_.width,
                          static_cast<void*>(at<D>(pass_.out, n * shape_.width)));
    });
    lap(kRows);
    return seconds_;
  }

 private:
  void attention(const Layer& layer, std::size_t l) {
    norm(layer.input_norm);
    project(layer, l, normed_, shape_.width,
            {{kQuery, query_.data()}, {kKey, key_.data()}, {kValue, value_.data()}}, false);
    const std::int64_t heads = shape_.heads, kv_heads = shape_.kv_heads, head = shape_.head;
    each_row((heads + 2 * kv_heads) * head, [&](std::int64_t n) {
      const float* cosines = angles_.cosines + pass_.positions[n] * head;
      const float* sines = angles_.sines + pass_.positions[n] * head;
      for (std::int64_t h = 0; h < heads; ++h) {
        float* query = &query_[(n * heads + h) * head];
        if (layer.query_norm) norm_row(query, layer.query_norm, head, query);
        rotate(query, cosines, sines, at<D>(rotated_.data(), (n * heads + h) * head));
      }
      const std::int64_t slot = pass_.targets[n];
      for (std::int64_t h = 0; h < kv_heads; ++h) {
        float* key = &key_[(n * kv_heads + h) * head];
        if (layer.key_norm) norm_row(key, layer.key_norm, head, key);
        rotate(key, cosines, sines, at<D>(pass_.keys[l], (slot * kv_heads + h) * head));
      }
      run_loop<Narrow<D>>(isa_, static_cast<const float*>(&value_[n * kv_heads * head]),
                          kv_heads * head,
                          static_cast<void*>(at<D>(pass_.values[l], slot * kv_heads * head)));
    });
    lap(kRows);
    tree_attention({D,
                    pass_.rows,
                    heads,
                    kv_heads,
                    pass_.pool,
                    head,
                    head,
                    {rotated_.data(), heads * head, head},
                    {pass_.keys[l], kv_heads * head, head},
                    {pass_.values[l], kv_heads * head, head},
                    pass_.layout,
                    shape_.scaling,
                    layer.window,
                    0.0f,
                    attended_.data()},
                   isa_, threads_);
    lap(kAttention);
    each_row(heads * head, [&](std::int64_t n) {
      run_loop<WidenRow<D>>(isa_,
                            static_cast<const void*>(at<D>(attended_.data(), n * heads * head)),
                            heads * head, &query_[n * heads * head]);
    });
    project(layer, l, query_, heads * head, {{kOutput, hidden_.data()}}, true);
  }

  void feed_forward(const Layer& layer, std::size_t l) {
    norm(layer.attention_norm);
    project(layer, l, normed_, shape_.width, {{kGate, gate_.data()}, {kUp, up_.data()}}, false);
    each_row(shape_.inner, [&](std::int64_t n) {
      run_loop<Gate>(isa_, &gate_[n * shape_.inner],
                     static_cast<const float*>(&up_[n * shape_.inner]), shape_.inner);
    });
    project(layer, l, gate_, shape_.inner, {{kDown, hidden_.data()}}, true);
  }

  struct Wanted {
    int projection;
    float* out;
  };

  // Products of the same rows, with what adapters add to them.
  void project(const Layer& layer, std::size_t l, const std::vector<float>& x, std::int64_t inputs,
               std::initializer_list<Wanted> wanted, bool add) {
    Product products[3];
    std::int64_t count = 0;
    for (const Wanted& one : wanted) {
      const Projection& projection = layer.projections[one.projection];
      products[count++] = {projection.weight, projection.bias, one.out, add};
    }
    lap(kRows);
    multiply(x.data(), pass_.rows, products, count, isa_, threads_);
    lap(kProducts);
    const Adapters& adapters = pass_.adapters;
    if (!adapters.count) return;
    for (const Wanted& one : wanted) {
      const std::size_t index = l * kProjections + one.projection;
      if (!adapters.a[index]) continue;
      const std::int64_t outputs = layer.projections[one.projection].weight.outputs;
      add_lora({pass_.rows, inputs, outputs, adapters.count, adapters.rank, x.data(),
                adapters.a[index], adapters.b[index], adapters.segments, sums_.data(), one.out},
               isa_, threads_);
    }
    lap(kLora);
  }

  void norm(const float* weight) {
    each_row(shape_.width, [&](std::int64_t n) {
      norm_row(&hidden_[n * shape_.width], weight, shape_.width, &normed_[n * shape_.width]);
    });
  }

  void norm_row(const float* x, const float* weight, std::int64_t n, float* out) {
    run_loop<Norm>(isa_, x, weight, n, shape_.epsilon, out);
  }

  void rotate(const float* x, const float* cosines, const float* sines, char* out) {
    run_loop<Rotate<D>>(isa_, x, cosines, sines, shape_.head, static_cast<void*>(out));
  }

  // body(n) for every row; `width` numbers each decide how many threads it is worth.
  template <typename Body>
  void each_row(std::int64_t width, const Body& body) {
    const std::int64_t share = pass_.rows * width / kMinShare;
    const int team = static_cast<int>(std::clamp<std::int64_t>(share, 1, threads_));
    parallel_for(team, pass_.rows, [&](std::int64_t n, int) { body(n); });
  }

  // What has happened since the last lap was a part of this kind.
  void lap(int part) {
    const Clock::time_point now = Clock::now();
    seconds_[part] += std::chrono::duration<double>(now - since_).count();
    since_ = now;
  }

  using Clock = std::chrono::steady_clock;
  Clock::time_point since_ = Clock::now();
  Seconds seconds_{};
  const StackShape& shape_;
  const StackPass& pass_;
  const Angles& angles_;
  const Isa isa_;
  const int threads_;
  std::vector<float> hidden_, normed_, query_, key_, value_, gate_, up_, sums_;
  std::vector<char> rotated_, attended_;  // in the pool's format
};

}  // namespace

Seconds Stack::run(const StackPass& pass, const Angles& angles, Isa isa, int threads) const {
  for (std::int64_t n = 0; n < pass.rows; ++n) {
    if (pass.positions[n] < 0 || pass.positions[n] >= angles.count) {
      refuse("positions must be 0 to ", angles.count - 1, ", not ", pass.positions[n]);
    }
    if (pass.targets[n] < 0 || pass.targets[n] >= pass.pool) {
      refuse("targets must be slots from 0 to ", pass.pool - 1, ", not ", pass.targets[n]);
    }
  }
  Seconds seconds{};
  for (std::int64_t g = 0; g < pass.adapters.count; ++g) {
    const std::int32_t* segment = pass.adapters.segments + g;
    if (segment[0] < 0 || segment[1] < segment[0] || segment[1] > pass.rows) {
      refuse("segments must ascend from 0 to at most ", pass.rows, ", not hold ", segment[1],
             " after ", segment[0], " (index ", g + 1, ")");
    }
  }
  if (!pass.rows) return seconds;
  with_dtype(shape_.dtype, [&](auto dtype) {
    seconds = Pass<dtype()>(shape_, pass, angles, isa, threads).run(layers_, last_norm_);
  });
  return seconds;
}

}  // namespace fastguide
