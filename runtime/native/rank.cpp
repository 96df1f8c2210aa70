// Guessing with a router: whom it would choose for a vector it was not made for. Does what
// policies/router.py does with a whole batch, without the interpreter: a guess is made per layer and
// token, with caches full of weights.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "moe.h"

namespace {

// Sixteen sums, so that the compiler may use vectors without being allowed to reorder.
float dot(const float * a, const float * b, int n) {
    float     sums[16] = {};
    const int whole    = n - n % 16;
    for (int i = 0; i < whole; i += 16) {
        for (int j = 0; j < 16; j++) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    float sum = std::accumulate(sums, sums + 16, 0.0f);
    for (int i = whole; i < n; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

void softmax(const float * logits, float * out, int n) {
    const float most = *std::max_element(logits, logits + n);
    float       sum  = 0;
    for (int e = 0; e < n; e++) {
        sum += out[e] = std::exp(logits[e] - most);
    }
    for (int e = 0; e < n; e++) {
        out[e] /= sum;
    }
}

void gate(int gating, const float * logits, float * out, int n) {
    switch (gating) {
        case MOE_GATING_SOFTMAX:
            softmax(logits, out, n);
            break;
        case MOE_GATING_SIGMOID:
            std::transform(logits, logits + n, out, sigmoid);
            break;
        case MOE_GATING_SQRT_SOFTPLUS:
            std::transform(logits, logits + n, out, [](float x) { return std::sqrt(x > 20 ? x : std::log1p(std::exp(x))); });
            break;
        default:  // softmax over the chosen: gates after the choice
            std::copy(logits, logits + n, out);
    }
}

// Excludes every expert outside the best groups; a group is as good as the sum of its two best.
void mask_groups(const moe_router & router, float * scores) {
    const int                          size = router.n_experts / router.n_groups;
    std::vector<std::pair<float, int>> groups;
    for (int g = 0; g < router.n_groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; e++) {
            second = std::max(second, std::min(best, scores[e]));
            best   = std::max(best, scores[e]);
        }
        groups.emplace_back(size > 1 ? best + second : best, g);
    }
    std::sort(groups.begin(), groups.end(), std::greater<>());
    for (size_t i = router.n_groups_used; i < groups.size(); i++) {
        std::fill_n(scores + groups[i].second * size, size, -INFINITY);
    }
}

}  // namespace

void moe_rank(const moe_router * which, const float * x, int64_t x_stride, int32_t n_tokens, const float * shift, int32_t width,
              int32_t * experts, float * confidence) {
    const moe_router & router = *which;
    const int          n      = router.n_experts;
    std::vector<float> fed(router.n_embd), logits(n), scores(n), trust(n);
    std::vector<int>   order(n);
    for (int t = 0; t < n_tokens; t++) {
        const float * row = (const float *)((const char *)x + t * x_stride);
        if (shift) {
            std::transform(row, row + router.n_embd, shift, fed.begin(), std::plus<>());
            row = fed.data();
        }
        for (int e = 0; e < n; e++) {
            logits[e] =
                dot(row, router.weight + (int64_t)e * router.n_embd, router.n_embd) + (router.logit_bias ? router.logit_bias[e] : 0);
        }
        // Every gating grows with the logit, so without bias and groups the logits decide.
        scores = logits;
        if (router.bias || router.n_groups > 1) {
            gate(router.gating, logits.data(), scores.data(), n);
            for (int e = 0; router.bias && e < n; e++) {
                scores[e] += router.bias[e];
            }
            if (router.n_groups > 1) {
                mask_groups(router, scores.data());
            }
        }
        for (float & score : scores) {  // damaged weights; a sort must be able to compare
            score = std::isnan(score) ? -INFINITY : score;
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + width, order.end(),
                          [&](int a, int b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
        if (router.gating == MOE_GATING_SOFTMAX || router.gating == MOE_GATING_SOFTMAX_WEIGHT) {
            softmax(logits.data(), trust.data(), n);
        } else {
            gate(MOE_GATING_SIGMOID, logits.data(), trust.data(), n);
        }
        for (int i = 0; i < width; i++) {
            *experts++    = order[i];
            *confidence++ = trust[order[i]];
        }
    }
}
