#include "segments.h"

#include <algorithm>
#include <utility>

#include "chain.h"
#include "model.h"

namespace moe {

namespace {

constexpr size_t MAX_KNOWN = 64;

}  // namespace

bool is_ours(const ggml_tensor * node) { return node->op == GGML_OP_MUL_MAT_ID && is_expert_weight(node->src[0]); }

const std::vector<segment> & segments::of(ggml_cgraph * graph, bool & is_new) {
    const auto known = known_.find(graph->uid);
    is_new           = graph->uid == 0 || known == known_.end();
    if (!is_new) {
        return known->second;
    }
    if (graph->uid == 0) {
        return uncached_ = cut(graph);
    }
    if (known_.size() >= MAX_KNOWN) {
        known_.clear();
    }
    return known_[graph->uid] = cut(graph);
}

// The weight of a node that computes with experts which may not be there.
const moe_tensor * segments::asked(const ggml_tensor * node) const {
    const moe_tensor * weight = is_ours(node) ? model_.weights.find(node->src[0]) : nullptr;
    return weight && !model_.pools->is_whole(weight->layer) ? weight : nullptr;
}

// Behind the last matmul of that layer with the same choice of experts.
int segments::end_of(const ggml_cgraph * graph, int first, const moe_tensor & weight) const {
    int end = first + 1;
    for (int i = end; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        if (!is_ours(node)) {
            continue;
        }
        if (model_.weights.find(node->src[0])->layer != weight.layer || node->src[2] != graph->nodes[first]->src[2]) {
            break;
        }
        end = i + 1;
    }
    return end;
}

std::vector<segment> segments::cut(const ggml_cgraph * graph) const {
    std::vector<segment> cuts;
    const auto           add = [&](int begin, int end, bool asks, bool leads) {
        if (begin < end) {
            cuts.push_back({begin, end, asks, leads, {}});
            if (graph->uid != 0) {
                std::generate(cuts.back().uids.begin(), cuts.back().uids.end(), ggml_graph_next_uid);
            }
        }
    };
    int begin = 0;  // of the trunk's next segment
    for (int i = 0; i < graph->n_nodes; i++) {
        const moe_tensor * weight = asked(graph->nodes[i]);
        if (weight) {
            add(begin, i, false, true);
            begin = end_of(graph, i, *weight);
            add(i, begin, true, false);
            i = begin - 1;
        }
    }
    add(begin, graph->n_nodes, false, false);
    if (cuts.size() == 1) {
        cuts[0].uids[0] = graph->uid;
    }
    return cuts;
}

}  // namespace moe
