#include "executor.h"

#include <algorithm>

#include "table.h"

namespace moe {

// Limit on each of the two buffers that grow with pairs: ggml-cpu's table of rows
// (n_slots * pairs * 8 bytes) and the gathered activations.
constexpr int64_t WORK_BYTES = 32 << 20;
// An expert's pairs are never divided among rounds, and rounds of fewer pairs are not worth their graph.
constexpr int64_t MIN_PAIRS = 64;
// Batches of more tokens are guessed for at once: their computing takes long enough to hide it. An
// amount of work, whatever the phase.
constexpr int GUESS_FIRST_TOKENS = 8;
// ggml-cpu's own work buffers of the trunk's matmuls and the tiled kernels' per-thread scratch.
constexpr int64_t KERNEL_BYTES = 8 << 20;
// What is kept per slot beside its memory, here and by the controller.
constexpr int64_t SLOT_TABLE_BYTES = 72;

ggml_status executor::compute(ggml_cgraph * graph) {
    ggml_tensor ** nodes = ggml_graph_nodes(graph);
    const int      n     = ggml_graph_n_nodes(graph);
    int            first = 0;
    for (int i = 0; i < n; i++) {
        if (!is_lookup(nodes[i])) {
            continue;
        }
        const ggml_status status = run_nodes(nodes + first, i - first);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        if (!tables::of(nodes[i]).compute(nodes[i])) {
            return GGML_STATUS_FAILED;
        }
        first = i + 1;
    }
    return run_nodes(nodes + first, n - first);
}

ggml_status executor::run_nodes(ggml_tensor ** nodes, int n) {
    if (n > 0 && c_.recognise(nodes, n)) {
        return run_chain();
    }
    // Node by node: slower (an event per matmul), correct for anything.
    ggml_status status = GGML_STATUS_SUCCESS;
    int         plain  = 0;
    for (int i = 0; i <= n && status == GGML_STATUS_SUCCESS; i++) {
        const bool ours = i < n && nodes[i]->op == GGML_OP_MUL_MAT_ID && is_expert_weight(nodes[i]->src[0]);
        if (!ours && i < n) {
            continue;
        }
        status = graphs_.run_plain(nodes + plain, i - plain);
        plain  = i + 1;
        if (ours && status == GGML_STATUS_SUCCESS) {
            if (!c_.recognise(nodes + i, 1)) {
                return GGML_STATUS_FAILED;
            }
            c_.model->stats.generic++;
            status = run_chain();
        }
    }
    return status;
}

ggml_status executor::run_chain() {
    moe_model & model = *c_.model;
    if (c_.n_tokens == 0) {  // a ubatch none of whose rows is an output
        return GGML_STATUS_SUCCESS;
    }
    std::lock_guard<std::mutex> lock(model.step);
    const int64_t               t0 = model.reads->history.start();
    model.dialogue.ids.resize((size_t)c_.n_used * c_.n_tokens);
    rows_.ids(c_.ids, model.dialogue.ids.data());  // graph memory is reused
    const ggml_status status = model.dialogue.begin(c_) ? run_entries() : GGML_STATUS_FAILED;
    model.record(MOE_EVENT_LAYER, c_.layer, t0);
    model.dialogue.end(status != GGML_STATUS_SUCCESS);
    model.stats.scratch_bytes = std::max<int64_t>(model.stats.scratch_bytes, rows_.bytes());
    return status;
}

ggml_status executor::run_entries() {
    submit();
    const bool whole = is_whole();
    // Few tokens compute faster than they are guessed for, so that is left to the first moment in
    // which there is nothing to compute. Until then the disk is busy with this layer's reads.
    const bool guess_first = whole || c_.n_tokens > GUESS_FIRST_TOKENS;
    if (guess_first && !c_.model->dialogue.ask_for_guesses()) {
        return GGML_STATUS_FAILED;
    }
    return whole ? run_whole() : run_rounds(guess_first);
}

bool executor::is_whole() const {
    const moe_model & model = *c_.model;
    const int64_t     pairs = (int64_t)c_.n_used * c_.n_tokens;
    const auto &      plan  = model.dialogue.entries;
    return pairs * model.arena->n_slots() * 8 <= WORK_BYTES && std::all_of(plan.begin(), plan.end(), [&](const dialogue::entry & e) {
               return model.reads->state(e.slot) == slot_state::READY && e.waits_for < 0 && e.copy == 0;
           });
}

ggml_status executor::run_whole() {
    const dialogue & said = c_.model->dialogue;
    slot_of_.resize(c_.model->weights.n_experts);
    for (const dialogue::entry & e : said.entries) {
        slot_of_[e.expert] = e.slot;
    }
    slots_.resize(said.ids.size());
    std::transform(said.ids.begin(), said.ids.end(), slots_.begin(), [this](int expert) { return slot_of_[expert]; });
    c_.model->stats.whole++;
    return graphs_.run_whole(c_, slots_);
}

ggml_status executor::run_rounds(bool guessed) {
    dialogue &        said   = c_.model->dialogue;
    const ggml_status status = graphs_.keep_inputs(c_);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    said.input_moved(graphs_.kept(c_.x));
    if (guessed && expert_threads::suit(c_, WORK_BYTES)) {
        return threads_.run(c_, graphs_);
    }
    for (size_t left = said.entries.size(); left > 0;) {
        if (!find_ready()) {
            return GGML_STATUS_FAILED;
        }
        if (!ready_.empty()) {
            const ggml_status status = run_ready();
            if (status != GGML_STATUS_SUCCESS) {
                return status;
            }
            left -= ready_.size();
            submit();
        } else if (!guessed) {
            guessed = true;
            if (!said.ask_for_guesses()) {
                return GGML_STATUS_FAILED;
            }
        } else {
            wait_for_reads();
        }
    }
    return guessed || said.ask_for_guesses() ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

void executor::submit() {
    pending::submit(*c_.model);
    c_.model->dialogue.submit_guesses();
}

// The next round's entries, of one copy; false when a read has failed.
bool executor::find_ready() {
    moe_model &   model      = *c_.model;
    const auto &  entries    = model.dialogue.entries;
    const int64_t most_pairs = std::max(MIN_PAIRS, std::min(WORK_BYTES / 8 / model.arena->n_slots(), WORK_BYTES / c_.row_bytes));
    if (!next_.look(model)) {
        return false;
    }
    ready_.clear();
    int64_t taken = 0;
    for (size_t j = 0; j < std::min(next_.most, next_.there.size()); j++) {
        const dialogue::entry & e = entries[next_.there[j]];
        if (taken == 0 || (taken + e.count <= most_pairs && e.copy == round_.copy)) {
            ready_.push_back(next_.there[j]);
            taken += e.count;
            round_.copy = e.copy;
        }
    }
    return true;
}

ggml_status executor::run_ready() {
    dialogue & said = c_.model->dialogue;
    round_.pairs.clear();
    round_.slots.clear();
    round_.experts.clear();
    for (const int i : ready_) {
        dialogue::entry & e     = said.entries[i];
        const auto        pairs = said.pairs.begin() + e.first;
        round_.pairs.insert(round_.pairs.end(), pairs, pairs + e.count);
        round_.slots.insert(round_.slots.end(), e.count, e.slot);
        round_.experts.insert(round_.experts.end(), e.count, e.expert);
        e.taken = e.done = true;
    }
    return graphs_.run_round(c_, round_);
}

void executor::wait_for_reads() {
    moe_model &   model = *c_.model;
    const int64_t t0    = now_ns();
    model.reads->wait_any(next_.waiting);
    const int64_t stall_ns = now_ns() - t0;
    model.dialogue.stalled(stall_ns);
    model.stats.stall_ns += stall_ns;
    model.record(MOE_EVENT_STALL, c_.layer, t0);
}

// An event runs either whole, with ggml-cpu's table of rows, or in rounds, with its inputs kept and rows
// gathered: at most WORK_BYTES of them unless one expert has more. Either way ggml-cpu quantizes a
// matmul's input, to at most 1.2 bytes per element unless the weights are floats.
int64_t executor::work_bytes(const weights & w, int n_used, int n_tokens) {
    const int64_t pairs = (int64_t)n_tokens * n_used;
    int64_t       n_all = 0, row_bytes = 0, widest = 0;
    double        element = 1.2;
    for (int layer = 0; layer < w.n_layers; layer++) {
        int64_t bytes = 0;
        for (const moe_tensor * t : w.of_layer(layer)) {
            bytes += (t->ne[0] + t->ne[1]) * (int64_t)sizeof(float);
            widest = std::max(widest, t->ne[0]);
            for (const int32_t type : t->type) {
                if (type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16) {
                    element = sizeof(float);
                }
            }
        }
        n_all += w.of_layer(layer).empty() ? 0 : w.n_experts;
        row_bytes = std::max(row_bytes, bytes);
    }
    const int64_t whole     = std::min(WORK_BYTES, pairs * n_all * 8);
    const int64_t gathered  = std::min(pairs * row_bytes, std::max(WORK_BYTES, n_tokens * row_bytes));
    const int64_t kept      = n_tokens * widest * (int64_t)sizeof(float);
    const int64_t quantized = (int64_t)(pairs * widest * element);
    return KERNEL_BYTES + SLOT_TABLE_BYTES * n_all + std::max(whole, gathered + kept) + quantized;
}

}  // namespace moe
