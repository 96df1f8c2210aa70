#include "pools.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

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
    : weights_(w), device_(device), stream_(ggml_backend_dev_init(device, nullptr)), slots_(w.n_layers) {
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
    if (buffer_) {
        ggml_backend_buffer_free(buffer_);
    }
    ggml_backend_free(stream_);
}

bool pools::allocate(const int32_t * n_slots) {
    ggml_backend_buffer_type_t type  = ggml_backend_dev_buffer_type(device_);
    const size_t               align = ggml_backend_buft_get_alignment(type);
    std::vector<size_t>        offsets;
    size_t                     bytes = 0;
    std::vector<ggml_tensor>   tensors;
    for (const moe_tensor & weight : weights_.tensors()) {
        tensors.push_back(shape(weight, n_slots[weight.layer]));
        offsets.push_back(bytes);
        bytes += n_slots[weight.layer] ? round_up(ggml_backend_buft_get_alloc_size(type, &tensors.back()), align) : 0;
    }
    buffer_ = ggml_backend_buft_alloc_buffer(type, bytes);
    if (buffer_ == nullptr) {
        return false;
    }
    ggml_backend_buffer_set_usage(buffer_, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_clear(buffer_, 0);  // kernels may read past the end of a row
    char * const base = (char *)ggml_backend_buffer_get_base(buffer_);
    for (size_t i = 0; i < tensors.size(); i++) {
        tensors[i].buffer = buffer_;
        tensors[i].data   = base + offsets[i];
    }
    tensors_ = std::move(tensors);
    for (int layer = 0; layer < weights_.n_layers; layer++) {
        slots_[layer].resize(weights_.of_layer(layer).empty() ? 0 : n_slots[layer]);
    }
    return true;
}

int64_t pools::upload(int layer, int slot, int key, const char * memory) {
    for (const moe_tensor * weight : weights_.of_layer(layer)) {
        ggml_tensor * t = tensor(*weight);
        ggml_backend_tensor_set_async(stream_, t, memory + weight->slot_offset[0], slot * t->nb[2], t->nb[2]);
        count.bytes += (int64_t)t->nb[2];
    }
    count.uploads++;
    issued_++;
    if (events_.empty()) {
        ggml_backend_synchronize(stream_);
        done(issued_);
    } else {
        ggml_backend_event_record(event_of(issued_), stream_);
    }
    slots_[layer][slot] = {key, issued_};
    return issued_;
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
