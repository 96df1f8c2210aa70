#include "pools.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "os.h"

namespace moe {

namespace {

// An event is recorded anew when so many tickets have passed: whoever still waits for it waits longer.
constexpr int N_EVENTS = 64;

size_t round_up(size_t x, size_t align) { return (x + align - 1) / align * align; }

ggml_tensor shape(const moe_tensor & weight, int n_slots) {
    ggml_tensor t{};
    t.type  = (enum ggml_type)weight.type[0];
    t.ne[0] = weight.ne[0];
    t.ne[1] = weight.ne[1];
    t.ne[2] = n_slots;
    t.ne[3] = 1;
    t.nb[0] = ggml_type_size(t.type);
    t.nb[1] = ggml_row_size(t.type, t.ne[0]);
    t.nb[2] = t.nb[1] * t.ne[1];
    t.nb[3] = t.nb[2] * t.ne[2];
    snprintf(t.name, sizeof(t.name), "%s", weight.name);
    return t;
}

}  // namespace

pools::pools(const weights & w, ggml_backend_dev_t device)
    : weights_(w), device_(device), stream_(ggml_backend_dev_init(device, nullptr)), where_(w.n_keys(), -1), slots_(w.n_layers) {
    if (stream_ == nullptr) {
        throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device) + " cannot be used");
    }
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    if (props.caps.events) {
        before_ = ggml_backend_event_new(device);
        for (int i = 0; i < N_EVENTS; i++) {
            events_.push_back(ggml_backend_event_new(device));
        }
    }
}

pools::~pools() {
    ggml_backend_synchronize(stream_);
    for (ggml_backend_event_t event : events_) {
        ggml_backend_event_free(event);
    }
    if (before_) {
        ggml_backend_event_free(before_);
    }
    for (const window_room & w : windows_) {
        if (w.buffer) {
            ggml_backend_buffer_free(w.buffer);
        }
    }
    if (buffer_) {
        ggml_backend_buffer_free(buffer_);
    }
    ggml_backend_free(stream_);
}

// Makes the tensors and their memory; `stacked`: those of different layers lie in the same place.
bool pools::place(std::vector<ggml_tensor> & tensors, const int32_t * n_slots, bool stacked, ggml_backend_buffer_t & buffer) {
    ggml_backend_buffer_type_t type  = ggml_backend_dev_buffer_type(device_);
    const size_t               align = ggml_backend_buft_get_alignment(type);
    std::vector<size_t>        offsets;
    size_t                     bytes = 0, most = 0;
    int                        layer = -1;
    for (const moe_tensor & weight : weights_.tensors()) {
        const int n = n_slots ? n_slots[weight.layer] : weights_.n_experts;
        bytes       = stacked && weight.layer != layer ? 0 : bytes;
        layer       = weight.layer;
        tensors.push_back(shape(weight, n));
        offsets.push_back(bytes);
        bytes += n ? round_up(ggml_backend_buft_get_alloc_size(type, &tensors.back()), align) : 0;
        most = std::max(most, bytes);
    }
    buffer = ggml_backend_buft_alloc_buffer(type, most);
    if (buffer == nullptr) {
        tensors.clear();
        return false;
    }
    ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffer, 0);  // kernels may read past the end of a row
    for (size_t i = 0; i < tensors.size(); i++) {
        tensors[i].buffer = buffer;
        tensors[i].data   = (char *)ggml_backend_buffer_get_base(buffer) + offsets[i];
    }
    return true;
}

bool pools::allocate(const int32_t * n_slots, int n_windows) {
    if (!place(tensors_, n_slots, false, buffer_)) {
        return false;
    }
    turn_.resize(weights_.n_layers);
    for (int layer = 0, turn = 0; layer < weights_.n_layers; layer++) {
        slots_[layer].resize(weights_.of_layer(layer).empty() ? 0 : n_slots[layer]);
        turn_[layer] = n_windows ? turn % n_windows : 0;
        turn += has(layer) && !is_whole(layer);
    }
    for (int i = 0; i < n_windows; i++) {
        windows_.emplace_back();
        if (!place(windows_.back().tensors, nullptr, true, windows_.back().buffer)) {
            return false;
        }
    }
    return true;
}

void pools::issue() {
    send();
    for (const exchange & x : exchanges_) {
        copy(stream_, x);
    }
    exchanges_.clear();
    issued_++;
    if (events_.empty()) {
        ggml_backend_synchronize(stream_);
        done(issued_);
    } else {
        ggml_backend_event_record(event_of(issued_), stream_);
    }
}

// Of uploads in the order of slots: how many lie evenly apart from the first on.
size_t pools::neighbours(size_t first) const {
    size_t n = 1;
    for (; first + n < due_.size(); n++) {
        const upload_due &a = due_[first + n - 1], &b = due_[first + n];
        const bool        is_next = a.to == b.to && a.layer == b.layer && a.slot + 1 == b.slot;
        if (!is_next || b.memory - a.memory != due_[first + 1].memory - due_[first].memory) {
            break;
        }
    }
    return n;
}

void pools::add(const upload_due & u, const moe_tensor & weight) {
    const ggml_tensor & t = (*u.to)[weights_.index_of(weight)];
    copies_.add(t.buffer, (char *)t.data + u.slot * t.nb[2], u.memory + weight.slot_offset[0], t.nb[2]);
    count.bytes += (int64_t)t.nb[2];
}

// Where neighbours are many, each matrix of all of them in turn, else all matrices of each.
void pools::send() {
    std::stable_sort(due_.begin(), due_.end(), [](const upload_due & a, const upload_due & b) {
        return std::tie(a.to, a.layer, a.slot) < std::tie(b.to, b.layer, b.slot);
    });
    for (size_t i = 0, n = 1; i < due_.size(); i += n) {
        n                   = neighbours(i);
        const auto & matrix = weights_.of_layer(due_[i].layer);
        if (n < matrix.size()) {
            n = 1;
        }
        for (const moe_tensor * weight : matrix) {
            for (size_t k = i; k < i + n; k++) {
                add(due_[k], *weight);
            }
        }
    }
    count.uploads += (int64_t)due_.size();
    copies_.send(stream_, joins_);
    due_.clear();
}

int64_t pools::upload(int layer, int slot, int key, const char * memory) {
    note(tensors_, layer, slot, memory);
    hold(layer, slot, key);
    return issued_ + 1;
}

void pools::hold(int layer, int slot, int key) {
    forget(layer, slot);
    where_[key]         = slot;
    slots_[layer][slot] = {key, issued_ + 1};
}

void pools::forget(int layer, int slot) {
    int & key = slots_[layer][slot].key;
    if (key >= 0) {
        where_[key] = -1;
    }
    key = -1;
}

int64_t pools::upload_to_window(int key, const char * memory) {
    const int     layer = weights_.layer_of(key), expert = weights_.expert_of(key);
    window_room & w = window_of(layer);
    w.holds[expert] = 1;
    w.ticket        = issued_ + 1;
    note(w.tensors, layer, expert, memory);
    return w.ticket;
}

int64_t pools::begin_window(int layer) {
    window_room & w = window_of(layer);
    if (w.layer == layer) {
        return 0;
    }
    w.layer = layer;
    w.holds.assign(weights_.n_experts, 0);
    return w.ticket;
}

bool pools::is_in_window(int key) const {
    const window_room & w = window_of(weights_.layer_of(key));
    return w.layer == weights_.layer_of(key) && w.holds[weights_.expert_of(key)];
}

void pools::copy_to_window(int layer, int slot) {
    window_room & w = window_of(layer);
    exchanges_.push_back({layer, slot, true});
    w.holds[weights_.expert_of(slots_[layer][slot].key)] = 1;
    w.ticket                                             = issued_ + 1;
}

void pools::copy_to_window(ggml_backend_t stream, int layer, int slot) {
    window_of(layer).holds[weights_.expert_of(slots_[layer][slot].key)] = 1;
    copy(stream, {layer, slot, true});
}

void pools::keep_from_window(int layer, int slot, int key) {
    exchanges_.push_back({layer, slot, false});
    hold(layer, slot, key);
    window_of(layer).ticket = issued_ + 1;  // the next layer's may not come before
}

void pools::copy(ggml_backend_t stream, const exchange & x) {
    const int expert = weights_.expert_of(slots_[x.layer][x.slot].key);
    for (const moe_tensor * weight : weights_.of_layer(x.layer)) {
        const int   index = weights_.index_of(*weight);
        ggml_tensor from = tensors_[index], to = window_of(x.layer).tensors[index];
        from.data  = (char *)from.data + x.slot * from.nb[2];
        to.data    = (char *)to.data + expert * to.nb[2];
        from.ne[2] = to.ne[2] = 1;
        from.nb[3] = to.nb[3] = from.nb[2];
        if (!x.to_window) {
            std::swap(from, to);
        }
        ggml_backend_tensor_copy_async(stream, stream, &from, &to);
    }
}

void pools::hold_in_window(int layer) {
    for (const slot & s : slots_[layer]) {
        window_of(layer).holds[weights_.expert_of(s.key)] = 1;
    }
}

// Twice: the first copies may set things up.
int64_t pools::copy_ns(int layer, int n, const std::function<const char *(int)> & memory) {
    const counters counted = count;
    int64_t        t0      = 0;
    for (int round = 0; round < 2; round++) {
        t0 = now_ns();
        for (int i = 0; i < n; i++) {
            note(tensors_, layer, i % n_slots(layer), memory(i));
            send();
        }
        issue();
        settle(issued_);
    }
    count = counted;
    return now_ns() - t0;
}

void pools::wait_on(ggml_backend_t stream, int64_t ticket) {
    if (ticket > done_) {
        ggml_backend_event_wait(stream, event_of(ticket));
    }
}

void pools::wait_for(ggml_backend_t stream) {
    if (before_ == nullptr) {
        ggml_backend_synchronize(stream);
        return;
    }
    ggml_backend_event_record(before_, stream);
    ggml_backend_event_wait(stream_, before_);
}

void pools::settle(int64_t ticket) {
    if (ticket > done_) {
        ggml_backend_event_synchronize(event_of(ticket));
        done(ticket);
    }
}

}  // namespace moe
