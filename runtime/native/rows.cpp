#include "rows.h"

#include <cstring>

namespace moe {

void rows::put(lifetime life, ggml_tensor * t) { t->data = memory_[life].take(ggml_nelements(t) * sizeof(float)); }

void rows::ids(const ggml_tensor * t, int32_t * out) {
    for (int64_t token = 0; token < t->ne[1]; token++) {
        for (int64_t rank = 0; rank < t->ne[0]; rank++) {
            *out++ = *(const int32_t *)((const char *)t->data + token * t->nb[1] + rank * t->nb[0]);
        }
    }
}

void rows::copy(const ggml_tensor * from, ggml_tensor * to) {
    const size_t row = from->ne[0] * sizeof(float);
    char *       out = (char *)to->data;
    for (int64_t i2 = 0; i2 < from->ne[2]; i2++) {
        for (int64_t i1 = 0; i1 < from->ne[1]; i1++, out += row) {
            memcpy(out, (const char *)from->data + i1 * from->nb[1] + i2 * from->nb[2], row);
        }
    }
}

void rows::gather(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to) {
    const size_t row = from->ne[0] * sizeof(float);
    char *       out = (char *)to->data;
    for (const int32_t p : pairs) {
        const int64_t token = p / n_used, rank = from->ne[1] == 1 ? 0 : p % n_used;
        memcpy(out, (const char *)from->data + rank * from->nb[1] + token * from->nb[2], row);
        out += row;
    }
}

void rows::scatter(const ggml_tensor * from, const std::vector<int32_t> & pairs, int n_used, ggml_tensor * to) {
    const size_t row = to->ne[0] * sizeof(float);
    const char * in  = (const char *)from->data;
    for (const int32_t p : pairs) {
        memcpy((char *)to->data + (p % n_used) * to->nb[1] + (p / n_used) * to->nb[2], in, row);
        in += row;
    }
}

}  // namespace moe
