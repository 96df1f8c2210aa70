#include "copies.h"

namespace moe {

// CUDA's limit of what may lie between two rows of a copy.
constexpr uintptr_t FARTHEST = INT32_MAX;

// Both behind, and clear of the first's bytes.
copies::stride copies::between(const copy & first, const copy & second) {
    const uintptr_t to = (uintptr_t)second.to - (uintptr_t)first.to, from = (uintptr_t)second.from - (uintptr_t)first.from;
    const bool      apart = to >= first.bytes && to <= FARTHEST && from >= first.bytes && from <= FARTHEST;
    return apart && first.buffer == second.buffer && first.bytes == second.bytes ? stride{to, from} : stride{0, 0};
}

void copies::send(ggml_backend_t stream, bool join) {
    for (size_t i = 0, n = 1; i < all_.size(); i += n) {
        stride apart{0, 0};
        for (n = 1; join && i + n < all_.size(); n++) {
            const stride next = between(all_[i + n - 1], all_[i + n]);
            if (next.to == 0 || (n > 1 && !(next == apart))) {
                break;
            }
            apart = next;
        }
        call(stream, all_[i], n, apart);
    }
    all_.clear();
}

// By a tensor of bytes from the first copy's to the end of the last one's.
void copies::call(ggml_backend_t stream, const copy & first, size_t n, const stride & apart) {
    ggml_tensor t{};
    t.type   = GGML_TYPE_I8;
    t.buffer = first.buffer;
    t.data   = first.to;
    t.ne[0]  = (int64_t)((n - 1) * apart.to + first.bytes);
    t.ne[1] = t.ne[2] = t.ne[3] = 1;
    t.nb[0]                     = 1;
    t.nb[1] = t.nb[2] = t.nb[3] = (size_t)t.ne[0];
    ggml_backend_tensor_set_2d_async(stream, &t, first.from, 0, first.bytes, n, apart.to, apart.from);
}

}  // namespace moe
