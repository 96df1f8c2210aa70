// Guessing with routers (Fate): the next layer's own, applied to what this layer's router read, and
// how far to trust what comes out. Knows no slots, no files and no time.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moe.h"

struct moe_gates {
    explicit moe_gates(const moe_gates_config & config);

    // See moe_gates_predict and the others in moe.h.
    void predict(int layer, const float * x, int64_t x_stride, int n_tokens, const float * logits = nullptr);
    // The layer whose logits for this one's input, [n_tokens][n_experts] without bias, predict() would take instead of
    // making them; -1: none's.
    int   next(int layer) const;
    void  observe(int layer, const int32_t * ids, int n_tokens, int n_used);
    void  forget();
    float recall(int layer) const;

    // What the last predict() said, the nearest layer first and of each the best guess first.
    struct prediction {
        int   layer;
        int   expert;
        float chance;
    };
    std::vector<prediction> predicted;

  private:
    // How often guesses came true, by the router's confidence and the rank of a guess.
    class calibration {
      public:
        explicit calibration(int n_used);
        int    cell(float confidence, int rank) const;
        double chance(int cell) const { return chance_[cell]; }
        void   count(int cell, bool right);
        void   learn();  // from what was counted since

      private:
        int                 n_used_;
        std::vector<double> right_, made_, chance_;
    };

    // A prediction that waits for the truth; [n_tokens][width], best guess first.
    struct waiting {
        int                  n_tokens = 0;  // 0: nothing waits
        std::vector<int32_t> experts, cells;
    };

    // Between two layers.
    struct passage {
        explicit passage(int n_used) : trust(n_used) {}
        calibration        trust;
        waiting            guess;
        std::vector<float> step;   // residual: how the router's input changes
        std::vector<float> shift;  // what that adds to logits
        std::vector<float> ratio;  // renorm
        int64_t            n_seen    = 0;
        int64_t            shift_due = 0;  // to be computed anew, when so many were seen
    };

    void          score(const moe_router & router, const float * x);
    void          rank(const moe_router & router, int width, int32_t * experts, float * confidence);
    const float * fed(const passage & p, const float * x, int n_embd);
    void          shift(const moe_router & router, passage & p);
    void          follow(int i, const float * x, int64_t x_stride, int n_tokens);
    void          vote(int layer, const passage & p);
    passage &     between(int from, int to);

    std::vector<moe_router>                routers_;
    std::vector<int>                       layers_;
    std::unordered_map<int, int>           index_;  // of a layer
    int                                    n_used_, width_, variant_, ahead_;
    std::map<std::pair<int, int>, passage> passages_;  // by indices
    std::vector<std::vector<float>>        means_;     // residual: of this step's inputs, by index
    std::vector<float>                     recall_;    // by index; -1: never predicted
    std::vector<float>                     fed_, logits_, scores_, trust_, confidence_;
    std::vector<int>                       order_;
    std::vector<double>                    votes_, none_;
};
