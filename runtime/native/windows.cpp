#include "windows.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "model.h"

namespace moe {

namespace {

// Fewer are copied one by one.
constexpr int64_t SPREAD_LEAST = 4;

}  // namespace

windows::windows(ggml_backend_t stream, moe_model & model, std::function<void(int64_t)> wait_on)
    : stream_(stream), model_(model), wait_on_(std::move(wait_on)), spread_(stream, model) {}

void windows::begin(int layer) {
    // Copies for a layer that did not ask, which this stream's own would run into.
    wait_on_(model_.pools->begin_window(layer));
}

bool windows::is_lacking(int layer, int key) const { return model_.weights.layer_of(key) == layer && !model_.pools->is_in_window(key); }

void windows::copy_pooled(int layer, const int32_t * keys, int n) {
    pools &    p      = *model_.pools;
    const auto is_due = [&](int key) { return is_lacking(layer, key) && p.slot_of(key) >= 0; };
    int64_t    n_due = 0, ticket = 0;
    for (int i = 0; i < n; i++) {
        if (is_due(keys[i])) {
            ticket = std::max(ticket, p.ticket_of(layer, p.slot_of(keys[i])));
            n_due++;
        }
    }
    const int64_t of_all = n_due >= SPREAD_LEAST ? last_ticket(layer) : -1;
    ticket               = std::max(ticket, of_all);
    wait_on_(ticket);
    if (of_all >= 0 && spread_.launch(layer)) {
        p.hold_in_window(layer);
        return;
    }
    for (int i = 0; i < n; i++) {
        if (is_due(keys[i])) {
            p.copy_to_window(stream_, layer, p.slot_of(keys[i]));
        }
    }
}

// Of all that the layer's pool holds; -1 where a slot holds nothing, which would be a row for nobody.
int64_t windows::last_ticket(int layer) const {
    const pools & p      = *model_.pools;
    int64_t       ticket = 0;
    for (int slot = 0; slot < p.n_slots(layer); slot++) {
        ticket = p.key_of(layer, slot) < 0 ? INT64_MAX : std::max(ticket, p.ticket_of(layer, slot));
    }
    return ticket == INT64_MAX ? -1 : ticket;
}

void windows::copy_resident() {
    const dialogue &     said = model_.dialogue;
    std::vector<int32_t> keys;
    for (const dialogue::entry & e : said.entries) {
        if (e.slot < 0) {
            keys.push_back(model_.pools->key_of(said.call.layer, e.pool));
        }
    }
    copy_pooled(said.call.layer, keys.data(), (int)keys.size());
}

void windows::fill_next() {
    pools &          p    = *model_.pools;
    const moe_call & call = model_.dialogue.call;
    const int32_t *  keys = call.window_keys;
    const int        n    = std::min(call.n_window, model_.weights.n_experts);
    if (n <= 0 || !std::all_of(keys, keys + n, [this](int key) { return model_.weights.is_key(key); })) {
        return;
    }
    const int layer = model_.weights.layer_of(keys[0]);
    if (!p.has(layer) || p.is_whole(layer) || !p.are_apart(layer, call.layer)) {
        return;
    }
    // Whoever computed on that window last is done: the ids of this event's layer were waited for since.
    begin(layer);
    int n_sent = 0;
    for (int i = 0; i < n; i++) {
        const int slot = is_lacking(layer, keys[i]) && p.slot_of(keys[i]) < 0 ? model_.slot_in_memory(keys[i]) : -1;
        if (slot >= 0) {
            model_.upload(slot, layer, -1);
            n_sent++;
        }
    }
    if (n_sent) {
        p.issue();
        model_.stats.uploads_ahead += n_sent;
    }
    copy_pooled(layer, keys, n);
}

}  // namespace moe
