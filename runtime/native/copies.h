// Copies from host memory to a device's, handed to a stream together, those that lie evenly apart in one call.
//
// Between two calls a link carries nothing for a while: three copies of 0.9 MB took 57 us on an H200 whose link
// carries their bytes in 48. An expert's matrices lie as far apart in host memory as every other's do, and in a
// pool too if they are of the same size; of experts that are neighbours in both, each matrix does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ggml-iface.h"

namespace moe {

class copies {
  public:
    // The next bytes to be copied, to memory of that buffer.
    void add(ggml_backend_buffer_t buffer, char * to, const char * from, size_t bytes) { all_.push_back({buffer, to, from, bytes}); }
    // In this order, joined or each by itself. Nothing is left.
    void send(ggml_backend_t stream, bool join);

  private:
    struct copy {
        ggml_backend_buffer_t buffer;
        char *                to;
        const char *          from;
        size_t                bytes;
    };
    // How far the second of two lies behind the first; 0: they cannot go together.
    struct stride {
        size_t to, from;
        bool   operator==(const stride & other) const { return to == other.to && from == other.from; }
    };
    static stride between(const copy & first, const copy & second);
    static void   call(ggml_backend_t stream, const copy & first, size_t n, const stride & apart);

    std::vector<copy> all_;
};

}  // namespace moe
