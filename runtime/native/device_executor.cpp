#include "device_executor.h"

#include <algorithm>
#include <cstring>

#include "model.h"
#include "pending.h"

namespace moe {

namespace {

// Inputs of larger batches stay on the device: nobody is asked to guess from them, nor does the processor
// compute any of their experts, which have many rows each.
constexpr int GUESS_TOKENS = next_router::MAX_TOKENS, COMPUTE_TOKENS = 128;

}  // namespace

device_executor::device_executor(ggml_backend_t stream, moe_model & model)
    : stream_(stream),
      model_(model),
      segments_(model),
      ranges_(stream),
      router_(stream, model),
      fetched_(stream),
      inputs_(stream),
      slots_(stream),
      cpu_(stream),
      windows_(stream, model, [this](int64_t ticket) { wait_on(ticket); }) {}

device_executor::~device_executor() {
    std::lock_guard<std::mutex> lock(model_.step);
    ggml_backend_synchronize(stream_);
    if (model_.computing == stream_) {
        model_.computing = nullptr;
    }
}

ggml_status device_executor::compute(ggml_cgraph * graph) {
    if (!model_.pools->is_allocated()) {
        model_.failure.set(ERROR_OTHER, "the model has no slots on the device");
        return GGML_STATUS_FAILED;
    }
    bool         is_new = false;
    const auto & cuts   = segments_.of(graph, is_new);
    if (is_new) {
        router_.find(graph);
    }
    for (size_t i = 0; i < cuts.size(); i++) {
        const segment *   behind = i + 1 < cuts.size() && !cuts[i + 1].asks ? &cuts[i + 1] : nullptr;
        const ggml_status status = cuts[i].asks ? experts(graph, cuts[i], behind) : launch(graph, cuts[i], nullptr);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        i += cuts[i].asks && behind;
    }
    return GGML_STATUS_SUCCESS;
}

// With the segment behind it, if there is one. The nodes of layers that ask take their ids from `slots`, if there are any.
ggml_status device_executor::launch(ggml_cgraph * graph, const segment & s, ggml_tensor * slots, const segment * behind) {
    struct patch {
        ggml_tensor *node, *weight, *ids;
    };
    std::vector<patch> patches;
    const segment &    last = behind ? *behind : s;
    ggml_cgraph        view = ggml_graph_view(graph, s.begin, last.end);
    int                how  = (wide_ ? FROM_WINDOW : 0) | (behind ? WITH_TRUNK : 0);
    if (last.leads && guesses_ && router_.append(view, graph->nodes[last.end])) {
        how |= WITH_ROUTER;
    }
    view.uid = ranges_.has_moved() ? 0 : s.uids[how];
    for (int i = s.begin; i < last.end; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (!is_ours(node)) {
            continue;
        }
        const moe_tensor & weight = *model_.weights.find(node->src[0]);
        const bool         asks   = i < s.end && s.asks;
        patches.push_back({node, node->src[0], node->src[2]});
        node->src[0] = asks && wide_ ? model_.pools->window(weight) : model_.pools->tensor(weight);
        node->src[2] = asks && slots ? slots : node->src[2];
    }
    const ggml_status status = ggml_backend_graph_compute_async(stream_, &view);
    for (const patch & p : patches) {
        p.node->src[0] = p.weight;
        p.node->src[2] = p.ids;
    }
    return status;
}

// ---- experts

// `behind` is launched with it, or is null afterwards.
ggml_status device_executor::experts(ggml_cgraph * graph, const segment & s, const segment *& behind) {
    const segment * trunk = nullptr;
    std::swap(behind, trunk);
    look_ahead();
    if (!fetch(graph->nodes + s.begin, s.end - s.begin)) {
        return GGML_STATUS_FAILED;
    }
    const int n_tokens = (int)c_.ids->ne[1];
    if (n_tokens == 0) {  // a ubatch none of whose rows is an output
        return GGML_STATUS_SUCCESS;
    }
    std::lock_guard<std::mutex> lock(model_.step);
    take_over();
    const bool fits = fitting(0) == n_tokens;
    if (!has_inputs_ && (fits || model_.pools->has_window())) {  // else the processor's rows come between
        behind = trunk;
    }
    if (!fits) {
        if (model_.pools->has_window()) {
            wide_                    = true;
            const ggml_status status = event(0, n_tokens, [&] { return launch(graph, s, nullptr, behind); });
            wide_                    = false;
            return status;
        }
        has_inputs_ = false;
        if (whole_.recognise(graph->nodes + s.begin, s.end - s.begin)) {
            return in_ranges();
        }
        return GGML_STATUS_FAILED;
    }
    ggml_tensor * slots = ranges_.slots(c_.n_used, n_tokens);
    return event(0, n_tokens, [&] {
        ranges_.send(slots_.data<int32_t>(), nullptr, 0, n_tokens);
        return launch(graph, s, slots, behind);
    });
}

// The device computes on meanwhile.
void device_executor::look_ahead() {
    std::lock_guard<std::mutex> lock(model_.step);
    if (model_.dialogue.n_events() == passed_) {
        model_.dialogue.look_ahead();
    }
}

bool device_executor::tell() {
    std::lock_guard<std::mutex> lock(model_.step);
    return model_.dialogue.tell();
}

// Takes the ids to the host, and the input as far as guesses want it: the one wait of a layer, during which the
// event before is told of.
bool device_executor::fetch(ggml_tensor * const * nodes, int n) {
    c_.nodes.clear();
    std::copy_if(nodes, nodes + n, std::back_inserter(c_.nodes), is_ours);
    const ggml_tensor * first = c_.nodes.front();
    const ggml_tensor * ids   = first->src[2];
    const ggml_tensor * x     = first->src[1];
    c_.model                  = &model_;
    c_.layer                  = model_.weights.find(first->src[0])->layer;
    c_.ids                    = ids;
    c_.n_used                 = (int)ids->ne[0];
    x_                        = *x;
    x_.data                   = nullptr;
    const size_t n_bytes      = ggml_nbytes(ids);
    fetched_.resize(n_bytes);
    if (ids->ne[1] == 0) {
        return true;
    }
    ggml_backend_tensor_get_async(stream_, ids, fetched_.data(), 0, n_bytes);
    router_.fetch();
    has_inputs_ = false;
    if (model_.cpu_experts && ids->ne[1] <= COMPUTE_TOKENS) {
        int32_t & rest = model_.dialogue.call.cpu_rest;
        if (rest > 0) {
            rest--;
        } else {
            has_inputs_ = whole_.recognise(nodes, n) && cpu_.prepare(whole_);
        }
    }
    if (ids->ne[1] <= GUESS_TOKENS) {
        fetch_input(x);
    }
    if (!tell()) {
        return false;
    }
    const int64_t t0 = now_ns();
    ggml_backend_synchronize(stream_);
    model_.stats.wait_ns += now_ns() - t0;
    model_.stats.waits++;
    model_.pools->done(waited_);
    ids_.clear();
    for (int64_t token = 0; token < ids->ne[1]; token++) {
        for (int64_t rank = 0; rank < ids->ne[0]; rank++) {
            ids_.push_back(*(const int32_t *)(fetched_.data() + token * ids->nb[1] + rank * ids->nb[0]));
        }
    }
    slots_.resize(ids_.size() * sizeof(int32_t));
    return true;
}

// For guesses; it may be on its way already.
void device_executor::fetch_input(const ggml_tensor * x) {
    if (!guesses_) {
        return;
    }
    x_.data = has_inputs_ ? (void *)cpu_.input(x) : nullptr;
    if (x_.data == nullptr) {
        inputs_.resize(ggml_nbytes(x));
        ggml_backend_tensor_get_async(stream_, x, inputs_.data(), 0, ggml_nbytes(x));
        x_.data = inputs_.data();
    }
}

// One context at a time: what the one before launched may still read the slots that this one fills.
void device_executor::take_over() {
    if (model_.computing && model_.computing != stream_) {
        ggml_backend_synchronize(model_.computing);
    }
    model_.computing = stream_;
}

// The end of the tokens from `first` on whose experts fit the pool together.
int device_executor::fitting(int first) {
    const int n_tokens = (int)(ids_.size() / c_.n_used), n_slots = model_.pools->n_slots(c_.layer);
    in_range_.resize(model_.weights.n_experts, 0);
    range_++;
    int n = 0;
    for (int token = first; token < n_tokens; token++) {
        for (int i = token * c_.n_used; i < (token + 1) * c_.n_used; i++) {
            const int32_t e = ids_[i];  // the dialogue refuses one that does not exist
            if (e >= 0 && e < model_.weights.n_experts && in_range_[e] != range_) {
                in_range_[e] = range_;
                n++;
            }
        }
        if (n > n_slots) {
            return token;
        }
    }
    return n_tokens;
}

ggml_status device_executor::in_ranges() {
    const int n_tokens = (int)(ids_.size() / c_.n_used);
    ranges_.slots(c_.n_used, n_tokens);
    ggml_status status = ranges_.keep(whole_);
    for (int first = 0; first < n_tokens && status == GGML_STATUS_SUCCESS;) {
        const int last = fitting(first);
        if (last == first) {
            model_.failure.set(ERROR_OTHER, "a token needs more experts than the device has slots for in a layer");
            return GGML_STATUS_FAILED;
        }
        if (first > 0) {
            model_.pools->wait_for(stream_);
        }
        status = event(first, last, [&] {
            ranges_.send(slots_.data<int32_t>(), ids_.data(), first, last);
            return ranges_.run(whole_, first, last,
                               [this](const ggml_tensor * w) { return model_.pools->tensor(*model_.weights.find(w)); });
        });
        model_.stats.ranges++;
        first = last;
    }
    return status;
}

// Asks for the experts of these tokens and has the stream wait for them; their slots are in slots_ when it is
// launched. The processor's part is computed meanwhile and sent after it.
ggml_status device_executor::event(int first, int last, const std::function<ggml_status()> & launch) {
    dialogue &    said = model_.dialogue;
    const int64_t t0   = model_.reads->history.start();
    ggml_tensor   x    = x_;
    x.data             = x_.data ? (char *)x_.data + first * x_.nb[2] : nullptr;
    said.next_logits   = router_.logits() ? router_.logits() + (ptrdiff_t)first * model_.weights.n_experts : nullptr;
    c_.x               = &x;
    c_.n_tokens        = last - first;
    said.ids.assign(ids_.begin() + (ptrdiff_t)first * c_.n_used, ids_.begin() + (ptrdiff_t)last * c_.n_used);
    said.call.may_compute = has_inputs_;
    computes_ = asked_ = false;
    if (wide_) {
        windows_.begin(c_.layer);
    }

    bool ok  = said.begin(c_);
    passed_  = said.call.passed ? said.n_events() : -1;
    guesses_ = said.call.wants_guesses || (said.call.passed && said.call.may_copy && said.gates);
    if (x.data == nullptr) {  // this one was not told of
        said.call.wants_guesses = 0;
    }
    ggml_status status = GGML_STATUS_FAILED;
    if (ok && bring(false)) {
        use_slots(first);
        status = launch();
        if (status == GGML_STATUS_SUCCESS && wide_) {
            windows_.fill_next();
        }
        if (status == GGML_STATUS_SUCCESS && !bring(true)) {
            status = GGML_STATUS_FAILED;
        }
        if (status == GGML_STATUS_SUCCESS && computes_) {
            cpu_.send();
        }
    }
    model_.record(MOE_EVENT_LAYER, c_.layer, t0);
    said.end(status != GGML_STATUS_SUCCESS);
    c_.x = nullptr;
    return status;
}

// Has the stream wait for what the event computes on; where that is a pool, its slots are in slots_ then.
void device_executor::use_slots(int first) {
    const dialogue & said   = model_.dialogue;
    int64_t          ticket = wide_ ? model_.pools->window_ticket(c_.layer) : 0;
    for (const dialogue::entry & e : said.entries) {
        if (wide_) {
            break;
        }
        if (!e.on_cpu) {
            ticket = std::max(ticket, model_.pools->ticket_of(c_.layer, e.pool));
        }
        const int32_t slot = e.on_cpu ? unused_slot() : e.pool;
        for (int i = e.first; i < e.first + e.count; i++) {
            slots_.data<int32_t>()[first * c_.n_used + said.pairs[i]] = slot;
        }
    }
    wait_on(ticket);
}

// Where the device computes rows that the processor's will replace: not among those of an expert, for kernels
// are chosen by the rows it has. There is one, since all of the event's experts would fit the pool.
int32_t device_executor::unused_slot() const {
    const auto & entries = model_.dialogue.entries;
    int32_t      slot    = 0;
    while (std::any_of(entries.begin(), entries.end(), [slot](const auto & e) { return !e.on_cpu && e.pool == slot; })) {
        slot++;
    }
    return slot;
}

void device_executor::wait_on(int64_t ticket) {
    if (ticket > waited_) {
        model_.pools->wait_on(stream_, ticket);
        waited_ = ticket;
    }
}

// Every expert of the plan that the device computes into its slot of the pool, each as soon as it is in host
// memory; `all`: until the processor has computed the others too, which it does before if there is nothing
// else to do.
bool device_executor::bring(bool all) {
    dialogue & said = model_.dialogue;
    pending::submit(model_);
    bool copied = !wide_ || all;
    for (;;) {
        const auto & entries = said.entries;
        const bool   done =
            std::all_of(entries.begin(), entries.end(), [all](const auto & e) { return e.done || e.slot < 0 || (e.on_cpu && !all); });
        if (done && asked_) {
            return true;
        }
        bool any = false;
        if (!advance(any)) {
            return false;
        }
        if (!copied) {  // now that the link is busy
            copied = true;
            windows_.copy_resident();
        }
        if (any) {
            pending::submit(model_);
        } else if (!asked_) {
            asked_ = true;
            if (!said.ask_for_guesses()) {
                return false;
            }
        } else if (!there_.empty()) {
            if (!compute_there()) {
                return false;
            }
            pending::submit(model_);
        } else if (!waiting_.empty()) {
            const int64_t t0 = now_ns();
            model_.reads->wait_any(waiting_);
            said.stalled(now_ns() - t0);
            model_.stats.stall_ns += now_ns() - t0;
            model_.record(MOE_EVENT_STALL, c_.layer, t0);
        }
    }
}

// The experts that are there for the processor. What is to be in the pool later is copied meanwhile.
bool device_executor::compute_there() {
    moe_call & call = model_.dialogue.call;
    for (const dialogue::entry * e : there_) {
        if (e->pool >= 0) {
            model_.upload(e->slot, c_.layer, e->pool);
            model_.pools->issue();
        }
    }
    const int64_t t0 = now_ns();
    computes_        = computes_ || cpu_.begin(ids_.data());
    if (!computes_ || cpu_.compute(there_) != GGML_STATUS_SUCCESS) {
        return false;
    }
    const int64_t ns = now_ns() - t0;
    for (dialogue::entry * e : there_) {
        e->done = true;
        call.cpu_pairs += e->count;
        model_.stats.cpu_pairs += e->count;
    }
    call.cpu_experts += (int32_t)there_.size();
    call.cpu_ns += ns;
    model_.stats.cpu_experts += (int64_t)there_.size();
    model_.stats.cpu_ns += ns;
    return true;
}

// Starts copying what has arrived in host memory; false when a read has failed.
bool device_executor::advance(bool & any) {
    waiting_.clear();
    there_.clear();
    for (dialogue::entry & e : model_.dialogue.entries) {
        if (e.done || e.slot < 0 || (e.load && !e.submitted)) {
            continue;
        }
        switch (model_.reads->state(e.slot)) {
            case slot_state::FAILED:
                model_.pools->issue();  // of what has been started
                model_.failure.set(ERROR_READ, model_.reads->last_error());
                return false;
            case slot_state::READY:
                if (e.on_cpu) {
                    there_.push_back(&e);
                    break;
                }
                e.done = any = true;
                if (wide_ && model_.pools->is_in_window(model_.reads->key_of(e.slot))) {
                    if (e.pool >= 0) {
                        model_.pools->keep_from_window(c_.layer, e.pool, model_.reads->key_of(e.slot));
                    }
                    break;
                }
                model_.upload(e.slot, c_.layer, e.pool);
                if (wide_ && e.pool >= 0) {
                    model_.pools->copy_to_window(c_.layer, e.pool);
                }
                break;
            default:
                waiting_.push_back(e.slot);
        }
    }
    if (any) {
        model_.pools->issue();
    }
    return true;
}

}  // namespace moe
