#include "gates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace {

// Of the averages that follow a run: the last few hundred tokens count.
constexpr double RATE = 1.0 / 256;
// Borders of the calibration's bins of confidence.
constexpr float CONFIDENCE[] = {0.01f, 0.02f, 0.05f, 0.1f, 0.2f, 0.4f, 0.6f, 0.8f, 0.95f};
constexpr int   N_CONFIDENCE = sizeof(CONFIDENCE) / sizeof(*CONFIDENCE) + 1;
// Its bins of ranks, in halves of the experts one token uses; the last takes the rest.
constexpr int N_RANKS = 8;

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

// The router's scores before any bias.
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
        default:  // softmax_weight gates after the choice
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

// ---- calibration

// Each cell starts from a Beta(1, 1) prior, which is one half.
moe_gates::calibration::calibration(int n_used)
    : n_used_(n_used), right_(N_CONFIDENCE * N_RANKS), made_(N_CONFIDENCE * N_RANKS), chance_(N_CONFIDENCE * N_RANKS, 0.5) {}

int moe_gates::calibration::cell(float confidence, int rank) const {
    const auto bin = std::upper_bound(std::begin(CONFIDENCE), std::end(CONFIDENCE), confidence) - std::begin(CONFIDENCE);
    return (int)bin * N_RANKS + std::min(rank * 2 / n_used_, N_RANKS - 1);
}

void moe_gates::calibration::count(int cell, bool right) {
    made_[cell] += 1;
    right_[cell] += right;
}

void moe_gates::calibration::learn() {
    for (size_t i = 0; i < made_.size(); i++) {
        if (made_[i] > 2 / RATE) {  // half of a full cell's past goes, so that it follows the text
            made_[i] /= 2;
            right_[i] /= 2;
        }
        chance_[i] = (right_[i] + 1) / (made_[i] + 2);
    }
}

// ---- gates

moe_gates::moe_gates(const moe_gates_config & config)
    : routers_(config.routers, config.routers + config.n_layers),
      layers_(config.layers, config.layers + config.n_layers),
      n_used_(config.n_used),
      width_(config.width),
      variant_(config.variant),
      ahead_(config.ahead),
      means_(config.n_layers),
      recall_(config.n_layers, -1.0f) {
    for (size_t i = 0; i < layers_.size(); i++) {
        index_[layers_[i]] = (int)i;
    }
}

moe_gates::passage & moe_gates::between(int from, int to) { return passages_.try_emplace({from, to}, n_used_).first->second; }

int moe_gates::next(int layer) const {
    const size_t i = index_.at(layer);
    return ahead_ == 1 && variant_ != MOE_GATES_RENORM && i + 1 < layers_.size() ? layers_[i + 1] : -1;
}

// The router's logits for one vector, without bias.
void moe_gates::score(const moe_router & router, const float * x) {
    logits_.resize(router.n_experts);
    for (int e = 0; e < router.n_experts; e++) {
        logits_[e] = dot(x, router.weight + (int64_t)e * router.n_embd, router.n_embd);
    }
}

// Computed as seldom as the step changes: it is as long as a prediction.
void moe_gates::shift(const moe_router & router, passage & p) {
    if (!p.step.empty() && p.n_seen >= p.shift_due) {
        score(router, p.step.data());
        p.shift     = logits_;
        p.shift_due = std::min(2 * p.n_seen, p.n_seen + (int64_t)(1 / RATE));
    }
}

// From those logits the `width` experts the router would choose first, best first.
void moe_gates::rank(const moe_router & router, int width, int32_t * experts, float * confidence) {
    const int n = router.n_experts;
    trust_.resize(n);
    order_.resize(n);
    if (router.logit_bias) {
        std::transform(logits_.begin(), logits_.end(), router.logit_bias, logits_.begin(), std::plus<>());
    }
    // Every gating grows with the logit, so without bias and groups the logits decide.
    scores_ = logits_;
    if (router.bias || router.n_groups > 1) {
        gate(router.gating, logits_.data(), scores_.data(), n);
        for (int e = 0; router.bias && e < n; e++) {
            scores_[e] += router.bias[e];
        }
        if (router.n_groups > 1) {
            mask_groups(router, scores_.data());
        }
    }
    for (float & score : scores_) {  // damaged weights; a sort must be able to compare
        score = std::isnan(score) ? -INFINITY : score;
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::partial_sort(order_.begin(), order_.begin() + width, order_.end(),
                      [this](int a, int b) { return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b; });
    // Not the chance of being chosen: a softmax is over all experts and several are chosen, a
    // sigmoid knows neither the others nor the bias. Calibration makes it one.
    const bool over_all = router.gating == MOE_GATING_SOFTMAX || router.gating == MOE_GATING_SOFTMAX_WEIGHT;
    gate(over_all ? MOE_GATING_SOFTMAX : MOE_GATING_SIGMOID, logits_.data(), trust_.data(), n);
    for (int i = 0; i < width; i++) {
        experts[i]    = order_[i];
        confidence[i] = trust_[order_[i]];
    }
}

// Learns how the router's input changes from each of the layers before to this one.
void moe_gates::follow(int i, const float * x, int64_t x_stride, int n_tokens) {
    std::vector<float> & mean   = means_[i];
    const int            n_embd = routers_[i].n_embd;
    mean.assign(n_embd, 0.0f);
    for (int t = 0; t < n_tokens; t++) {
        const float * row = (const float *)((const char *)x + t * x_stride);
        for (int d = 0; d < n_embd; d++) {
            mean[d] += row[d];
        }
    }
    for (int d = 0; d < n_embd; d++) {
        mean[d] /= (float)n_tokens;
    }
    for (int before = std::max(0, i - ahead_); before < i; before++) {
        const std::vector<float> & earlier = means_[before];
        if (earlier.empty()) {
            continue;
        }
        passage & p = between(before, i);
        p.step.resize(n_embd);
        p.n_seen += n_tokens;
        const float rate = (float)std::max(RATE, (double)n_tokens / (double)p.n_seen);
        for (int d = 0; d < n_embd; d++) {
            p.step[d] += rate * (mean[d] - earlier[d] - p.step[d]);
        }
    }
}

// What a router ahead is fed instead of this layer's own input.
const float * moe_gates::fed(const passage & p, const float * x, int n_embd) {
    fed_.resize(n_embd);
    if (!p.ratio.empty()) {
        std::transform(x, x + n_embd, p.ratio.begin(), fed_.begin(), std::multiplies<>());
    } else if (!p.step.empty()) {
        std::transform(x, x + n_embd, p.step.begin(), fed_.begin(), std::plus<>());
    } else {
        return x;
    }
    return fed_.data();
}

void moe_gates::predict(int layer, const float * x, int64_t x_stride, int n_tokens, const float * logits) {
    predicted.clear();
    const int i = index_.at(layer);
    if (variant_ == MOE_GATES_RESIDUAL) {
        follow(i, x, x_stride, n_tokens);
    }
    for (int to = i + 1; to <= i + ahead_ && to < (int)layers_.size(); to++) {
        const moe_router & router = routers_[to];
        passage &          p      = between(i, to);
        if (variant_ == MOE_GATES_RENORM && p.ratio.empty()) {
            p.ratio.resize(router.n_embd);
            for (int d = 0; d < router.n_embd; d++) {  // a weight of zero has wiped out what it multiplied
                p.ratio[d] = routers_[i].norm[d] == 0 ? 0 : router.norm[d] / routers_[i].norm[d];
            }
        }
        p.guess.n_tokens = n_tokens;
        p.guess.experts.resize((size_t)n_tokens * width_);
        p.guess.cells.resize((size_t)n_tokens * width_);
        confidence_.resize(width_);
        if (logits) {
            shift(router, p);
        }
        for (int t = 0; t < n_tokens; t++) {
            const float * row = (const float *)((const char *)x + t * x_stride);
            if (logits) {
                const float * of = logits + (int64_t)t * router.n_experts;
                logits_.assign(of, of + router.n_experts);
                std::transform(p.shift.begin(), p.shift.end(), of, logits_.begin(), std::plus<>());
            } else {
                score(router, fed(p, row, router.n_embd));
            }
            rank(router, width_, p.guess.experts.data() + (size_t)t * width_, confidence_.data());
            for (int r = 0; r < width_; r++) {
                p.guess.cells[(size_t)t * width_ + r] = p.trust.cell(confidence_[r], r);
            }
        }
        if (n_tokens > 1) {
            vote(layers_[to], p);
            continue;
        }
        for (int r = 0; r < width_; r++) {
            predicted.push_back({layers_[to], p.guess.experts[r], (float)p.trust.chance(p.guess.cells[r])});
        }
    }
}

// An expert's votes are the number of tokens expected to choose it; its chance is 1 - prod(1 - p).
void moe_gates::vote(int layer, const passage & p) {
    const int n = routers_[index_.at(layer)].n_experts;
    votes_.assign(n, 0.0);
    none_.assign(n, 0.0);
    for (size_t k = 0; k < p.guess.experts.size(); k++) {
        const double chance = p.trust.chance(p.guess.cells[k]);  // the prior keeps it below 1
        votes_[p.guess.experts[k]] += chance;
        none_[p.guess.experts[k]] += std::log1p(-chance);
    }
    order_.resize(n);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [this](int a, int b) { return votes_[a] > votes_[b]; });
    for (int e : order_) {
        if (votes_[e] > 0) {
            predicted.push_back({layer, e, (float)-std::expm1(none_[e])});
        }
    }
}

void moe_gates::observe(int layer, const int32_t * ids, int n_tokens, int n_used) {
    const int i = index_.at(layer);
    for (int from = std::max(0, i - ahead_); from < i; from++) {
        passage & p     = between(from, i);
        waiting & guess = p.guess;
        const int n     = std::exchange(guess.n_tokens, 0);
        // llama.cpp computes the last layer for fewer tokens where only those give output.
        if (n != n_tokens) {
            continue;
        }
        int n_right = 0;  // among the first n_used
        for (int t = 0; t < n; t++) {
            const int32_t * truth = ids + (int64_t)t * n_used;
            for (int r = 0; r < width_; r++) {
                const size_t k     = (size_t)t * width_ + r;
                const bool   right = std::find(truth, truth + n_used, guess.experts[k]) != truth + n_used;
                p.trust.count(guess.cells[k], right);
                n_right += right && r < n_used;
            }
        }
        p.trust.learn();
        if (from == i - 1) {
            const double now  = (double)n_right / ((double)n * n_used);
            const double past = recall_[i] < 0 ? now : recall_[i];
            recall_[i]        = (float)(now + std::pow(1 - RATE, n) * (past - now));
        }
    }
}

void moe_gates::forget() {
    for (auto & p : passages_) {
        p.second.guess.n_tokens = 0;
    }
    for (auto & mean : means_) {
        mean.clear();
    }
}

float moe_gates::recall(int layer) const { return recall_[index_.at(layer)]; }

// ---- moe.h

moe_gates * moe_gates_new(const moe_gates_config * config) { return new moe_gates(*config); }
void        moe_gates_free(moe_gates * gates) { delete gates; }

int32_t moe_gates_predict(moe_gates * gates, int32_t layer, const float * x, int64_t x_stride, int32_t n_tokens, int32_t * layers,
                          int32_t * experts, float * chances) {
    gates->predict(layer, x, x_stride, n_tokens);
    for (const auto & p : gates->predicted) {
        *layers++  = p.layer;
        *experts++ = p.expert;
        *chances++ = p.chance;
    }
    return (int32_t)gates->predicted.size();
}

void moe_gates_observe(moe_gates * gates, int32_t layer, const int32_t * ids, int32_t n_tokens, int32_t n_used) {
    gates->observe(layer, ids, n_tokens, n_used);
}

void  moe_gates_forget(moe_gates * gates) { gates->forget(); }
float moe_gates_recall(moe_gates * gates, int32_t layer) { return gates->recall(layer); }
